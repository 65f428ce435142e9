"""The lab's market: offers, contracts, and what happens to them. No HTTP here."""

import contextlib
import threading
import time
from pathlib import Path

from vast_behaviour import Behaviour, Choice, Clockwork
from vast_instance import Sandbox
from vast_ledger import Ledger
from vast_rental import Rental
from vast_rows import instance_row, new_offer


class Refused(Exception):
    """The service says no: (HTTP status, error, msg)."""

    def __init__(self, status: int, error: str, msg: str):
        super().__init__(msg)
        self.status, self.error, self.msg = status, error, msg


class Market:
    """Offers and contracts. `lock` guards the books; a rental's box_lock guards its processes."""

    def __init__(self, root: Path, ledger: Ledger, *, namespaces: bool, url: str, keep_files: bool,
                 sandboxes: bool):  # fmt: skip
        self.root, self.ledger, self.url = root, ledger, url
        self.namespaces, self.keep_files, self.sandboxes = namespaces, keep_files, sandboxes
        self.lock, self.clock = threading.RLock(), Clockwork()
        self.offers: dict[int, dict] = {}
        self.rentals: dict[int, Rental] = {}  # ever created
        self.choices: list[Choice] = []
        self.default: dict = {}
        self.account_keys: list[str] = []
        self.next_number = 1000

    # --- what a test arranges ---

    def add_offer(self, **fields) -> dict:
        number = fields.pop("id", 1 + max(self.offers, default=100))
        with self.lock:
            Behaviour.of(fields.get("behaviour"))
            self.offers[number] = new_offer(number, **fields)
            return self.offers[number]

    def find(self, number: int) -> Rental:
        """A living contract, or 404."""
        with self.lock:
            rental = self.rentals.get(number)
            if rental is None or rental.gone:
                raise Refused(404, "no_such_instance", f"Instance {number} not found.")
            return rental

    def rows(self) -> list[dict]:
        now = time.time()
        with self.lock:
            return [instance_row(r, now) for r in self.rentals.values() if r.listed(now)]

    def sold(self, offer: int) -> int:
        """How many living contracts are on the offer."""
        return sum(r.offer["id"] == offer for r in self.rentals.values() if not r.gone)

    def shown_offers(self) -> list[dict]:
        """Every offer; rentable only while it is not sold out."""
        with self.lock:
            return [
                offer | {"rentable": offer["rentable"] and self.sold(number) < offer["sales"]}
                for number, offer in self.offers.items()
            ]

    # --- a contract's life ---

    def create(self, offer_number: int, request: dict) -> Rental:
        """Buys: the contract exists, and costs, from here on."""
        with self.lock:
            offer = self.offers.get(offer_number)
            sold = self.sold(offer_number)
            if offer is None or not offer["rentable"] or sold >= offer["sales"]:
                msg = f"no_such_ask Instance type by id {offer_number} is not available."
                raise Refused(404, "no_such_ask", f"error 404/3603: {msg}")
            if offer["refuses"]:
                msg = f"no_such_ask Instance type {offer_number} is no longer available."
                raise Refused(offer["refuses"], "no_such_ask", f"error 410/3907: {msg}")
            price, waits = request.get("price"), False
            if price is not None and price < offer["min_bid"]:
                if request.get("cancel_unavail"):
                    raise Refused(410, "no_such_ask", f"error 410/3907: no_such_ask {offer_number}")
                waits = True
            number = self.next_number = self.next_number + 1
            chosen = next((c.behaviour for c in self.choices if
                           c.takes(request.get("label"), offer_number)), None)  # fmt: skip
            fate = Behaviour.of(self.default, offer["behaviour"], chosen)
            if sold and offer["second_stuck"]:
                fate = Behaviour.of(self.default, {"stuck": "loading"})
            rental = Rental(number, dict(offer), request, fate)
            rental.contract_state = "stopped" if waits else "running"
            self.rentals[number] = rental
            self.ledger.open(number, offer, rental.label, rental.disk_gb, rental.gpu_per_h)
            if fate.vanishes_after_s is not None:
                self.clock.after(fate.vanishes_after_s, self.end, rental, "vanished")
            if fate.ends_after_s is not None:
                self.clock.after(fate.ends_after_s, self.stop, rental)
            if fate.stuck != "created" and not waits:
                self._later(rental, fate.provision_s, self._load, fate.load_s)
        return rental

    def _later(self, rental: Rental, seconds: float, step, *args) -> None:
        """Runs step(rental, *args) unless something else happens to the rental first."""
        turn = rental.turn

        def run() -> None:
            with self.lock:
                current = rental.turn == turn and not rental.gone
            if current:
                step(rental, *args)

        self.clock.after(seconds, run)

    def _set(self, rental: Rental, status: str, *, turn: bool = False) -> None:
        with self.lock:
            rental.turn += turn
            rental.status, rental.since = status, time.time()
            if not rental.gone:
                self.ledger.mark(rental.number, status, rental.gpu_per_h)

    def _load(self, rental: Rental, seconds: float) -> None:
        self._set(rental, "loading")
        if rental.fate.stuck != "loading":
            self._later(rental, seconds, self._run)

    def _run(self, rental: Rental) -> None:
        """The container starts: sshd, and the onstart script once more."""
        turn, fate = rental.turn, rental.fate
        with rental.box_lock:
            if rental.gone or rental.turn != turn:
                return
            if self.sandboxes:
                self._start_box(rental)
            with self.lock:
                if rental.gone or rental.turn != turn:  # ended meanwhile
                    self._stop_box(rental)
                    return
                self._set(rental, "running")
        rental.starts += 1
        if fate.ssh_after_s and fate.ssh == "ok":
            self._later(rental, fate.ssh_after_s, self.order, {"ssh": "ok"})
        if rental.starts > 1:
            return
        if fate.turns:
            self._later(rental, fate.turns_after_s, self.turn, fate.turns)
        if fate.outbid_after_s is not None:
            self._later(rental, fate.outbid_after_s, self.outbid)

    def _start_box(self, rental: Rental) -> None:
        fate = rental.fate
        if rental.box is None:
            rental.box = Sandbox(self.root, rental.number, namespaces=self.namespaces,
                                 disk_mb=fate.disk_mb, clock_skew_s=fate.clock_skew_s)  # fmt: skip
        self.refresh_keys(rental)
        number = str(rental.number)
        env = {k: str(v) for k, v in rental.env.items() if not k.startswith("-")} | {
            "CONTAINER_ID": number, "CONTAINER_API_KEY": rental.key, "VAST_URL": self.url,
            "VAST_CONTAINERLABEL": f"C.{number}", "PUBLIC_IPADDR": "127.0.0.1",
            "GPU_COUNT": str(rental.offer["num_gpus"]),
            "SSH_PUBLIC_KEY": "\n".join(key.strip() for key in self.account_keys),
        }  # fmt: skip
        rental.box.port = 0 if fate.new_port else rental.box.port
        rental.port = rental.box.start(
            rental.request.get("onstart"), env, ssh="refused" if fate.ssh_after_s else fate.ssh,
            cuts=fate.cut_after_bytes, host_key_after=fate.host_key_after,
        )  # fmt: skip

    def _stop_box(self, rental: Rental) -> None:
        with rental.box_lock:
            if rental.box:
                rental.box.stop()
                self.measure(rental)

    def measure(self, rental: Rental) -> None:
        """Puts the traffic of its ssh connections on the bill."""
        with rental.box_lock, contextlib.suppress(BrokenPipeError):
            if rental.box:
                self.ledger.accounts[rental.number].ssh_bytes = rental.box.traffic()

    def refresh_keys(self, rental: Rental) -> None:
        """Writes the keys that may log in: attached ones, and the account's unless barred."""
        account = self.account_keys if rental.fate.account_keys else []
        with rental.box_lock:
            if rental.box:
                rental.box.authorize(list(dict.fromkeys(account + rental.keys)))

    def order(self, rental: Rental, what: dict) -> None:
        """Passes an order to the instance's supervisor, if it runs."""
        with rental.box_lock, contextlib.suppress(BrokenPipeError):
            if rental.box and rental.box.running:
                rental.port = rental.box.order(**what)

    # --- what happens to it ---

    def stop(self, rental: Rental, status: str = "stopped", intended: str = "stopped") -> None:
        """All processes die; the disk stays, and costs."""
        with self.lock:
            if rental.gone:
                return
            rental.intended, rental.contract_state = intended, "stopped"
            self._set(rental, status, turn=True)
        self._stop_box(rental)

    def start(self, rental: Rental) -> None:
        """A stopped container starts again, unless its GPU has gone to somebody else."""
        with self.lock:
            rental.intended = "running"
            runs = rental.contract_state == "running" and rental.status != "exited"
            if rental.gone or runs or rental.fate.start_refused:
                return
            rental.contract_state, rental.turn = "running", rental.turn + 1
            self._load(rental, rental.fate.restart_s)

    def proceed(self, rental: Rental) -> None:
        """Whatever it is waiting for or stuck in, it starts now."""
        with self.lock:
            rental.turn += 1
            self._later(rental, 0, self._run)

    def outbid(self, rental: Rental) -> None:
        """Somebody pays more: stopped without notice; the wish to run stands."""
        with self.lock:
            price = max(rental.offer["min_bid"], 1.25 * rental.gpu_per_h)
            rental.offer["min_bid"] = self.offers[rental.offer["id"]]["min_bid"] = price
        self.stop(rental, intended="running")
        if rental.fate.returns_after_s is not None:
            self._later(rental, rental.fate.returns_after_s, self.start)

    def change_bid(self, rental: Rental, price: float) -> None:
        with self.lock:
            rental.bid = rental.gpu_per_h = price
            self.ledger.mark(rental.number, rental.status or "created", price)
            if rental.contract_state == "stopped" and rental.intended == "running" and (
                price >= rental.offer["min_bid"]
            ):  # fmt: skip
                self.start(rental)

    def turn(self, rental: Rental, status: str) -> None:
        """exited: the container's processes are gone. offline, unknown: unreachable, not dead."""
        self._set(rental, status)
        if status == "exited":
            self._stop_box(rental)
            return
        self.order(rental, {"ssh": "hang", "cut": True})
        if rental.fate.recovers_after_s is not None:
            self._later(rental, rental.fate.recovers_after_s, self.recover)

    def recover(self, rental: Rental) -> None:
        self.order(rental, {"ssh": rental.fate.ssh})
        self._set(rental, rental.contract_state)

    def end(self, rental: Rental, how: str) -> None:
        """The contract is over: nothing of it lives or costs any more."""
        with self.lock:
            if rental.gone:
                return
            rental.gone, rental.turn, rental.ended = True, rental.turn + 1, time.time()
            rental.contract_state = "unloaded"
            self.ledger.close(rental.number, how)
        with rental.box_lock:
            if rental.box:
                self._stop_box(rental)
                rental.box.remove(keep_files=self.keep_files)

    def shut(self) -> None:
        """Ends the lab: every process, every mount."""
        self.clock.stop()
        for rental in self.rentals.values():
            with rental.box_lock:
                if rental.box and not rental.gone:
                    rental.box.remove(keep_files=True)
