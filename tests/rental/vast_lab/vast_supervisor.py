"""Process 1 of one lab instance: it owns every process that the instance starts, and ends them all.

Run by vast_instance.py as `python -E -s -S vast_supervisor.py spec.json`, with one end of a socket
pair as standard input. It listens on the instance's ssh port, hands each connection to a fresh
`sshd -i`, runs the onstart script, and obeys one-line JSON orders. When the other end of the socket
pair closes (an order to end, or the death of the server, even by SIGKILL) it takes every process of
the instance with it: as root by ending its PID namespace, otherwise as the sub-reaper that inherits
each orphan, so that neither setsid nor a double fork escapes.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

from vast_namespaces import end_everything, enter_namespaces, inherit_orphans

CUT_BY_LAB = 7  # exit code of a pump that reached its limit


# --- one ssh connection ---


def pump(outside: socket.socket, inside: socket.socket, limit: int) -> None:
    """Copies bytes both ways and cuts the connection after `limit` of them, as a bad line does."""
    selector = selectors.DefaultSelector()
    selector.register(outside, selectors.EVENT_READ, inside)
    selector.register(inside, selectors.EVENT_READ, outside)
    while True:
        for key, _ in selector.select():
            data = key.fileobj.recv(min(65536, limit))
            if not data:
                os._exit(0)
            key.data.sendall(data)
            limit -= len(data)
            if limit <= 0:
                reset(outside)
                os._exit(CUT_BY_LAB)


def reset(connection: socket.socket) -> None:
    """Closes with RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def bind(listener: socket.socket, port: int) -> None:
    """Takes the port, or after a while another one, as addresses change on the real service."""
    for _ in range(50):  # a child that has just been forked may hold the old listener for a moment
        with contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return
        time.sleep(0.01)
    listener.bind(("127.0.0.1", 0))


def become(program: Callable[[], None]) -> None:
    """Lets a forked child turn into a program, or end: never go on as a second supervisor."""
    try:
        program()
    finally:
        os._exit(127)


def traffic(connection: socket.socket) -> tuple[int, int]:
    """Bytes (received, sent) by this end, from the kernel's TCP_INFO."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    acked, received = struct.unpack_from("QQ", info, 120)
    return received, acked


class Supervisor:
    """The event loop: orders, connections, children."""

    def __init__(self, spec: dict):
        self.spec, self.orders = spec, socket.socket(fileno=0)
        self.sessions: dict[int, socket.socket] = {}
        self.held: list[socket.socket] = []  # accepted in silence
        self.fillers: list[socket.socket] = []  # of a backlog that is to be full
        self.cuts, self.connections = list(spec["cuts"]), 0
        self.buffer = b""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.orders, selectors.EVENT_READ, self.obey)
        self.wake = socket.socketpair()
        self.wake[1].setblocking(False)
        signal.set_wakeup_fd(self.wake[1].fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the wake-up byte comes
        self.selector.register(self.wake[0], selectors.EVENT_READ, lambda: self.wake[0].recv(4096))
        self.listener, self.port = None, spec["port"]
        self.listen(spec["ssh"])

    def listen(self, mode: str) -> None:
        """ok and silent accept; refused only holds the port; hang lets the backlog run full."""
        if self.listener:
            with contextlib.suppress(KeyError):
                self.selector.unregister(self.listener)
            self.listener.close()
        self.fillers = []
        self.mode, self.listener = mode, socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # 90 ms less a login
        bind(self.listener, self.port)
        self.port = self.listener.getsockname()[1]
        if mode in ("ok", "silent"):
            self.listener.listen(64)
            self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        elif mode == "hang":
            self.listener.listen(0)
            for _ in range(2):
                self.fillers.append(filler := socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", self.port))

    def accept(self) -> None:
        connection = self.listener.accept()[0]
        if self.mode == "silent":
            self.held.append(connection)
            return
        self.connections += 1
        after = self.spec["host_key_after"]
        if after is not None and self.connections == after + 1:
            os.replace(self.spec["dir"] + "/etc/host_key.next", self.spec["dir"] + "/etc/host_key")
        end = connection
        if self.cuts:
            inside, end = socket.socketpair()
            pid = os.fork()
            if not pid:
                for other in (end, self.listener, *self.sessions.values()):
                    other.close()  # else they would stay open as long as this connection
                pump(connection, inside, self.cuts[0])
            inside.close()
            self.sessions[pid] = connection
        pid = os.fork()
        if not pid:
            become(lambda: self.become_sshd(end))
        if end is connection:
            self.sessions[pid] = connection
        else:
            end.close()

    def become_sshd(self, connection: socket.socket) -> None:
        log = os.open(self.spec["dir"] + "/sshd.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(connection.fileno(), 0)
        os.dup2(connection.fileno(), 1)
        os.dup2(log, 2)
        os.closerange(3, 65536)
        sshd, config = self.spec["sshd"], self.spec["dir"] + "/etc/sshd_config"
        os.execve(sshd, [sshd, "-i", "-e", "-f", config], self.spec["marks"])

    def start_onstart(self) -> None:
        """Runs the onstart script as the container does: with the container's variables."""
        if not os.fork():
            become(self.become_onstart)

    def become_onstart(self) -> None:
        os.setsid()
        log = self.spec["dir"] + "/container.log"
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.closerange(3, 65536)
        os.chdir(self.spec["home"])
        env = self.spec["env"] | {"VAST_TCP_PORT_22": str(self.port)}
        os.execve("/bin/bash", ["bash", self.spec["home"] + "/onstart.sh"], env)

    def obey(self) -> None:
        data = self.orders.recv(65536)
        if not data:
            for connection in self.sessions.values():
                self.measure(connection)
            end_everything()
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for order in map(json.loads, lines):
            if order.get("cut"):
                self.cut()
            if "ssh" in order:
                self.listen(order["ssh"])
            if "cuts" in order:
                self.cuts = order["cuts"]
            if order.get("measure"):
                with open(self.spec["dir"] + "/traffic.open", "w") as out:
                    for connection in self.sessions.values():
                        print(*traffic(connection), file=out)
            self.answer()

    def cut(self) -> None:
        """Breaks every connection that there is."""
        for pid, connection in self.sessions.items():
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):  # whatever process of sshd still holds it
                connection.shutdown(socket.SHUT_RDWR)
        for connection in self.held:
            reset(connection)
        self.held = []

    def answer(self) -> None:
        self.orders.sendall(json.dumps({"port": self.port}).encode() + b"\n")

    def reap(self) -> None:
        """Buries children; a finished connection is measured, and closed for good."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if os.waitstatus_to_exitcode(status) == CUT_BY_LAB and pid in self.sessions:
                self.cuts = self.cuts[1:]
            if connection := self.sessions.pop(pid, None):
                self.measure(connection)
                connection.close()

    def measure(self, connection: socket.socket) -> None:
        """Notes the traffic of a connection that is over."""
        with contextlib.suppress(OSError), open(self.spec["dir"] + "/traffic", "a") as out:
            print(*traffic(connection), file=out)

    def run(self) -> None:
        if self.spec["onstart"]:
            self.start_onstart()
        self.answer()
        while True:
            for key, _ in self.selector.select():
                key.data()
            self.reap()


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    if spec["namespaces"]:
        enter_namespaces(spec)
    else:
        inherit_orphans()
    Supervisor(spec).run()


if __name__ == "__main__":
    main()
