"""Faults of the service that a test orders: which request goes wrong, and how.

An action is one word, optionally after "act+", which means that the request is carried out first
and only the answer is spoiled:

    429 500 502 503 504 410 ...   this status instead of an answer
    drop, close                   the connection is reset, or closed without an answer
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
import threading
from dataclasses import dataclass, field
from pathlib import Path

WHAT = r"(\d{3}|drop|close|hang|html|empty|null|object|truncated|null-fields(:[\w,]+)?"
WHAT += r"|short|delay:[\d.]+|signal:[A-Z]+)"
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
    group: bool = False  # the signal goes to the caller's process group, as Ctrl-C does
    headers: dict[str, str] = field(default_factory=dict)  # with it, as Retry-After
    seen: int = field(default=0, init=False)
    fired: int = field(default=0, init=False)

    def __post_init__(self):
        if not re.fullmatch(r"(act\+)?" + WHAT, self.action):
            raise ValueError(f"action={self.action!r} is not known; see vast_faults.py")
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
    def acts(self) -> bool:
        always = self.what.startswith(("truncated", "short", "null-fields", "delay"))
        return always or self.action.startswith("act+")

    @property
    def what(self) -> str:
        return self.action.removeprefix("act+")


class Faults:
    """The rules in force; the first that hits a request decides."""

    def __init__(self, rules: list[dict] = ()):
        self.rules, self.lock = [Rule(**rule) for rule in rules], threading.Lock()

    def add(self, **rule) -> int:
        with self.lock:
            self.rules.append(Rule(**rule))
            return len(self.rules) - 1

    def clear(self) -> None:
        with self.lock:
            self.rules = []

    def counts(self) -> list[dict]:
        """What has matched and fired so far, rule by rule."""
        with self.lock:
            return [{"path": r.path, "action": r.action, "seen": r.seen, "fired": r.fired}
                    for r in self.rules]  # fmt: skip

    def hit(self, method: str, path: str, caller: str) -> Rule | None:
        with self.lock:
            hits = [rule for rule in self.rules if rule.hits(method, path, caller)]
        return hits[0] if hits else None


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
        body = without(json.loads(body), detail or "start_date,extra_env")
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


def without(answer: dict, fields: str) -> str:
    """The answer with these fields of every instance null."""
    rows = answer.get("instances")
    for row in rows if isinstance(rows, list) else [rows]:
        if row:
            row.update(dict.fromkeys(fields.split(",")))
    return json.dumps(answer)


def client_process(port: int) -> int | None:
    """The process at the other end of a loopback connection from this port."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        cells = line.split()
        if int(cells[1].rpartition(":")[2], 16) == port and cells[3] == "01":
            inodes.add(f"socket:[{cells[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if any(os.readlink(fd.path) in inodes for fd in os.scandir(folder)):
                return int(folder.parent.name)
    return None


def send_signal(name: str, port: int, group: bool) -> None:
    """Signals the process that made the request from this port, or its process group."""
    pid, number = client_process(port), getattr(signal, f"SIG{name}")
    if pid == os.getpid():
        raise RuntimeError("the caller to be signalled is the lab's own process")
    if pid and group and os.getpgid(pid) != os.getpgrp():
        os.killpg(os.getpgid(pid), number)
    elif pid:
        os.kill(pid, number)
