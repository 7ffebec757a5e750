"""A crowd of slow clients in one process: python slow_clients.py KIND PORT TARGET COUNT

KIND head: a request whose header never ends, a byte every 0.3 s (slowloris). stall: asks for TARGET and reads nothing.
trickle: asks for TARGET and reads 64 bytes every 0.3 s. Prints "connected" once all asked, and "closed N" when the
other side has closed all of them (FIN or RST; a stalled one sees it after its buffer).
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import sys
import time

STEP_S = 0.3


def call(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", port))
    sock.setblocking(False)
    return sock


def main(kind: str, port: int, target: str, count: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    poll = select.poll()
    crowd: dict[int, socket.socket] = {}
    for _ in range(count):
        sock = call(port)
        head = f"GET {target} HTTP/1.1\r\nHost: a\r\n"
        sock.send((head if kind == "head" else head + "\r\n").encode())
        crowd[sock.fileno()] = sock
        poll.register(sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    while crowd:
        due = time.monotonic() + STEP_S
        for fd, _ in poll.poll(STEP_S * 1000):
            poll.unregister(fd)
            crowd.pop(fd).close()
        time.sleep(max(0.0, due - time.monotonic()))
        for sock in crowd.values():
            with contextlib.suppress(OSError):
                if kind == "head":
                    sock.send(b"X")
                elif kind == "trickle":
                    sock.recv(64)
    sys.stdout.write(f"closed {count}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
