"""The documented REST endpoints of vast.ai that renting uses, on top of market.Market.

Where the documents leave it open: a wrong key is 404 auth_error (as others saw it), a missing one
403; an instance's key may destroy its own instance, nothing else; an unknown instance is shown as
null; the GPU is not billed while an instance loads, is exited or offline, but while it is unknown;
requests that are refused as too frequent count as requests.
"""

import base64
import binascii
import json
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from builders.vast.market import DEAD_PORT, MONTH_HOURS, OFFER, Contract, Market, Refused

CONTROL = {"order", "type", "limit", "allocated_storage"}  # of a search, beside its filters
SEARCHABLE = {*OFFER, "id", "machine_id", "dph_total"} - {"sales"}
STORED = {
    "id",
    "label",
    "actual_status",
    "machine_id",
    "gpu_name",
    "is_bid",
}  # for filters of lists
PAGE = 25  # rows of /api/v1/instances/ at most
MIN_DISK_GB, MAX_LABEL, MAX_ONSTART = 8, 256, 4096
CREDIT = 5.0  # dollars on the account

OPERATORS: dict[str, Callable] = {
    "eq": lambda a, b: a == b or (a is None and b is False),  # external is null when false
    "gte": lambda a, b: a is not None and a >= b,
    "in": lambda a, b: a in b,
}


@dataclass
class Request:
    """One call as the handlers see it. own: the instance whose key it carries"""

    method: str
    path: str
    query: dict[str, str]
    body: dict
    caller: str  # "account", "instance", "nobody", "stranger"
    own: int | None = None
    ids: tuple[int, ...] = ()


class Api:
    """Handlers return the answer's body, or raise Refused.

    rate_limits: scale of the documented least intervals between calls; 0: none
    """

    def __init__(self, market: Market, rate_limits: float):
        self.market, self.rate_limits = market, rate_limits
        self.recent = {route: deque([-1e9], maxlen=route.burst) for route in ROUTES}
        self.until: dict[Route, float] = {}

    def answer(self, request: Request) -> dict | list:
        """Raises Refused: unknown, not allowed to this key, or too soon."""
        if request.caller == "nobody":
            raise Refused(403, "auth_error", "This action requires login.")
        if request.caller == "stranger":  # 404, not 401: as documented, and as seen by others
            raise Refused(404, "auth_error", "Invalid user key")
        for route in ROUTES:
            match = re.fullmatch(route.path, request.path)
            if match and route.method == request.method:
                request.ids = tuple(map(int, match.groups()))
                own = route.name == "destroy" and request.ids == (request.own,)
                if request.caller == "instance" and not own:
                    raise Refused(403, "not_authorized", "This key is for its own instance only")
                self._check_interval(route)
                return getattr(self, route.name)(request)
        raise Refused(404, "not_found", f"{request.method} {request.path} is not in the lab")

    def _check_interval(self, route: "Route") -> None:
        """Too frequent requests are refused, and count too."""
        if not (self.rate_limits and route.interval_s):
            return
        now, recent = time.monotonic() / self.rate_limits, self.recent[route]
        full = len(recent) == route.burst
        early = now < self.until.get(route, 0.0) or (full and now < recent[0] + route.interval_s)
        recent.append(now)
        if early:
            self.until[route] = now + route.penalty_s
            raise Refused(429, "too_frequent", "API requests too frequent: endpoint threshold")

    # --- handlers ---

    def search(self, request: Request) -> dict:
        """Offers priced for the disk that is asked for, on demand or as the lowest bid."""
        body, bid = request.body, request.body.get("type") == "bid"
        filters = {k: v for k, v in body.items() if k not in CONTROL}
        disk = float(body.get("allocated_storage", MIN_DISK_GB))
        rows = []
        for number, offer in self.market.offers.items():
            base = offer["min_bid"] if bid else offer["dph_base"]
            row = {name: value for name, value in offer.items() if name != "sales"}
            row |= {
                "dph_base": base,
                "dph_total": base + offer["storage_cost"] * disk / MONTH_HOURS,
            }
            row |= {"is_bid": bid, "rentable": self.market.on_sale(number)}
            if matches(row, filters, SEARCHABLE):
                rows.append(row)
        for name, direction in reversed(body.get("order") or []):
            rows.sort(key=lambda row, name=name: row.get(name, 0), reverse=direction == "desc")
        return {"offers": rows[: body.get("limit") or None]}

    def create(self, request: Request) -> dict:
        """A contract, within the documented limits of a request."""
        body = request.body
        problems = {
            "'image' is required": not body.get("image"),
            "label too long": len(body.get("label") or "") > MAX_LABEL,
            "onstart too long": len(body.get("onstart") or "") > MAX_ONSTART,
            "disk is smaller than 8 GB": (body.get("disk") or MIN_DISK_GB) < MIN_DISK_GB,
        }
        for problem, there in problems.items():
            if there:
                raise Refused(400, "invalid_args", f"error 400/3467: Invalid args: {problem}")
        contract = self.market.create(request.ids[0], body)
        return {"success": True, "new_contract": contract.number, "instance_api_key": contract.key}

    def list(self, request: Request) -> dict:
        """A page of the account's instances, in order of their numbers."""
        rows = sorted(map(row_of, self.market.listed()), key=lambda row: row["id"])
        filters = json.loads(request.query.get("select_filters") or "{}")
        found = [row for row in rows if matches(row, filters, STORED)]
        rest = found
        if token := request.query.get("after_token"):
            try:
                last = int(base64.b64decode(token, validate=True))
            except (binascii.Error, ValueError) as error:
                raise Refused(400, "invalid_token", "Invalid pagination token") from error
            rest = [row for row in found if row["id"] > last]
        page = rest[: min(int(request.query.get("limit") or PAGE), PAGE)]
        more = len(page) < len(rest)
        token = base64.b64encode(str(page[-1]["id"]).encode()).decode() if more else None
        return {"success": True, "instances_found": len(page), "total_instances": len(found),
                "next_token": token, "instances": page}  # fmt: skip

    def show(self, request: Request) -> dict:
        """One instance, null if there is none."""
        rows = [row_of(c) for c in self.market.listed() if c.number == request.ids[0]]
        return {"instances": rows[0] if rows else None}

    def destroy(self, request: Request) -> dict:
        """404 if it is gone already."""
        contract = self.market.find(request.ids[0])
        self.market.end(contract, "destroyed" if request.caller == "account" else "by itself")
        return {"success": True}

    def attach(self, request: Request) -> dict:
        """Adds an ssh key to an instance."""
        key = request.body.get("ssh_key") or ""
        if not re.match(r"(ssh|ecdsa|sk)-\S+ \S+", key):
            raise Refused(400, "no_ssh_key", "No ssh key provided")
        self.market.attach(self.market.find(request.ids[0]), key)
        return {"success": True, "msg": "SSH key attached successfully"}

    def user(self, request: Request) -> dict:
        """The account."""
        return {"id": 1, "username": "lab", "balance": 0.0, "credit": CREDIT}


def matches(row: dict, filters: dict, known: set[str]) -> bool:
    """Whether the row passes every {field: {operator: value}}; unknown names are errors."""
    for name, tests in filters.items():
        if name not in known:
            raise Refused(400, "invalid_request", f"{name} is not a valid search key")
        for operator, value in tests.items():
            if operator not in OPERATORS:
                raise Refused(400, "invalid_request", f"{operator} is not a valid operator")
            if not OPERATORS[operator](row[name], value):
                return False
    return True


def row_of(contract: Contract) -> dict:
    """A contract as the service shows it, with the real rows' nulls."""
    offer, fate, now = contract.offer, contract.fate, time.time()
    up = contract.status == "running"
    label = contract.request.get("label") if now >= contract.created + fate.label_after_s else None
    direct = {"HostIp": "0.0.0.0", "HostPort": str(contract.port if fate.direct else DEAD_PORT)}
    return {
        "id": contract.number, "label": label, "actual_status": contract.status,
        "intended_status": "running", "cur_state": contract.status,
        "status_msg": contract.status and f"{contract.status}, image {contract.request['image']}",
        "is_bid": contract.bid is not None, "min_bid": offer["min_bid"],
        "machine_id": offer["machine_id"], "gpu_name": offer["gpu_name"],
        "num_gpus": offer["num_gpus"], "image_uuid": contract.request["image"],
        "image_runtype": contract.request.get("runtype"),
        "onstart": contract.request.get("onstart"), "extra_env": [],
        "public_ipaddr": "127.0.0.1" if contract.status else None,
        "ssh_host": "127.0.0.1", "ssh_port": contract.port,
        "ports": {"22/tcp": [direct]} if up and contract.port else None,
        "start_date": contract.created, "end_date": contract.created + offer["duration"],
        "gpu_util": 0.0 if up else None, "disk_space": contract.disk_gb,
        "dph_base": contract.gpu_per_h, "dph_total": contract.gpu_per_h + contract.disk_per_h,
    }  # fmt: skip


@dataclass(frozen=True)
class Route:
    """An endpoint: its handler's name and its documented rate limit."""

    method: str
    path: str
    name: str
    interval_s: float = 0.0  # least time between two requests
    penalty_s: float = 0.0  # wait after a violation
    burst: int = 1  # so many requests may fall in one interval


ROUTES = [
    Route("POST", r"/api/v0/bundles/?", "search", 60.0, 0.0, 10),
    Route("PUT", r"/api/v0/asks/(\d+)/?", "create", 4.5, 12.0),
    Route("GET", r"/api/v1/instances/?", "list", 1.0),
    Route("GET", r"/api/v0/instances/(\d+)/?", "show", 2.0),
    Route("DELETE", r"/api/v0/instances/(\d+)/?", "destroy", 3.0),
    Route("POST", r"/api/v0/instances/(\d+)/ssh/?", "attach"),
    Route("GET", r"/api/v0/users/current/?", "user"),
]
