"""What is known on disk of a run on rented machines, and the money that it may still spend.

The service's own list is the truth about what lives; these files remember the prices, what went
wrong where, and which shards are done.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparse_coding.config import UserError, require
from sparse_coding.files import read_json, write_json

GRACE_H = 2 / 60  # hours past its deadline until a machine has destroyed itself, at most; ours
REMEDY = "`reap --all` ends its machines; then remove it"  # of a record that is damaged
LOST = "the answer to the order was lost, and no instance appeared"


class RentalError(Exception):
    """Something went wrong out there: the message says what, and what to do."""


def printable(text: object, most: int = 200) -> str:
    """What of a stranger's text may get onto a terminal: one line without control characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[:most])
    return " ".join(line.split())


@dataclass(frozen=True)
class Cost:
    """In dollars."""

    gpu: float = 0.0
    disk: float = 0.0
    traffic: float = 0.0

    @property
    def total(self) -> float:
        """The sum, in dollars."""
        return self.gpu + self.disk + self.traffic

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.gpu + other.gpu, self.disk + other.disk, self.traffic + other.traffic)

    def __str__(self) -> str:
        digits = 2 if self.total >= 1 else 3 if self.total >= 0.02 else 4
        parts = f"GPU {self.gpu:.{digits}f}, disk {self.disk:.{digits}f}"
        return f"${self.total:.{digits}f} ({parts}, traffic {self.traffic:.{digits}f})"


@dataclass(frozen=True)
class Rates:
    """What an instance costs.

    gpu: $/h while it runs; disk: $/h while it exists, running or not; up, down: $/GB of traffic
    """

    gpu: float
    disk: float
    up: float
    down: float

    @property
    def hourly(self) -> float:
        """$/h while it runs."""
        return self.gpu + self.disk

    def cost(self, *, running_h: float, existing_h: float, gb_up: float, gb_down: float) -> Cost:
        """Of an instance that exists for so long and runs in a part of it."""
        traffic = self.up * gb_up + self.down * gb_down
        return Cost(self.gpu * running_h, self.disk * existing_h, traffic)


@dataclass
class Attempt:
    """One machine's life for a shard, from its order to its end. Times are epoch seconds.

    number: from 1, as in the label; id: of the instance, None until it is known
    planned_up, planned_down: GB of traffic that are expected; gb_up, gb_down: so far
    running: [from, to] in which it ran (to is None while it does): the GPU is billed then
    """

    number: int
    machine_id: int
    gpu_name: str
    rates: Rates
    ordered: float
    expires: float
    planned_up: float = 0.0
    planned_down: float = 0.0
    id: int | None = None
    running: list[list[float | None]] = field(default_factory=list)
    gone: float | None = None
    gb_up: float = 0.0
    gb_down: float = 0.0
    why: str = ""  # it ended

    def seen(self, status: str, now: float) -> None:
        """Notes whether it runs."""
        runs = bool(self.running) and self.running[-1][1] is None
        if status == "running" and not runs:
            self.running.append([now, None])
        elif status != "running" and runs:
            self.running[-1][1] = now

    def ended(self, now: float, why: str) -> None:
        """It was ended, by us or by itself: it has not outlived its deadline."""
        now = min(now, self.expires + GRACE_H * 3600)
        self.seen("gone", now)
        self.gone, self.why = now, why

    def vanished(self, now: float) -> None:
        """Nobody saw it end: it is charged as running until now, or its deadline."""
        self.seen("running", self.ordered)
        self.ended(min(now, self.expires), "it vanished from the service's list")

    def not_made(self, why: str) -> None:
        """It was ordered, but nothing came of it."""
        self.gb_down, self.running = 0.0, []
        self.gone, self.why = self.ordered, why

    def made_late(self, id: int, now: float) -> None:
        """It was made after all, and has been ended now."""
        self.id, self.gb_down = id, self.planned_down
        self.running, self.gone = [[self.ordered, now]], now

    def cost(self, now: float) -> Cost:
        """So far."""
        end = self.gone or now
        ran = sum((to or end) - start for start, to in self.running)
        return self.rates.cost(
            running_h=ran / 3600,
            existing_h=(end - self.ordered) / 3600,
            gb_up=self.gb_up,
            gb_down=self.gb_down,
        )

    def worst(self) -> Cost:
        """If it lives, running, until its deadline."""
        hours = (self.expires - self.ordered) / 3600 + GRACE_H
        return self.rates.cost(
            running_h=hours,
            existing_h=hours,
            gb_up=max(self.planned_up, self.gb_up),
            gb_down=max(self.planned_down, self.gb_down),
        )


@dataclass
class ShardRecord:
    """One shard of a sweep: the machines that it was on, and whether its results are fetched.

    avoid: machines on which something went wrong
    """

    shard: int
    attempts: list[Attempt] = field(default_factory=list)
    avoid: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def current(self) -> Attempt | None:
        """The last attempt, if its machine is not known to be gone."""
        last = self.attempts[-1] if self.attempts else None
        return last if last and last.gone is None else None


def _is_sound(record: ShardRecord) -> bool:
    """Whether its fields are of their types, as far as computing with them does not show it."""
    attempts = record.attempts
    ids = [record.shard, *record.avoid, *(n for a in attempts for n in (a.number, a.machine_id))]
    ids += [a.id for a in attempts if a.id is not None]
    lists = [
        record.avoid,
        *(a.running for a in attempts),
        *(s for a in attempts for s in a.running),
    ]
    texts = [text for a in attempts for text in (a.gpu_name, a.why)]
    numbers = [cost.total for a in attempts for cost in (a.worst(), a.cost(a.expires))]
    numbers += [a.gone for a in attempts if a.gone is not None]
    kinds = ((ids, int), (lists, list), (texts, str), ([record.done], bool))
    typed = all(type(value) is kind for values, kind in kinds for value in values)
    return typed and math.isfinite(sum(numbers))


class OverBudget(RentalError):
    """What is left of --max-total does not pay for it."""

    def __str__(self) -> str:
        return "what is left of --max-total pays for no further machine: raise it"


class Ledger:
    """rentals/<run>/shard-<i>.json, and --max-total, kept by all shards together: a machine counts
    with the worst that it can cost from its order on, and with what it did cost once it is gone."""

    def __init__(self, folder: Path, n_shards: int, max_total: float = math.inf):
        self.folder, self.max_total = folder, max_total
        self.shards = [self._load(i + 1) for i in range(n_shards)]

    def _load(self, shard: int) -> ShardRecord:
        path = self.folder / f"shard-{shard}.json"
        if not path.exists():
            return ShardRecord(shard)
        try:
            row = read_json(path, remedy=REMEDY)
            rows = row.pop("attempts")
            attempts = [Attempt(**a | {"rates": Rates(**a["rates"])}) for a in rows]
            record = ShardRecord(**row, attempts=attempts)
            good = type(rows) is list and _is_sound(record)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            good = False
        require(good and record.shard == shard, f"{path} is no record of a shard: {REMEDY}")
        return record

    def save(self, record: ShardRecord) -> None:
        """Writes the record of a shard, whole."""
        write_json(self.folder / f"shard-{record.shard}.json", asdict(record))

    @property
    def attempts(self) -> list[Attempt]:
        """Of all shards."""
        return [attempt for record in self.shards for attempt in record.attempts]

    def spent(self) -> Cost:
        """By all machines, up to now."""
        return sum((attempt.cost(time.time()) for attempt in self.attempts), Cost())

    def committed(self) -> float:
        """Dollars that are spent or may yet be."""
        return sum((a.cost(a.gone) if a.gone else a.worst()).total for a in self.attempts)

    def hours_left(self, rates: Rates, traffic: float) -> float:
        """How long one more machine at these rates could live."""
        left = self.max_total - self.committed() - traffic
        return max(0.0, left / rates.hourly - GRACE_H) if rates.hourly else math.inf

    def enter(self, record: ShardRecord, attempt: Attempt) -> None:
        """Counts a machine that is about to be bought; one thread at a time. Raises OverBudget if
        the worst case of everything would exceed the cap."""
        if self.committed() + attempt.worst().total > self.max_total + 1e-9:
            raise OverBudget
        record.attempts.append(attempt)
        self.save(record)


def read_plan(folder: Path) -> dict:
    """rentals/<run>/plan.json: what the run is. Raises UserError if there is no such run."""
    path = folder / "plan.json"
    if not path.exists():
        runs = sorted(p.parent.name for p in folder.parent.glob("*/plan.json"))
        there = f"there are {', '.join(runs)}" if runs else "there is none yet"
        raise UserError(f"no run {folder.name} in {folder.parent}/: {there}")
    remedy = f"`reap --all` ends its machines; then remove {folder}"
    plan = read_json(path, remedy=remedy)
    words, n = plan.get("command"), plan.get("instances")
    good = isinstance(words, list) and all(isinstance(word, str) for word in words)
    good = good and type(n) is int and 0 < n < 10_000
    require(good, f"{path} is no plan of a run: {remedy}")
    return plan
