"""The documented REST endpoints of vast.ai that the lab speaks, on top of vast_market.Market."""

import hashlib
import itertools
import re
import time
from dataclasses import dataclass, field

from vast_market import Market, Refused
from vast_query import BadQuery, json_value, matches, ordered, page_of
from vast_rows import INSTANCE_SEARCHABLE, SEARCHABLE, charge_row, priced

CONTROL = {"order", "type", "limit", "allocated_storage", "disable_bundling"}  # no filters
KINDS = {"on-demand": "on-demand", "ondemand": "on-demand", "reserved": "reserved", "bid": "bid",
         "interruptible": "bid"}  # fmt: skip
OWN = {"manage", "destroy"}  # what an instance's key may do, to that instance only
MIN_PRICE, MAX_PRICE, MAX_BID = 0.001, 128.0, 32.0  # $/hour; the last is per GPU
MIN_DISK_GB, MAX_LABEL, MAX_ONSTART, MAX_ENV, MAX_ALL_ENV = 8, 256, 4096, 256, 32768


@dataclass
class Request:
    """One call as the handlers see it."""

    method: str
    path: str
    query: dict[str, str]
    body: dict
    caller: str  # "account" or "instance"
    own: int | None = None  # the instance whose key it is
    key: str | None = None
    ids: tuple[int, ...] = ()


@dataclass
class Settings:
    """What the documents leave open, or an account may have one way or the other."""

    absent: str = "null"  # show of an unknown id: "null" or "404"
    credit: float = 5.0  # $ on the account before the first instance
    team: bool = False  # a team account: keys cannot be added to it
    logs_ready_s: float = 0.0  # until the result URL of logs has something
    search_quota: int | None = None  # so many searches, then 429 search_quota_exceeded


@dataclass
class Api:
    """Handlers return the answer's body, or raise Refused or BadQuery."""

    market: Market
    settings: Settings
    ssh_keys: dict[int, dict] = field(default_factory=dict)
    files: dict[str, tuple[float, str]] = field(default_factory=dict)  # result URLs: (ready, text)
    searches: int = 0

    def __post_init__(self):
        self.numbers = itertools.count(1)

    # --- offers ---

    def search(self, request: Request) -> dict:
        body = request.body
        self.searches += 1
        quota = self.settings.search_quota
        if quota is not None and self.searches > quota:
            raise Refused(429, "search_quota_exceeded", "Daily search quota exceeded")
        kind = KINDS.get(body.get("type", "on-demand"))
        if kind is None:
            raise BadQuery(f"type={body['type']!r} is not known")
        filters = {k: v for k, v in body.items() if k not in CONTROL}
        storage = float(body.get("allocated_storage", MIN_DISK_GB))
        rows = [priced(offer, storage, kind) for offer in self.market.shown_offers()]
        found = [row for row in rows if matches(row, filters, SEARCHABLE)]
        order = [(name, direction) for name, direction in body.get("order") or []]
        return {"offers": ordered(found, order)[: body.get("limit") or None]}

    def create(self, request: Request) -> dict:
        body = request.body
        self._check_create(body)
        rental = self.market.create(request.ids[0], body)
        return {"success": True, "new_contract": rental.number, "instance_api_key": rental.key}

    def _check_create(self, body: dict) -> None:
        """The documented limits of a create request."""
        env, label = body.get("env") or {}, body.get("label") or ""
        onstart, args = body.get("onstart") or "", body.get("args") or []
        sizes = [len(str(value)) for value in env.values()] if isinstance(env, dict) else []
        price, disk = body.get("price"), body.get("disk")
        problems = {
            "'image' is required": not (body.get("image") or body.get("template_hash_id")),
            "env must be a dict": not isinstance(env, dict),
            "label too long": len(label) > MAX_LABEL,
            "onstart and args too long": len(onstart) + len("".join(args)) > MAX_ONSTART,
            "env too long": max(sizes, default=0) > MAX_ENV or sum(sizes) > MAX_ALL_ENV,
            "disk is smaller than 8 GB": disk is not None and disk < MIN_DISK_GB,
        }
        for problem, there in problems.items():
            if there:
                raise Refused(400, "invalid_args", f"error 400/3467: Invalid args: {problem}")
        if price is not None and not MIN_PRICE <= price <= MAX_PRICE:
            raise Refused(400, "invalid_price", f"price {price} is out of range")

    # --- instances ---

    def list(self, request: Request) -> dict:
        rows = self.market.rows()
        found, page, token = page_of(rows, request.query, INSTANCE_SEARCHABLE)
        labels = [row["label"] or "" for row in found]
        if columns := request.query.get("select_cols"):
            names = json_value(columns)
            page = page if "*" in names else [{n: row.get(n) for n in names} for row in page]
        return {
            "success": True, "instances_found": len(page), "total_instances": len(found),
            "label_counts": {label: labels.count(label) for label in labels},
            "next_token": token, "instances": page,
        }  # fmt: skip

    def old_list(self, request: Request) -> dict:
        msg = "/api/v0/instances/ is deprecated. Use /api/v1/instances/ instead."
        raise Refused(410, "deprecated_endpoint", msg)

    def show(self, request: Request) -> dict:
        row = next((r for r in self.market.rows() if r["id"] == request.ids[0]), None)
        if row is None and self.settings.absent == "404":
            raise Refused(404, "no_such_instance", f"Instance {request.ids[0]} not found.")
        return {"instances": row}

    def manage(self, request: Request) -> dict:
        rental, body = self.market.find(request.ids[0]), request.body
        if "label" in body:
            if request.caller != "account":
                raise Refused(403, "not_authorized", "This key may not label.")
            if len(body["label"] or "") > 1024:
                raise Refused(400, "label_too_long", "Please limit label length to 1024 characters")
            rental.label = self.market.ledger.accounts[rental.number].label = body["label"]
        if "state" in body:
            if body["state"] not in ("running", "stopped"):
                raise Refused(400, "invalid_args", f"state={body['state']!r} is not known")
            (self.market.start if body["state"] == "running" else self.market.stop)(rental)
        return {"success": True}

    def destroy(self, request: Request) -> dict:
        try:
            rental = self.market.find(request.ids[0])
        except Refused as error:
            raise Refused(404, "not_found", "Instance not found") from error
        self.market.end(rental, "destroyed" if request.caller == "account" else "by itself")
        return {"success": True}

    def destroy_many(self, request: Request) -> dict:
        for number in request.body.get("instance_ids") or []:
            self.market.end(self.market.find(number), "destroyed")
        return {"success": True}

    def bid(self, request: Request) -> dict:
        rental, price = self.market.find(request.ids[0]), request.body.get("price")
        highest = MAX_BID * rental.offer["num_gpus"]
        if rental.bid is None or price is None or not MIN_PRICE <= price <= highest:
            raise Refused(400, "invalid_args", "Please set a bid price >= 0.001.")
        self.market.change_bid(rental, price)
        return {"success": True}

    def logs(self, request: Request) -> dict:
        rental, body = self.market.find(request.ids[0]), request.body
        text = rental.box.logs(body.get("daemon_logs") == "true") if rental.box else ""
        lines = [x for x in text.splitlines() if re.search(body.get("filter") or "", x)]
        text = "".join(x + "\n" for x in lines[-int(body.get("tail") or 1000) :])
        name = hashlib.sha256(f"{rental.number}{next(self.numbers)}".encode()).hexdigest()
        self.files[name] = time.monotonic() + self.settings.logs_ready_s, text
        url = f"{self.market.url}/instance_logs/{name}.log"
        return {"success": True, "result_url": url, "msg": "Log is being uploaded."}

    # --- keys, account, money ---

    def attach(self, request: Request) -> dict:
        rental = self.market.find(request.ids[0])
        rental.keys.append(self._public_key(request))
        self.market.refresh_keys(rental)
        return {"success": True, "msg": "SSH key attached successfully"}

    def ssh_keys_of(self, request: Request) -> list:
        return list(self.ssh_keys.values())

    def add_ssh_key(self, request: Request) -> dict:
        if self.settings.team:
            raise Refused(400, "team_ssh_keys_not_supported", "Team accounts have no SSH keys")
        number, key = next(self.numbers), self._public_key(request)
        row = {"id": number, "user_id": 1, "public_key": key, "created_at": "2026-01-01T00:00:00Z",
               "deleted_at": None}  # fmt: skip
        self.ssh_keys[number] = row
        self.market.account_keys.append(key)  # of instances to come only, as documented
        return {"success": True, "key": row}

    def _public_key(self, request: Request) -> str:
        key = request.body.get("ssh_key") or ""
        if not re.match(r"(ssh|ecdsa|sk)-\S+ \S+", key):
            raise Refused(400, "no_ssh_key", "No ssh key provided")
        return key

    def user(self, request: Request) -> dict:
        left = self.settings.credit - self.market.ledger.total()
        keys = "\n".join(self.market.account_keys)
        return {"id": 1, "key_id": 1, "email": "lab@localhost", "username": "lab", "balance": 0.0,
                "credit": left, "ssh_key": keys, "sid": "lab", "api_key": "hidden"}  # fmt: skip

    def charges(self, request: Request) -> dict:
        filters = json_value(request.query.get("select_filters") or "{}")
        day = filters.get("day") or {}
        if "gte" not in day or "lte" not in day:
            msg = "Must provide both 'day' gte and lte filters for instance charges"
            raise BadQuery(msg)
        now = time.time()
        rows = [charge_row(entry, now) for entry in self.market.ledger.entries()]
        rows = [r for r in rows if r["end"] >= day["gte"] and r["start"] <= day["lte"]]
        if "instance" not in (filters.get("type") or {}).get("in", ["instance"]):
            rows = []
        limit, start = min(int(request.query.get("limit") or 100), 500), 0
        if token := request.query.get("after_token"):
            start = int(token)
        after = start + limit if start + limit < len(rows) else None
        return {"success": True, "count": len(rows[start : start + limit]), "total": len(rows),
                "next_token": None if after is None else str(after),
                "results": rows[start : start + limit]}  # fmt: skip

    def increases(self, request: Request) -> dict:
        return {"success": True, "count": 0, "truncated": False, "pending_price_increases": []}


@dataclass(frozen=True)
class Route:
    """An endpoint: its handler's name, the permission it needs, its documented rate limit."""

    method: str
    path: str
    name: str
    permission: str
    interval_s: float = 0.0  # least time between two requests of one key
    penalty_s: float = 0.0  # wait after a violation
    burst: int = 1  # so many requests may fall in one interval

    def ids(self, method: str, path: str) -> tuple[int, ...] | None:
        match = re.fullmatch(self.path, path) if method == self.method else None
        return tuple(int(n) for n in match.groups()) if match else None


ROUTES = [
    Route("POST", r"/api/v0/bundles/?", "search", "misc", 60.0, 0.0, 10),
    Route("PUT", r"/api/v0/asks/(\d+)/?", "create", "instance_write", 4.5, 12.0),
    Route("GET", r"/api/v1/instances/?", "list", "instance_read", 1.0),
    Route("GET", r"/api/v0/instances/?", "old_list", "instance_read"),
    Route("GET", r"/api/v0/instances/(\d+)/?", "show", "instance_read", 2.0),
    Route("PUT", r"/api/v0/instances/(\d+)/?", "manage", "instance_write", 1.0),
    Route("DELETE", r"/api/v0/instances/(\d+)/?", "destroy", "instance_write", 3.0),
    Route("DELETE", r"/api/v0/instances/?", "destroy_many", "instance_write", 3.0),
    Route("PUT", r"/api/v0/instances/bid_price/(\d+)/?", "bid", "instance_write", 5.5),
    Route("PUT", r"/api/v0/instances/request_logs/(\d+)/?", "logs", "instance_read"),
    Route("POST", r"/api/v0/instances/(\d+)/ssh/?", "attach", "instance_write"),
    Route("GET", r"/api/v0/instances/pending-price-increases/?", "increases", "instance_read"),
    Route("GET", r"/api/v0/ssh/?", "ssh_keys_of", "user_read", 1.0),
    Route("POST", r"/api/v0/ssh/?", "add_ssh_key", "user_write", 1.0),
    Route("GET", r"/api/v0/users/current/?", "user", "user_read"),
    Route("GET", r"/api/v0/charges/?", "charges", "billing_read", 1.0),
]


def route_of(method: str, path: str) -> tuple[Route, tuple[int, ...]] | None:
    for route in ROUTES:
        if (ids := route.ids(method, path)) is not None:
            return route, ids
    return None
