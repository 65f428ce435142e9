"""What an instance does by itself, and the clock that makes it happen."""

import heapq
import itertools
import re
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Behaviour:
    """Fate of an instance. Times are real seconds; None is never."""

    provision_s: float = 0.0  # actual_status null
    load_s: float = 0.0  # loading, after that
    restart_s: float = 0.0  # loading, when it is started again
    stuck: str | None = None  # "created" or "loading": never gets further
    turns: str | None = None  # "exited", "offline" or "unknown" ...
    turns_after_s: float = 0.0  # ... so long after the first start
    recovers_after_s: float | None = None  # from offline or unknown
    outbid_after_s: float | None = None  # after the first start: all killed, stopped
    returns_after_s: float | None = None  # after being outbid: started again
    vanishes_after_s: float | None = None  # after creation: row, processes and files gone
    ends_after_s: float | None = None  # after creation: end of the contract, stopped
    price_factor: float = 1.0  # the created instance's GPU price over the offer's
    listed_after_s: float = 0.0  # after creation: absent from lists and show until then
    lingers_s: float = 0.0  # after its end: still shown, though it costs nothing any more
    label_after_s: float = 0.0  # after creation: label null until then
    direct: bool = True  # False: no port of its own, only the proxy's
    proxy: bool = True  # False: nobody listens at ssh_host:ssh_port
    new_port: bool = False  # another port at each start
    ssh: str = "ok"  # or "refused", "hang" (SYN unanswered), "silent" (accepts, says nothing)
    ssh_after_s: float = 0.0  # after each start: refused until then
    account_keys: bool = True  # False: only keys attached to the instance may log in
    host_key_after: int | None = None  # another host key after so many connections of a start
    cut_after_bytes: tuple[int, ...] = ()  # successive connections are reset after so many bytes
    disk_mb: float | None = None  # HOME is a file system of this size (needs root)
    clock_skew_s: float = 0.0  # the instance's `date` is wrong by this
    start_refused: bool = False  # a stopped instance does not come back: its GPU is taken

    @classmethod
    def of(cls, *parts: dict | None) -> "Behaviour":
        """The later parts win; unknown names are errors."""
        merged = {k: v for part in parts for k, v in (part or {}).items()}
        if unknown := set(merged) - {f.name for f in fields(cls)}:
            raise ValueError(f"behaviours have no {', '.join(sorted(unknown))}")
        if "cut_after_bytes" in merged:
            merged["cut_after_bytes"] = tuple(merged["cut_after_bytes"])
        return cls(**merged)


@dataclass
class Choice:
    """A behaviour for the instances to come whose label and offer match, for so many of them."""

    behaviour: dict
    label: str = ""  # a regular expression, searched in the label
    offer: int | None = None
    skip: int = 0  # matching instances to leave alone first
    times: int | None = None
    seen: int = field(default=0, init=False)

    def __post_init__(self):
        Behaviour.of(self.behaviour)

    def takes(self, label: str | None, offer: int) -> bool:
        if self.offer not in (None, offer) or not re.search(self.label, label or ""):
            return False
        self.seen += 1
        return self.seen > self.skip and (self.times is None or self.seen - self.skip <= self.times)


class Clockwork:
    """Runs functions after a delay, each in a thread of its own."""

    def __init__(self):
        self.heap, self.count = [], itertools.count()
        self.wake, self.open = threading.Condition(), True
        self.running: set[threading.Thread] = set()
        self.errors: list[str] = []  # of the lab itself
        self.thread = threading.Thread(target=self._run, name="lab clock", daemon=True)
        self.thread.start()

    def after(self, seconds: float, function: Callable, *args) -> None:
        with self.wake:
            due = time.monotonic() + seconds
            heapq.heappush(self.heap, (due, next(self.count), function, args))
            self.wake.notify()

    def _run(self) -> None:
        with self.wake:
            while self.open:
                if not self.heap:
                    self.wake.wait()
                    continue
                wait = self.heap[0][0] - time.monotonic()
                if wait > 0:
                    self.wake.wait(wait)
                    continue
                _, _, function, args = heapq.heappop(self.heap)
                thread = threading.Thread(target=self._call, args=(function, *args), daemon=True)
                self.running = {t for t in self.running if t.is_alive()} | {thread}
                thread.start()

    def _call(self, function: Callable, *args) -> None:
        try:
            function(*args)
        except Exception:  # not lost with the thread: the lab's end reports it
            self.errors.append(traceback.format_exc())

    def stop(self) -> None:
        """Nothing begins any more; what has begun is waited for."""
        with self.wake:
            self.open = False
            self.wake.notify()
        self.thread.join()
        for thread in self.running:
            thread.join(5)
