"""The lab's market: offers, contracts, what happens to them and what they cost. No HTTP here."""

import contextlib
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from builders.vast.instance import Sandbox

HOUR, GB = 3600.0, 1e9
MONTH_HOURS = 720.0  # 30 days: the documents' sample rows divide $/GB/month by this
GPU_BILLED = {"running", "unknown"}  # unknown may still be running; loading: documents disagree
DEAD_PORT = 1  # nobody listens there

# An offer as a test may leave it; everything that a query may name is here. MB, seconds, $/hour.
OFFER = {
    "cuda_max_good": 12.8, "direct_port_count": 100, "disk_space": 500.0, "dph_base": 0.36,
    "duration": 30 * 86400.0, "external": None, "geolocation": "Quebec, CA", "gpu_name": "RTX 4090",
    "gpu_ram": 24564, "inet_down": 800.0, "inet_down_cost": 0.003, "inet_up_cost": 0.004,
    "min_bid": 0.18, "num_gpus": 1, "reliability": 0.995, "reliability2": 0.995, "rentable": True,
    "rented": False, "storage_cost": 0.15, "verified": True,
    "sales": 1,  # the lab's own: how many contracts may be on it at once
}  # fmt: skip


@dataclass(frozen=True)
class Behaviour:
    """Fate of an instance. Times are real seconds; None is never."""

    provision_s: float = 0.0  # actual_status null
    load_s: float = 0.0  # loading, after that
    stuck: str | None = None  # "created" or "loading": never gets further
    turns: str | None = None  # "exited", "offline" or "unknown" ...
    turns_after_s: float = 0.0  # ... so long after it ran
    recovers_after_s: float | None = None  # from offline or unknown, at another port
    outbid_after_s: float | None = None  # after it ran: all killed, stopped
    vanishes_after_s: float | None = None  # after creation: row, processes and files gone
    price_factor: float = 1.0  # the created instance's GPU price over the offer's
    listed_after_s: float = 0.0  # after creation: absent from lists and show until then
    lingers_s: float = 0.0  # after its end: still listed, though it costs nothing any more
    label_after_s: float = 0.0  # after creation: label null until then
    direct: bool = True  # False: nobody listens at its own port, only at the proxy's
    ssh: str = "ok"  # or "refused", "silent" (accepts, says nothing)
    host_key_after: int | None = None  # another host key after so many connections
    cut_after_bytes: tuple[int, ...] = ()  # connections break after so many, one after the other
    disk_mb: float | None = None  # HOME is a file system of this size (needs root)
    clock_skew_s: float = 0.0  # the instance's `date` is wrong by this


def named(known: set[str], given: dict) -> dict:
    """Raises ValueError for a name that is not known: a fault that is misspelt tests nothing."""
    if unknown := given.keys() - known:
        raise ValueError(f"the lab knows no {', '.join(sorted(unknown))}")
    return given


class Refused(Exception):
    """The service says no: (HTTP status, error, msg)."""

    def __init__(self, status: int, error: str, msg: str):
        super().__init__(msg)
        self.status, self.error, self.msg = status, error, msg


class Contract:
    """One contract, from creation to its end, with its bill."""

    def __init__(self, number: int, offer: dict, request: dict, fate: Behaviour):
        self.number, self.offer, self.request, self.fate = number, offer, request, fate
        self.created, self.key = time.time(), secrets.token_hex(32)
        self.bid, self.disk_gb = request.get("price"), float(request.get("disk") or 8)
        self.gpu_per_h = (self.bid or offer["dph_base"]) * fate.price_factor
        self.disk_per_h = offer["storage_cost"] * self.disk_gb / MONTH_HOURS
        self.status: str | None = None
        self.marks = [(self.created, "created")]  # since when in which status
        self.ended: float | None = None
        self.how: str | None = None  # destroyed, destroyed by itself, vanished
        self.keys: list[str] = []  # that may log in
        self.turn = 0  # counts what happened to it: timers of earlier turns are void
        self.box: Sandbox | None = None
        self.bytes = (0, 0)  # of ssh, into and out of the instance
        self.lock = threading.RLock()  # of the box

    @property
    def port(self) -> int | None:
        return self.box.port if self.box else None

    def listed(self, now: float) -> bool:
        """Whether lists show it: late after creation, or still after the end, if so ordered."""
        if self.ended:
            return now < self.ended + self.fate.lingers_s
        return now >= self.created + self.fate.listed_after_s

    def mark(self, status: str) -> None:
        """It is in this status from now on."""
        self.status = status
        self.marks.append((time.time(), status))

    def entry(self, now: float) -> dict:
        """Its row of the ledger: GPU while running, disk all the time, traffic both ways."""
        end = self.ended or now
        stops = [t for t, _ in self.marks[1:]] + [end]
        spans = zip(self.marks, stops, strict=True)
        ran = sum(stop - start for (start, status), stop in spans if status in GPU_BILLED)
        bill = {
            "gpu": ran / HOUR * self.gpu_per_h,
            "disk": (end - self.created) / HOUR * self.disk_per_h,
            "down": self.bytes[0] / GB * self.offer["inet_down_cost"],
            "up": self.bytes[1] / GB * self.offer["inet_up_cost"],
        }
        return bill | {
            "id": self.number, "offer": self.offer["id"], "label": self.request.get("label"),
            "created": self.created, "ended": self.ended, "how": self.how, "bytes": self.bytes,
            "states": [status for _, status in self.marks], "total": sum(bill.values()),
        }  # fmt: skip


class Market:
    """Offers and contracts. `lock` guards the books; a contract's lock guards its processes.

    sandboxes: False: instances without files and processes
    """

    def __init__(self, root: Path, url: str, *, sandboxes: bool):
        self.root, self.url, self.sandboxes = root, url, sandboxes
        self.lock, self.open = threading.RLock(), True
        self.offers: dict[int, dict] = {}
        self.contracts: dict[int, Contract] = {}  # ever created
        self.choices: list[dict] = []  # fates of instances to come
        self.number = 1000 + 100 * secrets.randbelow(9000)  # two labs share one /dev/shm
        self.timers: list[threading.Timer] = []
        self.errors: list[str] = []  # of the lab itself

    # --- what a test arranges ---

    def add_offer(self, **given) -> dict:
        """An offer, of OFFER's fields; machine_id is chosen if it is not given."""
        number = 101 + len(self.offers)
        named({"machine_id", *OFFER}, given)
        self.offers[number] = {"id": number, "machine_id": 10_000 + number, **OFFER, **given}
        return self.offers[number]

    def behave(self, *, skip: int = 0, times: int | None = None, **fate) -> None:
        """Fate of the next instances but for the first few; the latest order wins."""
        named({field.name for field in fields(Behaviour)}, fate)
        self.choices.insert(0, {"skip": skip, "times": times, "fate": fate})

    def _fate(self) -> Behaviour:
        for choice in self.choices:
            if choice["skip"]:
                choice["skip"] -= 1
            elif choice["times"] != 0:
                choice["times"] = choice["times"] and choice["times"] - 1
                return Behaviour(**choice["fate"])
        return Behaviour()

    # --- what the API asks ---

    def find(self, number: int) -> Contract:
        """A living contract, or 404."""
        with self.lock:
            contract = self.contracts.get(number)
            if contract is None or contract.ended:
                raise Refused(404, "no_such_instance", f"Instance {number} not found.")
            return contract

    def listed(self) -> list[Contract]:
        now = time.time()
        with self.lock:
            return [c for c in self.contracts.values() if c.listed(now)]

    def on_sale(self, number: int) -> bool:
        """Whether the offer is there and not sold out."""
        with self.lock:
            living = [c for c in self.contracts.values() if not c.ended]
            sold = sum(c.offer["id"] == number for c in living)
            return number in self.offers and sold < self.offers[number]["sales"]

    # --- a contract's life ---

    def create(self, offer_number: int, request: dict) -> Contract:
        """Buys: the contract exists, and costs, from here on."""
        with self.lock:
            if not self.on_sale(offer_number):
                msg = f"error 404/3603: no_such_ask Instance type by id {offer_number} is not there"
                raise Refused(404, "no_such_ask", msg)
            offer, price = self.offers[offer_number], request.get("price")
            if price is not None and price < offer["min_bid"]:
                raise Refused(410, "no_such_ask", f"error 410/3907: no_such_ask {offer_number}")
            self.number += 1
            contract = Contract(self.number, offer, request, self._fate())
            self.contracts[self.number] = contract
        fate = contract.fate
        if fate.vanishes_after_s is not None:
            self._after(fate.vanishes_after_s, self.end, contract, "vanished")
        if fate.stuck != "created":
            self._later(contract, fate.provision_s, self._load)
        return contract

    def _after(self, seconds: float, step: Callable, *args) -> None:
        """Runs the step in a thread of its own; what goes wrong there is the lab's fault."""

        def run() -> None:
            try:
                if self.open:
                    step(*args)
            except Exception:  # not lost with the thread: the lab's end reports it
                self.errors.append(traceback.format_exc())

        timer = threading.Timer(seconds, run)
        timer.daemon = True
        self.timers.append(timer)
        timer.start()

    def _later(self, contract: Contract, seconds: float, step: Callable, *args) -> None:
        """Runs step(contract, *args) unless something else happens to the contract first."""
        turn = contract.turn

        def run() -> None:
            if contract.turn == turn and not contract.ended:
                step(contract, *args)

        self._after(seconds, run)

    def _load(self, contract: Contract) -> None:
        contract.mark("loading")
        if contract.fate.stuck != "loading":
            self._later(contract, contract.fate.load_s, self._run)

    def _run(self, contract: Contract) -> None:
        """The container starts: sshd, and the onstart script."""
        fate, turn = contract.fate, contract.turn
        with contract.lock:
            if contract.ended or contract.turn != turn:
                return
            if self.sandboxes:
                self._start_box(contract)
            contract.mark("running")
        if fate.turns:
            self._later(contract, fate.turns_after_s, self.turn, fate.turns)
        if fate.outbid_after_s is not None:
            self._later(contract, fate.outbid_after_s, self.outbid)

    def _start_box(self, contract: Contract) -> None:
        fate = contract.fate
        contract.box = Sandbox(
            self.root / f"i{contract.number}", disk_mb=fate.disk_mb, clock_skew_s=fate.clock_skew_s
        )
        contract.box.authorize(contract.keys)
        env = {"CONTAINER_ID": str(contract.number), "CONTAINER_API_KEY": contract.key,
               "VAST_URL": self.url}  # fmt: skip
        contract.box.start(
            contract.request.get("onstart") or "", env, ssh=fate.ssh,
            cuts=fate.cut_after_bytes, host_key_after=fate.host_key_after,
        )  # fmt: skip

    def attach(self, contract: Contract, key: str) -> None:
        """Lets the public key in."""
        with contract.lock:
            contract.keys.append(key)
            if contract.box:
                contract.box.authorize(contract.keys)

    def measure(self, contract: Contract) -> None:
        """Puts the traffic of its ssh connections on the bill."""
        with contract.lock, contextlib.suppress(BrokenPipeError):
            if contract.box and contract.box.running:
                contract.bytes = contract.box.traffic()

    # --- what happens to it ---

    def stop(self, contract: Contract) -> None:
        """All processes die; the disk stays, and costs."""
        contract.turn += 1
        contract.mark("stopped")
        self._stop_box(contract)

    def outbid(self, contract: Contract) -> None:
        """Somebody bids more: stopped without notice."""
        contract.offer["min_bid"] = 1.25 * contract.gpu_per_h
        self.stop(contract)

    def _stop_box(self, contract: Contract) -> None:
        with contract.lock:
            if contract.box:
                self.measure(contract)
                contract.box.stop()

    def turn(self, contract: Contract, status: str) -> None:
        """exited: the container's processes are gone. offline, unknown: unreachable, not dead."""
        contract.mark(status)
        if status == "exited":
            self._stop_box(contract)
            return
        self._order(contract, ssh="silent", cut=True)
        if contract.fate.recovers_after_s is not None:
            self._later(contract, contract.fate.recovers_after_s, self.recover)

    def recover(self, contract: Contract) -> None:
        """It is there again, at another port, as addresses change on the real service."""
        self._order(contract, ssh="ok", port=0)
        contract.mark("running")

    def _order(self, contract: Contract, **what) -> None:
        with contract.lock:
            if contract.box:
                contract.box.order(**what)

    def end(self, contract: Contract, how: str) -> None:
        """The contract is over: nothing of it lives or costs any more."""
        with self.lock:
            if contract.ended:
                return
            contract.ended, contract.how, contract.turn = time.time(), how, contract.turn + 1
        self._clear(contract)

    def _clear(self, contract: Contract) -> None:
        """Memory and mounts go; files stay, to be looked at."""
        with contract.lock:
            self._stop_box(contract)
            if contract.box:
                contract.box.unmount()
        for path in Path("/dev/shm").glob(f"*-{contract.number}"):  # which all machines here share
            path.unlink()

    def shut(self) -> None:
        """Ends the lab: every timer, every process, every mount."""
        self.open = False
        for timer in self.timers:
            timer.cancel()
        for timer in self.timers:
            timer.join(10)
        for contract in self.contracts.values():
            self._clear(contract)
