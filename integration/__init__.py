"""The library on the real thing: systemd 252, 257 and 262 as PID 1, plain containers, real servers.

How the parts stand to each other, lowest first; the fixtures that tests use are in ``conftest.py``:

- `integration.engine`: a docker engine, started when none answers and stopped with its last user.
- `integration.images`: bootable Debian images and, on top of them, the wheel of this checkout.
- `integration.session`: which containers are whose, and how those of dead sessions go away.
- `integration.container` and `integration.machine`: one container as an object. `Plain` runs one program,
  `Machine` boots systemd.
"""

from __future__ import annotations
