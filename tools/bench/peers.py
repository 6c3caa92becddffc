# SPDX-License-Identifier: Apache-2.0
"""Processes at the other end of a socket: an echo, a buffer, a proxy that delays.

They need nothing but Python, so that what is measured against them is the sockets.
"""

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

CHUNK = 1 << 20


@contextlib.contextmanager
def peer_process(*arguments: str) -> Iterator[socket.socket]:
    """Start this file as the other end of a socketpair."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, __file__, str(theirs.fileno()), *arguments]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            yield ours
        finally:
            ours.close()
            process.wait()


@contextlib.contextmanager
def proxy(port: int, round_trip: float) -> Iterator[int]:
    """Start this file as a proxy to a port; yields the port it listens on."""
    command = [sys.executable, __file__, "proxy", str(port), str(round_trip / 2)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def serve_peer(fd: int, what: str, size: str = "0") -> None:
    """Echo short messages, or take and give a buffer, until the other end closes."""
    buffer = bytearray(b"x") * int(size)
    view = memoryview(buffer)
    with socket.socket(fileno=fd) as sock:
        while asked := sock.recv(40 if what == "echo" else 1):
            if what == "echo":
                sock.sendall(asked)
            elif asked == b"d":
                sock.sendall(view)
            else:
                done = 0
                while done < len(view):
                    done += sock.recv_into(view[done:])
                sock.sendall(b"k")


def serve_proxy(port: int, delay: float) -> None:
    """Hand on every byte after a delay, in both directions."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _hand_on(near, far, delay)
            _hand_on(far, near, delay)


def _hand_on(source: socket.socket, target: socket.socket, delay: float) -> None:
    waiting: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(CHUNK)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + delay, data))

    def write() -> None:
        while True:
            due, data = waiting.get()
            time.sleep(max(due - time.monotonic(), 0))
            try:
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
            except OSError:
                return

    for job in (read, write):
        threading.Thread(target=job, daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "proxy":
        serve_proxy(int(sys.argv[2]), float(sys.argv[3]))
    else:
        serve_peer(int(sys.argv[1]), *sys.argv[2:])
