"""What is known of a run on rented machines, on disk, and the money that it may still spend.

The service's own list is the truth about what lives; these files remember the prices, what went
wrong where, and what is home already.
"""

import json
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparse_coding.config import UserError
from sparse_coding.files import write_json
from sparse_coding.rental.terms import Cost, Rates, cost_of

GRACE_H = 2 / 60  # hours past its deadline until a machine has destroyed itself, at most; ours


@dataclass
class Rental:
    """One machine, from order to end. Times are epoch seconds.

    running: [from, to] in which it ran (to is None while it does): the GPU is billed then
    bid: $/h of an interruptible machine, 0 on demand
    planned: (up, down), GB of traffic that were expected
    """

    attempt: int
    machine_id: int
    gpu_name: str
    rates: Rates
    ordered: float
    expires: float
    planned: tuple[float, float] = (0.0, 0.0)
    bid: float = 0.0
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
        self.seen("gone", now)
        self.gone, self.why = now, self.why or why

    def never_was(self, why: str) -> None:
        """It was ordered, but nothing came of it."""
        self.gb_down, self.running = 0.0, []
        self.gone, self.why = self.ordered, why

    def appeared(self, id: int, now: float) -> None:
        """It was after all, and was ended now."""
        self.id, self.gb_down = id, self.planned[1]
        self.running, self.gone = [[self.ordered, now]], now

    def written_off(self, now: float) -> None:
        """Nobody saw it end: a killed controller's. Charged as running to its deadline; before
        that, one without a number was not made."""
        if self.id is None and now < self.expires:
            self.never_was("ordered by a command that was killed, and not made")
            return
        self.seen("running", self.ordered)
        self.ended(min(now, self.expires), "gone before this command")

    def cost(self, now: float) -> Cost:
        """So far."""
        traffic = dict(gb_up=self.gb_up, gb_down=self.gb_down)
        end = self.gone or now
        ran = sum((to or end) - start for start, to in self.running)
        existing_h = (end - self.ordered) / 3600
        return cost_of(self.rates, running_h=ran / 3600, existing_h=existing_h, **traffic)

    def worst(self) -> Cost:
        """If it lives, running, until its deadline."""
        hours = (self.expires - self.ordered) / 3600 + GRACE_H
        up, down = self.planned
        traffic = dict(gb_up=max(up, self.gb_up), gb_down=max(down, self.gb_down))
        return cost_of(self.rates, running_h=hours, existing_h=hours, **traffic)


@dataclass
class ShardRecord:
    """One part of a sweep: the machines it was on, and whether its results are home.

    avoid: machines on which it went wrong
    """

    shard: int
    rentals: list[Rental] = field(default_factory=list)
    avoid: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def current(self) -> Rental | None:
        """The machine that was ordered last, if it is not known to be gone."""
        last = self.rentals[-1] if self.rentals else None
        return last if last and last.gone is None else None

    def cost(self, now: float) -> Cost:
        return sum((rental.cost(now) for rental in self.rentals), Cost())


class Records:
    """rentals/<run>/: plan.json, shard-<i>.json, and what the shards keep beside them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def plan(self) -> dict:
        """Raises UserError if there is no such run."""
        path = self.folder / "plan.json"
        if not path.exists():
            runs = sorted(p.parent.name for p in self.folder.parent.glob("*/plan.json"))
            there = f"there are {', '.join(runs)}" if runs else "there is none yet"
            raise UserError(f"no run {self.folder.name} in {self.folder.parent}/: {there}")
        return json.loads(path.read_text())

    def write_plan(self, plan: dict) -> None:
        write_json(self.folder / "plan.json", plan)

    def load(self, shard: int) -> ShardRecord:
        path = self._path(shard)
        if not path.exists():
            return ShardRecord(shard)
        row = json.loads(path.read_text())
        rentals = [Rental(**r | {"rates": Rates(**r["rates"])}) for r in row.pop("rentals")]
        return ShardRecord(**row, rentals=rentals)

    def save(self, record: ShardRecord) -> None:
        write_json(self._path(record.shard), asdict(record))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.json"


class OverBudget(Exception):
    """What is left of --max-total does not pay for it."""


class Budget:
    """--max-total, kept by all shards together: a machine counts with the worst that it can cost
    from its order on, and with what it did cost once it is gone."""

    def __init__(self, max_total: float, records: list[ShardRecord]):
        self.max_total, self.records = max_total, records
        self.lock = threading.Lock()

    def committed(self) -> float:
        rentals = [rental for record in self.records for rental in record.rentals]
        return sum(
            (rental.cost(rental.gone) if rental.gone else rental.worst()).total
            for rental in rentals
        )

    def hours_left(self, rates: Rates, traffic: float) -> float:
        """How long one more machine at these rates could live."""
        left = self.max_total - self.committed() - traffic
        return max(0.0, left / rates.hourly - GRACE_H) if rates.hourly else float("inf")

    def spare_rate(self, rental: Rental) -> float:
        """$/h that this machine may cost more, to its deadline."""
        hours = (rental.expires - rental.ordered) / 3600 + GRACE_H
        return max(0.0, self.max_total - self.committed()) / hours

    def order(self, record: ShardRecord, rental: Rental) -> None:
        """Enters a machine that is about to be bought.

        Raises:
            OverBudget: the worst case of everything would exceed the cap.
        """
        with self.lock:
            if self.committed() + rental.worst().total > self.max_total + 1e-9:
                raise OverBudget
            record.rentals.append(rental)


def spent(records: list[ShardRecord]) -> Cost:
    """By all machines of these shards, up to now."""
    return sum((record.cost(time.time()) for record in records), Cost())
