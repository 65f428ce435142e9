"""What the lab's instances cost, as documented: the truth that a controller's own sums must meet.

GPU per second while running; storage per second from creation until the end, in every state;
traffic per GB both ways. The documents disagree whether GPU time is billed while the image loads,
so that is a setting.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

HOUR = 3600.0
MONTH_HOURS = 720.0  # 30 days: the documents' sample rows divide $/GB/month by this
GB = 1e9
GPU_BILLED = {"running", "frozen", "rebooting", "unknown"}  # unknown may still be running


def storage_per_hour(storage_cost: float, disk_gb: float) -> float:
    """$/hour of a disk, of a price in $/GB/month."""
    return storage_cost * disk_gb / MONTH_HOURS


@dataclass
class Account:
    """The bill of one instance: since when in which state at which hourly GPU price."""

    number: int
    offer: int
    machine: int
    label: str | None
    storage_per_h: float
    stopped_storage_factor: float
    down_per_gb: float
    up_per_gb: float
    created: float
    marks: list[tuple[float, str, float]] = field(default_factory=list)
    ended: float | None = None
    how: str | None = None  # destroyed, destroyed by itself, vanished
    ssh_bytes: tuple[float, float] = (0.0, 0.0)  # into and out of the instance, as measured
    told_bytes: tuple[float, float] = (0.0, 0.0)  # the same, as a test tells: an image, a data set

    @property
    def bytes(self) -> tuple[float, float]:
        return (self.ssh_bytes[0] + self.told_bytes[0], self.ssh_bytes[1] + self.told_bytes[1])

    def first(self, state: str) -> float | None:
        return next((t for t, s, _ in self.marks if s == state), None)

    def periods(self, now: float) -> list[tuple[str, float, float]]:
        """(state, seconds, GPU $/h) of each stretch up to now or to its end."""
        until = now if self.ended is None else self.ended
        stops = [t for t, _, _ in self.marks[1:]] + [until]
        pairs = zip(self.marks, stops, strict=True)
        return [(state, max(0.0, end - start), rate) for (start, state, rate), end in pairs]


class Ledger:
    """One account per instance ever created, in order of creation."""

    def __init__(self, gpu_while_loading: bool = False, clock: Callable[[], float] = time.time):
        self.accounts: dict[int, Account] = {}
        self.clock = clock
        self.gpu_billed = GPU_BILLED | ({"loading"} if gpu_while_loading else set())

    def open(self, number: int, offer: dict, label: str | None, disk_gb: float, gpu_per_h: float):
        """A contract begins: storage is billed from here on."""
        now = self.clock()
        self.accounts[number] = Account(
            number, offer["id"], offer["machine_id"], label,
            storage_per_hour(offer["storage_cost"], disk_gb), offer["stopped_storage_factor"],
            offer["inet_down_cost"], offer["inet_up_cost"], now, [(now, "created", gpu_per_h)],
        )  # fmt: skip

    def mark(self, number: int, state: str, gpu_per_h: float) -> None:
        """The instance is in this state, at this GPU price, from now on."""
        self.accounts[number].marks.append((self.clock(), state, gpu_per_h))

    def close(self, number: int, how: str) -> None:
        self.accounts[number].ended, self.accounts[number].how = self.clock(), how

    def tell(self, number: int, down_bytes: float, up_bytes: float) -> None:
        """More bytes into (down) and out of (up) the instance."""
        told = self.accounts[number].told_bytes
        self.accounts[number].told_bytes = told[0] + down_bytes, told[1] + up_bytes

    def cost(self, number: int, now: float | None = None) -> dict[str, float]:
        """Dollars so far: gpu, disk, bwd, bwu as the service's charges name them, and total."""
        account, now = self.accounts[number], self.clock() if now is None else now
        gpu = disk = 0.0
        for state, seconds, gpu_per_h in account.periods(now):
            gpu += seconds / HOUR * gpu_per_h * (state in self.gpu_billed)
            dearer = account.stopped_storage_factor if state == "stopped" else 1.0
            disk += seconds / HOUR * account.storage_per_h * dearer
        down, up = account.bytes
        bwd, bwu = down / GB * account.down_per_gb, up / GB * account.up_per_gb
        return {"gpu": gpu, "disk": disk, "bwd": bwd, "bwu": bwu, "total": gpu + disk + bwd + bwu}

    def total(self) -> float:
        now = self.clock()
        return sum(self.cost(number, now)["total"] for number in list(self.accounts))

    def live(self) -> list[int]:
        """Instances that still cost something."""
        return [n for n, account in list(self.accounts.items()) if account.ended is None]

    def entries(self) -> list[dict]:
        """A row per instance, for people and tests."""
        now = self.clock()
        return [
            {
                "id": a.number, "offer": a.offer, "machine_id": a.machine, "label": a.label,
                "created": a.created, "running": a.first("running"), "stopped": a.first("stopped"),
                "ended": a.ended, "how": a.how, "states": [s for _, s, _ in a.marks],
                "down_bytes": a.bytes[0], "up_bytes": a.bytes[1], **self.cost(a.number, now),
            }
            for a in list(self.accounts.values())
        ]  # fmt: skip
