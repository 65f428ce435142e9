"""The process that owns all processes of one lab instance, and ends them all.

Run by instance.py as `python -EsS supervisor.py spec.json`, with one end of a socket pair as
standard input. It listens on the instance's ssh port, hands each connection to a fresh `sshd -i`,
runs the onstart script, and obeys one-line JSON orders. When the other end of the socket pair
closes (an order to end, or the death of the lab, even by SIGKILL) it takes every process of the
instance with it: it inherits each orphan below it, so that neither setsid nor a double fork
escapes. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

PR_SET_CHILD_SUBREAPER = 36


class Supervisor:
    """The ssh port and what comes through it. Each connection has a thread of its own."""

    def __init__(self, spec: dict):
        self.spec, self.orders = spec, socket.socket(fileno=0)
        self.cuts, self.connections = list(spec["cuts"]), 0
        self.open: set[socket.socket] = set()
        self.over = [0, 0]  # bytes in and out of connections that are over
        self.lock = threading.Lock()
        self.listen(spec["ssh"], 0)

    def listen(self, mode: str, port: int) -> None:
        """ok and silent accept; refused only holds the port. port: 0: a new one"""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # 90 ms less a login
        listener.bind(("127.0.0.1", port))
        self.listener, self.port = listener, listener.getsockname()[1]
        if mode != "refused":
            listener.listen(64)
            threading.Thread(target=self.accept, args=(listener, mode), daemon=True).start()

    def accept(self, listener: socket.socket, mode: str) -> None:
        """Serves connections until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                with self.lock:
                    self.open.add(connection)
                if mode == "ok":
                    threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        """One connection, by an sshd of its own; its traffic is measured."""
        self.connections += 1
        after, etc = self.spec["host_key_after"], self.spec["dir"] + "/etc"
        if after is not None and self.connections == after + 1:
            os.replace(etc + "/host_key.next", etc + "/host_key")
        sshd = [self.spec["sshd"], "-i", "-e", "-f", etc + "/sshd_config"]
        with open(self.spec["dir"] + "/sshd.log", "a") as log:
            options = dict(stderr=log, env={"PATH": self.spec["env"]["PATH"]})
            if self.cuts:
                inside, end = socket.socketpair()
                with end:
                    process = subprocess.Popen(sshd, stdin=end, stdout=end, **options)
                if pump(connection, inside, self.cuts[0]):
                    self.cuts.pop(0)
                inside.close()
            else:
                process = subprocess.Popen(sshd, stdin=connection, stdout=connection, **options)
            process.wait()
        self.close(connection)

    def close(self, connection: socket.socket) -> None:
        with self.lock:
            if connection in self.open:
                self.open.remove(connection)
                self.over = [a + b for a, b in zip(self.over, traffic(connection), strict=True)]
        with contextlib.suppress(OSError):  # whatever process of sshd still holds it
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def measured(self) -> list[int]:
        """Bytes in and out of all connections so far."""
        with self.lock:
            pairs = [self.over, *map(traffic, self.open)]
        return [sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)]

    def run(self) -> None:
        """Starts the onstart script and obeys until the orders end."""
        home = self.spec["home"]
        with open(self.spec["dir"] + "/container.log", "a") as log:
            subprocess.Popen(
                ["/bin/bash", home + "/onstart.sh"], stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, cwd=home, env=self.spec["env"], start_new_session=True,
            )  # fmt: skip
        self.answer()
        for line in self.orders.makefile():
            order = json.loads(line)
            if "ssh" in order:
                with contextlib.suppress(OSError):  # it is no listener where all is refused
                    self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
                self.listener.close()
                self.listen(order["ssh"], order.get("port", self.port))
            if order.get("cut"):
                for connection in list(self.open):
                    self.close(connection)
            self.answer()

    def answer(self) -> None:
        answer = {"port": self.port, "bytes": self.measured()}
        self.orders.sendall(json.dumps(answer).encode() + b"\n")


def traffic(connection: socket.socket) -> tuple[int, int]:
    """Bytes (received, sent) by this end, from the kernel's TCP_INFO."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    acked, received = struct.unpack_from("QQ", info, 120)
    return received, acked


def pump(outside: socket.socket, inside: socket.socket, limit: int) -> bool:
    """Copies bytes both ways; True if it cut the connection after `limit`, as a bad line does."""
    selector = selectors.DefaultSelector()
    selector.register(outside, selectors.EVENT_READ, inside)
    selector.register(inside, selectors.EVENT_READ, outside)
    while True:
        for key, _ in selector.select():
            try:
                data = key.fileobj.recv(min(65536, limit))
                key.data.sendall(data)
            except OSError:
                return False
            if not data:
                return False
            limit -= len(data)
            if limit <= 0:  # RST instead of FIN
                outside.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return True


def descendants() -> list[int]:
    """Every living process below this one, by the parent's id in /proc/*/stat."""
    children: dict[int, list[tuple[int, str]]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
            state, parent = stat.read().rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append((int(name), state))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += [pid for pid, state in below if state != "Z"]
        todo += [pid for pid, _ in below]  # of a dead one too: its children may be read as its own
    return found


def end_everything() -> None:
    """Kills all that this process started, until two looks find nothing, and exits."""
    deadline, empty = time.monotonic() + 5, 0
    while empty < 2 and time.monotonic() < deadline:
        alive = descendants()
        empty = 0 if alive else empty + 1
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    os._exit(0)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    try:
        Supervisor(spec).run()
    finally:
        end_everything()


if __name__ == "__main__":
    main()
