"""Faults of the service that a test orders: which request goes wrong, and how.

An action is one word, optionally after "act+", which means that the request is carried out first
and only the answer is spoiled:

    429 500 503 504 410 ...       this status instead of an answer
    drop                          the connection is reset without an answer
    hang                          never answered
    html, empty, null, object     an answer of status 200 that is no answer
    truncated                     the first half of the true answer (always acts)
    short                         the same, and the connection ends before the promised length
    null-fields:a,b               the true answer, these fields of each row null (always acts)
    delay:0.3                     the true answer, this many seconds late (always acts)
    signal:KILL, signal:INT       the client's process gets the signal; without act+ the request is
                                  lost, with act+ it is carried out, and answered if anyone listens
"""

import contextlib
import json
import os
import random
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

ACTIONS = (
    r"(act\+)?(\d{3}|drop|hang|html|empty|null|object|truncated|null-fields:[\w,]+|short|"
    r"delay:[\d.]+|signal:[A-Z]+)"
)
GATEWAY = "<html>\r\n<head><title>{status} Bad Gateway</title></head>\r\n</html>\r\n"
SPOILED = {"html": "<!doctype html><title>Vast.ai | Console</title>", "empty": "", "null": "null",
           "object": "{}"}  # fmt: skip


@dataclass
class Rule:
    """Requests that match, counted from 1, and which of them go wrong. Default: every one."""

    path: str  # a regular expression, searched in the path
    action: str
    method: str | None = None
    caller: str | None = None  # "account" or "instance": whose key
    nth: int | list[int] | None = None
    every: int | None = None
    first: int | None = None  # the first so many
    probability: float | None = None
    seed: int = 0
    body: str | None = None  # of the spoiled answer, instead of the usual one
    seen: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def __post_init__(self):
        if not re.fullmatch(ACTIONS, self.action):
            raise ValueError(f"action={self.action!r} is not known; see faults.py")
        self.chance = random.Random(self.seed)

    def hits(self, method: str, path: str, caller: str) -> bool:
        """Counts the request if it matches, and says whether it is to go wrong."""
        if self.method not in (None, method) or self.caller not in (None, caller):
            return False
        if not re.search(self.path, path):
            return False
        self.seen += 1
        nth = [self.nth] if isinstance(self.nth, int) else self.nth
        wrong = all((
            nth is None or self.seen in nth,
            self.every is None or self.seen % self.every == 0,
            self.first is None or self.seen <= self.first,
            self.probability is None or self.chance.random() < self.probability,
        ))  # fmt: skip
        self.fired += wrong
        return wrong

    @property
    def what(self) -> str:
        return self.action.removeprefix("act+")

    @property
    def acts(self) -> bool:
        """Whether the request is carried out."""
        spoils_the_answer = ("truncated", "short", "null-fields", "delay")
        return self.action.startswith("act+") or self.what.startswith(spoils_the_answer)


def spoil(rule: Rule, status: int, body: str) -> tuple[int, str, str]:
    """(status, body, content type) that the client gets instead of (status, body)."""
    what, _, detail = rule.what.partition(":")
    if what in SPOILED:
        kind = "text/html" if what == "html" else "application/json"
        return 200, SPOILED[what] if rule.body is None else rule.body, kind
    if what.isdigit():
        text, kind = error_body(int(what))
        return int(what), text if rule.body is None else rule.body, kind
    if what in ("truncated", "short"):
        body = body[: len(body) // 2]
    elif what == "null-fields":
        body = without(json.loads(body), detail)
    return status, body, "application/json"


def error_body(status: int) -> tuple[str, str]:
    """What the service or the gateway before it says with this status: (body, content type)."""
    if status == 429:
        return "API requests too frequent", "text/plain"
    if status in (502, 503, 504):
        return GATEWAY.format(status=status), "text/html"
    error = {410: "deprecated_endpoint"}.get(status, "server_error")
    body = {"success": False, "error": error, "msg": f"error {status}"}
    return json.dumps(body), "application/json"


def without(answer: dict, names: str) -> str:
    """The answer with these fields of every instance null."""
    rows = answer.get("instances")
    for row in rows if isinstance(rows, list) else [rows]:
        if row:
            row.update(dict.fromkeys(names.split(",")))
    return json.dumps(answer)


def send_signal(name: str, port: int) -> None:
    """Signals the process that made the request from this port."""
    pid = client_process(port)
    if pid == os.getpid():
        raise RuntimeError("the caller to be signalled is the lab's own process")
    if pid:
        os.kill(pid, getattr(signal, f"SIG{name}"))


def client_process(port: int) -> int | None:
    """The process at the other end of a loopback connection from this port."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        cells = line.split()
        if int(cells[1].rpartition(":")[2], 16) == port and cells[3] == "01":
            inodes.add(f"socket:[{cells[9]}]")
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd.path) in inodes for fd in os.scandir(f"/proc/{name}/fd")):
                return int(name)
    return None
