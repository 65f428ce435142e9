"""What a test can arrange and read: offers, fates, faults, the ledger, the log of requests."""

import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from vast_api import OWN, Api, Refused, Request, Route, Settings, route_of
from vast_behaviour import Behaviour, Choice
from vast_faults import Faults, Rule
from vast_instance import can_use_namespaces
from vast_ledger import GB, Ledger
from vast_market import Market
from vast_rows import new_offer


@dataclass
class Config:
    """How a lab begins."""

    api_key: str | None = None  # None: a random one
    scoped_keys: dict[str, list[str]] = field(default_factory=dict)  # key: its permissions
    namespaces: bool | None = None  # None: where the machine allows it
    sandboxes: bool = True  # False: instances without files and processes, for the API alone
    keep_files: bool = False  # destroyed instances' files stay until the lab ends
    gpu_while_loading: bool = False  # the documents disagree
    rate_limits: float = 0.0  # scale of the documented least intervals; 0: none
    offers: list[dict] = field(default_factory=list)
    behaviour: dict = field(default_factory=dict)  # of every instance, unless told otherwise
    behaviours: list[dict] = field(default_factory=list)  # arguments of Control.behave
    faults: list[dict] = field(default_factory=list)  # arguments of Control.fault
    ssh_keys: list[str] = field(default_factory=list)  # public keys of the account
    settings: dict = field(default_factory=dict)  # vast_api.Settings

    @classmethod
    def of(cls, config: dict) -> "Config":
        if unknown := set(config) - {f.name for f in fields(cls)}:
            raise ValueError(f"the lab's configuration has no {', '.join(sorted(unknown))}")
        return cls(**config)


@dataclass
class Limit:
    """When one key called one endpoint last, and until when it may not."""

    recent: deque[float]
    until: float = 0.0


class Control:
    """What a test calls; by HTTP it is POST /lab/<name> with a JSON object of arguments."""

    PUBLIC = ("add_offer", "change_offer", "behave", "fault", "clear_faults", "faults_fired", "act",
              "ledger", "total", "live", "requests", "clear_requests", "instances", "set",
              "offers", "traffic", "errors")  # fmt: skip

    def set_up(self, config: dict, root: Path, url: str) -> None:
        config = Config.of(config)
        self.api_key = config.api_key or secrets.token_hex(32)
        self.scoped_keys, self.rate_limits = config.scoped_keys, config.rate_limits
        namespaces = can_use_namespaces() if config.namespaces is None else config.namespaces
        self.book = Ledger(config.gpu_while_loading)
        self.market = Market(root, self.book, namespaces=namespaces, url=url,
                             keep_files=config.keep_files, sandboxes=config.sandboxes)  # fmt: skip
        self.market.default = config.behaviour
        Behaviour.of(config.behaviour)
        self.market.account_keys += config.ssh_keys
        self.api = Api(self.market, Settings(**config.settings))
        self.faults = Faults(config.faults)
        self.log, self.limits = [], {}
        self.gate = threading.Lock()
        for offer in config.offers:
            self.add_offer(**offer)
        for choice in config.behaviours:
            self.behave(**choice)

    # --- to arrange ---

    def add_offer(self, **fields) -> dict:
        """An offer; fields as vast_rows.OFFER and HIDDEN, id and machine_id chosen if not given."""
        return self.market.add_offer(**fields)

    def change_offer(self, id: int, **fields) -> dict:
        """Changes an offer; contracts that exist are not touched."""
        new_offer(id, **fields)  # checks the names
        with self.market.lock:
            self.market.offers[id] |= fields
            return self.market.offers[id]

    def behave(self, *, label: str = "", offer: int | None = None, skip: int = 0,
               times: int | None = None, **behaviour) -> None:  # fmt: skip
        """Fate of the next instances whose label and offer match; the latest order wins."""
        self.market.choices.insert(0, Choice(behaviour, label, offer, skip, times))

    def fault(self, **rule) -> int:
        """Spoils requests; the arguments are vast_faults.Rule's. Returns the rule's number."""
        return self.faults.add(**rule)

    def clear_faults(self) -> None:
        self.faults.clear()

    def faults_fired(self) -> list[dict]:
        return self.faults.counts()

    def set(self, **settings) -> None:
        """Changes vast_api.Settings or rate_limits."""
        self.rate_limits = settings.pop("rate_limits", self.rate_limits)
        self.api.settings = replace(self.api.settings, **settings)

    def act(self, id: int, what: str, **order) -> None:
        """Something happens to an instance now.

        run (at last), outbid, return, vanish, stop, start; exited, offline, unknown, recover;
        cut (its ssh connections break), ssh (mode=ok|refused|hang|silent), cuts (after=[bytes]),
        host_key (another from now on).
        """
        market, rental = self.market, self.market.find(id)
        if what in ("exited", "offline", "unknown"):
            market.turn(rental, what)
        elif what == "cut":
            market.order(rental, {"cut": True})
        elif what == "ssh":
            market.order(rental, {"ssh": order["mode"]})
        elif what == "cuts":
            market.order(rental, {"cuts": order["after"]})
        elif what == "host_key":
            rental.box.new_host_key()
        elif what == "vanish":
            market.end(rental, "vanished")
        elif what in ("outbid", "stop", "start", "recover"):
            getattr(market, what)(rental)
        elif what in ("run", "return"):
            (market.proceed if what == "run" else market.start)(rental)
        else:
            raise ValueError(f"act: what={what!r} is not known")

    def traffic(self, id: int, down_gb: float = 0.0, up_gb: float = 0.0) -> None:
        """Puts traffic on an instance's bill, as of pulling an image."""
        self.book.tell(id, down_gb * GB, up_gb * GB)

    # --- to read ---

    def offers(self) -> list[dict]:
        return list(self.market.offers.values())

    def ledger(self) -> list[dict]:
        """A row per instance ever created, with its cost so far."""
        for rental in list(self.market.rentals.values()):
            if not rental.gone:
                self.market.measure(rental)
        return self.book.entries()

    def total(self) -> float:
        """Dollars spent so far."""
        return sum(row["total"] for row in self.ledger())

    def live(self) -> list[int]:
        """Instances that cost something now."""
        return self.book.live()

    def requests(self) -> list[dict]:
        """Every request of the API so far: t, method, path, query, body, caller, status, fault."""
        return list(self.log)

    def clear_requests(self) -> None:
        self.log.clear()

    def errors(self) -> list[str]:
        """Tracebacks of the lab itself; a lab that has any is not to be believed."""
        return list(self.market.clock.errors)

    def instances(self) -> list[dict]:
        """What only the lab knows of each instance that lives: its folder, port, key."""
        return [
            {"id": r.number, "label": r.label, "status": r.status, "port": r.port, "key": r.key,
             "machine_id": r.offer["machine_id"], "home": str(r.box.home) if r.box else None,
             "starts": r.starts}
            for r in list(self.market.rentals.values()) if not r.gone
        ]  # fmt: skip

    # --- who may do what, and how often ---

    def caller_of(self, key: str | None) -> tuple[str, int | None]:
        """("account" | "instance" | "nobody" | "stranger", the instance whose key it is)."""
        if key is None:
            return "nobody", None
        if key == self.api_key or key in self.scoped_keys:
            return "account", None
        for rental in list(self.market.rentals.values()):
            if secrets.compare_digest(rental.key, key):
                return "instance", rental.number
        return "stranger", None

    def is_cut_off(self, number: int) -> bool:
        """Whether the instance's host has lost its connection: what it sends does not arrive."""
        return self.market.rentals[number].status == "offline"

    def allowed(self, request: Request) -> tuple[Route, tuple[int, ...]]:
        """The endpoint, or Refused: unknown, not allowed to this key, or too soon."""
        if request.caller == "nobody":
            raise Refused(403, "auth_error", "This action requires login.")
        if request.caller == "stranger":  # 404, not 401: as documented, and as seen by others
            raise Refused(404, "auth_error", "Invalid user key")
        if (found := route_of(request.method, request.path)) is None:
            raise Refused(404, "not_found", f"{request.method} {request.path} is not in the lab")
        route, ids = found
        if request.caller == "instance":
            self._check_instance(request.own, route, ids)
        elif route.permission not in self.scoped_keys.get(request.key, [route.permission]):
            raise Refused(403, "not_authorized", f"This key lacks {route.permission}")
        self._check_interval(request, route)
        return route, ids

    def _check_instance(self, own: int, route: Route, ids: tuple[int, ...]) -> None:
        """An instance's key is for that instance, as long as it exists."""
        rental = self.market.rentals[own]
        if rental.gone:
            raise Refused(404, "auth_error", "Invalid user key")
        if route.name not in OWN or ids != (own,):
            raise Refused(403, "not_authorized", "This key is for its own instance only")

    def _check_interval(self, request: Request, route: Route) -> None:
        """Too frequent requests are refused, and count too."""
        if not (self.rate_limits and route.interval_s):
            return
        now = time.monotonic() / self.rate_limits  # the lab's clock may run faster
        with self.gate:
            limit = self.limits.setdefault((route, request.key), Limit(deque(maxlen=route.burst)))
            full = len(limit.recent) == route.burst
            early = now < limit.until or (full and now < limit.recent[0] + route.interval_s)
            limit.recent.append(now)
            limit.until = now + route.penalty_s if early else limit.until
        if early:
            msg = f"API requests too frequent: endpoint threshold={route.interval_s}"
            raise Refused(429, "too_frequent", msg)

    def note(self, request: Request, raw: str, rule: Rule | None) -> dict:
        """An entry of the log; the account's key is not kept."""
        entry = {
            "t": time.time(), "method": request.method, "path": request.path, "body": raw,
            "query": {k: v for k, v in request.query.items() if k != "api_key"},
            "caller": request.caller, "own": request.own, "status": None,
            "fault": rule.action if rule else None,
        }  # fmt: skip
        self.log.append(entry)
        return entry
