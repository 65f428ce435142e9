"""What is rented and on what terms: labels, offers, instances, prices.

A label is the only thing that an instance carries from its creation to its end, so all that must
survive the loss of this machine stands in it: the run, the shard and when the instance has to go.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

PREFIX = "sae1"  # of all labels of ours; 1: the version of what follows
MONTH_HOURS = 30 * 24  # vast.ai quotes storage in $/GB/month
FINAL = ("exited", "offline", "unknown")  # statuses that don't become running by themselves


class BadAnswer(Exception):
    """The service answered something else than its documents say. Never read as "nothing"."""


@dataclass(frozen=True)
class Label:
    """sae1/<run>/<shard>/a<attempt>/exp=<epoch seconds>

    shard: from 1; expires: the instance must be gone then, whoever sees it
    """

    run: str
    shard: int
    attempt: int
    expires: int
    PATTERN: ClassVar = re.compile(rf"{PREFIX}/([\w.-]+)/(\d+)/a(\d+)/exp=(\d+)")

    def __str__(self) -> str:
        return f"{PREFIX}/{self.run}/{self.shard}/a{self.attempt}/exp={self.expires}"

    @classmethod
    def parse(cls, text: str | None) -> "Label | None":
        """None if the label is not one of ours."""
        match = cls.PATTERN.fullmatch(text or "")
        return cls(match[1], *map(int, match.groups()[1:])) if match else None


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
        return self.gpu + self.disk


@dataclass(frozen=True)
class Cost:
    """In dollars."""

    gpu: float = 0.0
    disk: float = 0.0
    traffic: float = 0.0

    @property
    def total(self) -> float:
        return self.gpu + self.disk + self.traffic

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.gpu + other.gpu, self.disk + other.disk, self.traffic + other.traffic)

    def __str__(self) -> str:
        digits = 2 if self.total >= 1 else 3 if self.total >= 0.02 else 4
        parts = f"GPU {self.gpu:.{digits}f}, disk {self.disk:.{digits}f}"
        return f"${self.total:.{digits}f} ({parts}, traffic {self.traffic:.{digits}f})"


def cost_of(
    rates: Rates, *, running_h: float, existing_h: float, gb_up: float, gb_down: float
) -> Cost:
    """What an instance costs that exists for so long and runs in a part of it."""
    traffic = rates.up * gb_up + rates.down * gb_down
    return Cost(rates.gpu * running_h, rates.disk * existing_h, traffic)


@dataclass(frozen=True)
class Terms:
    """What is rented; the names are those of vastai_utils.py's flags."""

    gpu_names: tuple[str, ...]
    n_gpus: int
    disk_gb: float
    image: str
    image_gb: float
    min_reliability: float
    min_inet_mbps: float
    min_cuda: float
    interruptible: bool
    max_dph: float
    max_hours: float
    results_gb: float

    def query(self, *, any_gpu: bool = False) -> dict:
        """For the service's search, in its units: MB, seconds."""
        query = {
            "num_gpus": {"eq": self.n_gpus},
            "disk_space": {"gte": self.disk_gb},
            "reliability": {"gte": self.min_reliability},
            "inet_down": {"gte": self.min_inet_mbps},
            "cuda_max_good": {"gte": self.min_cuda},
            "duration": {"gte": self.max_hours * 3600},
            "direct_port_count": {"gte": 1},
        }
        return query if any_gpu else query | {"gpu_name": {"in": list(self.gpu_names)}}

    def traffic(self, rates: Rates) -> float:
        """Dollars for the image, and the results home."""
        return rates.down * self.image_gb + rates.up * self.results_gb


@dataclass(frozen=True)
class Offer:
    """A machine that can be rented, priced for the disk that was asked for.

    inet_down: Mbit/s; days_left: until the host takes it back; min_bid: $/h, of interruptible ones
    """

    id: int
    machine_id: int
    gpu_name: str
    n_gpus: int
    rates: Rates
    reliability: float
    inet_down: float
    days_left: float
    min_bid: float
    place: str

    @classmethod
    def of_row(cls, row: dict, *, disk_gb: float, interruptible: bool) -> "Offer":
        """Raises BadAnswer for a row without its price or names."""
        try:
            disk = float(row["storage_cost"]) * disk_gb / MONTH_HOURS
            min_bid = float(row.get("min_bid") or 0.0)
            gpu = min_bid if interruptible else float(row["dph_total"]) - disk
            rates = Rates(
                max(gpu, 0.0), disk, float(row["inet_up_cost"]), float(row["inet_down_cost"])
            )
            return cls(
                id=int(row["id"]),
                machine_id=int(row["machine_id"]),
                gpu_name=str(row["gpu_name"]),
                n_gpus=int(row["num_gpus"]),
                rates=rates,
                reliability=float(row.get("reliability2") or row.get("reliability") or 0.0),
                inet_down=float(row.get("inet_down") or 0.0),
                days_left=float(row.get("duration") or 0.0) / 86400,
                min_bid=min_bid,
                place=str(row.get("geolocation") or ""),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnswer(f"an offer without {error}") from None


@dataclass(frozen=True)
class Instance:
    """A rented machine, as the service lists it.

    status: actual_status (loading, running, stopped, ...); wanted: intended_status
    endpoints: (host, port) of its ssh, the direct one first, then the proxy
    dph_total: $/h as billed now, disk included; started: epoch seconds of the contract
    """

    id: int
    label: Label | None
    status: str
    wanted: str
    message: str
    machine_id: int
    gpu_name: str
    endpoints: tuple[tuple[str, int], ...]
    dph_total: float
    is_bid: bool
    started: float
    gpu_util: float

    @classmethod
    def of_row(cls, row: dict) -> "Instance":
        """Nulls stand for what is not known yet. Raises BadAnswer for a row without an id."""
        try:
            return cls(
                id=int(row["id"]),
                label=Label.parse(row.get("label")),
                status=row.get("actual_status") or "created",
                wanted=row.get("intended_status") or "running",
                message=(row.get("status_msg") or "").strip(),
                machine_id=int(row.get("machine_id") or 0),
                gpu_name=row.get("gpu_name") or "?",
                endpoints=_endpoints(row),
                dph_total=float(row.get("dph_total") or 0.0),
                is_bid=bool(row.get("is_bid")),
                started=float(row.get("start_date") or 0.0),
                gpu_util=float(row.get("gpu_util") or 0.0),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadAnswer(f"an instance without {error}") from None


def _endpoints(row: dict) -> tuple[tuple[str, int], ...]:
    """Direct first: the proxy is slow. Neither is known before the instance runs."""
    found = []
    mapped = (row.get("ports") or {}).get("22/tcp") or []
    if row.get("public_ipaddr") and mapped:
        found.append((row["public_ipaddr"].strip(), int(mapped[0]["HostPort"])))
    if row.get("ssh_host") and row.get("ssh_port"):
        found.append((row["ssh_host"].strip(), int(row["ssh_port"])))
    return tuple(dict.fromkeys(found))
