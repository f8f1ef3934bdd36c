"""Restart hello.service again and again; say who answered, and what was seen of its sockets meanwhile.

``restarts.py 20 '*:8080' /run/hello.sock``; the addresses as ss writes them. One JSON object:

=========== =============================================================================================
``pids``    who answered a new connection, before the first restart and after each
``seconds`` from each order to restart to that answer
``facts``   each different state of the sockets once, as seen before, during and after the restarts. Nothing
            in there may ever change. An address at which nobody listens is missing in it.
=========== =============================================================================================

With 0 restarts nobody is asked: only ``facts`` are looked at.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time


def look(addresses: list[str]) -> dict[str, dict[str, object]]:
    """Ask the kernel, by ss, which is not our code, and the file system."""
    lines = subprocess.check_output(["ss", "-Hltxne"], text=True).splitlines()
    found: dict[str, dict[str, object]] = {}
    for kind, _, _, backlog, address, port, *rest in (line.split() for line in lines):
        if address in addresses:
            # Of a unix socket the column of the peer has the inode.
            inode = port if kind.startswith("u_") else re.findall(r"\bino:(\d+)", " ".join(rest))[0]
            found[address] = {"kind": kind, "backlog": int(backlog), "inode": int(inode)}
            if address.startswith("/"):
                status = os.stat(address)
                owner = [status.st_uid, status.st_gid]
                found[address] |= {"file": status.st_ino, "mode": oct(status.st_mode), "owner": owner}
    return found


def get() -> int:
    """Return the pid that answers a new connection."""
    with socket.create_connection(("127.0.0.1", 8080), timeout=30) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    return int(answer.partition(b"\r\n\r\n")[2].split()[0])


def main() -> None:
    """Restart and look."""
    rounds, addresses = int(sys.argv[1]), sys.argv[2:]
    pids = [get()] if rounds else []
    seconds = []
    seen = [look(addresses)]
    for _ in range(rounds):
        start = time.monotonic()
        with subprocess.Popen(["systemctl", "restart", "hello.service"]) as restart:
            seen.append(look(addresses))
        if restart.returncode:
            sys.exit(restart.returncode)
        pids.append(get())
        seconds.append(time.monotonic() - start)
        seen.append(look(addresses))
    different = [state for index, state in enumerate(seen) if state not in seen[:index]]
    json.dump({"pids": pids, "seconds": seconds, "facts": different}, sys.stdout)


if __name__ == "__main__":
    main()
