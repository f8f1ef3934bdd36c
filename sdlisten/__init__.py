"""Get listening sockets from systemd or bind them, and be restarted without a client noticing."""

from __future__ import annotations

__version__ = "0.1.0"
