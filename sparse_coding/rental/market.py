"""The vast.ai service: what it offers and lists, and its official SDK, made safe to buy from.

Three things that the SDK does not do, each of which has cost somebody money: a purchase is never
sent twice (its answer may be lost after it took effect); an answer of another shape than documented
is an error and never "no instances"; reads and destroys are repeated until they succeed, at the
intervals that the service documents.
"""

import math
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import ClassVar, TypeVar

from sparse_coding.config import UserError, require
from sparse_coding.files import require_private
from sparse_coding.rental.records import Rates, RentalError, printable

PREFIX = "sae1"  # of all labels of ours; 1: the version of what follows
MONTH_HOURS = 30 * 24  # vast.ai quotes storage in $/GB/month
BID_FACTOR = 1.2  # over the lowest bid that wins now; SkyPilot and vast.ai's examples do alike
# seconds between calls to one endpoint: x-rate-limit of vast.ai's OpenAPI files, August 2026, and
# a fifth more, since answers to earlier calls take their time
INTERVALS = {"create": 4.5, "destroy": 3.0, "list": 1.0, "show": 2.0, "search": 6.0, "ssh": 1.0,
             "user": 1.0}  # fmt: skip
PENALTY = 12.0  # seconds, after a 429 on create: it was refused before it took effect
TRIES, PATIENCE, LONGEST_WAIT = 8, 1.0, 30.0  # of a read or destroy; waits double from PATIENCE
TIMEOUT = 30.0  # seconds for one answer
# of a command that only looks: seconds to be connected and to be answered, and those after which
# it is not asked again
LOOK_TIMEOUT, LOOK_SECONDS = (4.0, 8.0), 12.0
AUTH = "auth_error"  # in the 404 that a wrong key gets: not every 404 means that nothing is there
PAGE = 25  # instances per answer, the service's limit
PAGES = 400  # of a list at most: 10,000 instances; ours
RUN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]{0,252}")  # a name or address, and nothing for ssh
STATUS = re.compile(r"[a-z_]{1,30}")

Answer = TypeVar("Answer")


class Unavailable(RentalError):
    """The service gave no usable answer, however often it was asked."""

    def __str__(self) -> str:
        return f"{self.args[0]}: look with `status`, end with `destroy` or `reap`"


class BadAnswer(Exception):
    """The service answered something else than its documents say. Never read as "nothing"."""


class Refused(Exception):
    """An order that the service refuses: somebody else was quicker."""


# --- what is offered and rented ---


@dataclass(frozen=True)
class Label:
    """sae1/<run>/<shard>/a<attempt>/exp=<epoch seconds>: all that must survive the loss of this
    computer, since an instance carries nothing else from its creation to its end.

    shard: from 1; expires: the instance must be gone then, whoever sees it
    """

    run: str
    shard: int
    attempt: int
    expires: int
    PATTERN: ClassVar = re.compile(
        rf"{PREFIX}/({RUN_NAME})/([0-9]{{1,4}})/a([0-9]{{1,4}})/exp=([0-9]{{1,12}})"
    )

    def __str__(self) -> str:
        return f"{PREFIX}/{self.run}/{self.shard}/a{self.attempt}/exp={self.expires}"

    @classmethod
    def parse(cls, text: object) -> "Label | None":
        """None if the label is not one of ours."""
        match = cls.PATTERN.fullmatch(text) if isinstance(text, str) else None
        return cls(match[1], *map(int, match.groups()[1:])) if match else None


@dataclass(frozen=True)
class Terms:
    """What is rented, and how long it may take; the names are those of vastai_utils.py's flags."""

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
    start_minutes: float
    lost_minutes: float
    pull_minutes: float
    attempts: int

    def query(self) -> dict:
        """For the service's search, in its units: MB, seconds."""
        return {
            "gpu_name": {"in": list(self.gpu_names)},
            "num_gpus": {"eq": self.n_gpus},
            "disk_space": {"gte": self.disk_gb},
            "reliability": {"gte": self.min_reliability},
            "inet_down": {"gte": self.min_inet_mbps},
            "cuda_max_good": {"gte": self.min_cuda},
            "duration": {"gte": self.max_hours * 3600},
            "direct_port_count": {"gte": 1},
        }

    def traffic(self, rates: Rates) -> float:
        """Dollars for the image on its way there and the results on their way back."""
        return rates.down * self.image_gb + rates.up * self.results_gb


@dataclass(frozen=True)
class Offer:
    """A machine that can be rented, priced for the disk that was asked for.

    inet_down: Mbit/s; days_left: until the host takes it back
    bid: $/h for the GPU of an interruptible machine, 0 on demand
    """

    id: int
    machine_id: int
    gpu_name: str
    n_gpus: int
    rates: Rates
    reliability: float
    inet_down: float
    days_left: float
    bid: float
    place: str

    def __str__(self) -> str:
        return (
            f"{self.n_gpus} x {self.gpu_name:<12} ${self.rates.hourly:.3f}/h, reliability "
            f"{self.reliability:.3f}, {self.inet_down:.0f} Mbit/s, {self.days_left:.0f} days left, "
            f"{self.place}"
        )

    @classmethod
    def of_row(cls, row: dict, *, disk_gb: float, interruptible: bool) -> "Offer":
        """Raises BadAnswer for a row without its price or names."""
        try:
            disk = _price(row["storage_cost"]) * disk_gb / MONTH_HOURS
            bid = BID_FACTOR * _price(row["min_bid"]) if interruptible else 0.0
            gpu = bid or max(0.0, _price(row["dph_total"]) - disk)
            return cls(
                id=index(row["id"]),
                machine_id=index(row["machine_id"]),
                gpu_name=printable(row["gpu_name"]),
                n_gpus=int(_price(row["num_gpus"])),
                rates=Rates(gpu, disk, _price(row["inet_up_cost"]), _price(row["inet_down_cost"])),
                reliability=_number(row.get("reliability2") or row.get("reliability")),
                inet_down=_number(row.get("inet_down")),
                days_left=_number(row.get("duration")) / 86400,
                bid=bid,
                place=printable(row.get("geolocation") or ""),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnswer(f"an offer without {error}") from None


@dataclass(frozen=True)
class Instance:
    """A rented machine, as the service lists it.

    label: None if it is none of ours; status: loading, running, stopped, ...
    endpoints: (host, port) of its ssh, the direct one first, then the proxy
    dph_total: $/h as billed now, disk included; nan where the service says no price
    """

    id: int
    label: Label | None
    status: str
    message: str
    gpu_name: str
    endpoints: tuple[tuple[str, int], ...]
    dph_total: float
    gpu_util: float

    @classmethod
    def of_row(cls, row: dict) -> "Instance":
        """Nulls stand for what is not known yet. Raises BadAnswer for a row without an id: any
        other oddity must not keep the instance, or those beside it, from being ended."""
        try:
            id = index(row["id"])
        except (KeyError, TypeError) as error:
            raise BadAnswer(f"an instance without {error}") from None
        status = str(row.get("actual_status") or "created")
        return cls(
            id=id,
            label=Label.parse(row.get("label")),
            status=status if STATUS.fullmatch(status) else "unknown",
            message=printable(row.get("status_msg") or ""),
            gpu_name=printable(row.get("gpu_name") or "?"),
            endpoints=_endpoints(row),
            dph_total=_number(row.get("dph_total")),
            gpu_util=_number(row.get("gpu_util")),
        )


def _endpoints(row: dict) -> tuple[tuple[str, int], ...]:
    """Direct first: the proxy is slow. Neither is known before the instance runs; what is no
    address or port is none."""
    try:
        mapped = row["ports"]["22/tcp"][0]["HostPort"]
    except (KeyError, IndexError, TypeError):
        mapped = None
    pairs = [(row.get("public_ipaddr"), mapped), (row.get("ssh_host"), row.get("ssh_port"))]
    pairs = [(str(host).strip(), str(port)) for host, port in pairs if host and port]
    good = [(h, int(p)) for h, p in pairs if HOST.fullmatch(h) and re.fullmatch("[0-9]{1,5}", p)]
    return tuple(dict.fromkeys((host, port) for host, port in good if 0 < port < 2**16))


def _number(value: object) -> float:
    """0 for null, nan for what is no finite number of at least 0."""
    try:
        number = float(0.0 if value is None else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if 0 <= number < math.inf else math.nan


def _price(value: object) -> float:
    number = math.nan if value is None else _number(value)
    if math.isnan(number):
        raise ValueError(f"a price ({printable(value, 40)})")
    return number


# --- the service ---


def find_key() -> str:
    """The account's API key, where the vastai package looks for it. Raises UserError if there is
    none, or others can read its file."""
    key, where = os.environ.get("VAST_API_KEY", "").strip(), "VAST_API_KEY"
    if not key:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        places = (config / "vastai" / "vast_api_key", Path.home() / ".vast_api_key")
        where = next((path for path in places if path.exists()), None)
        if where is None:
            raise UserError(
                "no vast.ai key: make one on the account's page, then set VAST_API_KEY or write it "
                "to ~/.config/vastai/vast_api_key (chmod 600)"
            )
        require(where.is_file(), f"{where} is no file: put the key into a file of that name")
        require_private(where)
        key = where.read_bytes().decode(errors="replace").strip()
    good = re.fullmatch("[!-~]+", key)  # what a header can carry
    require(bool(good), f"{where} holds no key: copy it from the account's page, one word of ASCII")
    return key


class Market:
    """The service, for one account. Every method may be called from any thread.

    Args:
        spacing: times the documented intervals between calls; tests on loopback take 0
        looking: nothing is at stake: no usable answer is said in 20 s, as a UserError
    """

    def __init__(self, key: str, *, spacing: float = 1.0, looking: bool = False):
        try:
            from vastai import VastAI
        except ImportError:
            raise UserError(
                "the vastai package is missing: pip install -r requirements-vast.txt"
            ) from None
        # VAST_URL: another server, as for the SDK. With its default of 3 tries it buys twice
        self.sdk = VastAI(api_key=key, server_url=os.environ.get("VAST_URL"), retry=1)
        self.sdk.client.timeout = LOOK_TIMEOUT if looking else TIMEOUT
        self.spacing, self.looking = spacing, looking
        self.locks = {name: threading.Lock() for name in INTERVALS}
        self.last = dict.fromkeys(INTERVALS, float("-inf"))

    # --- reads ---

    def credit(self) -> float:
        """Dollars left on the account."""
        return self._ask("user", lambda: _number(_dict(self.sdk.show_user()).get("credit")))

    def offers(self, query: dict, *, disk_gb: float, interruptible: bool) -> list[Offer]:
        """Offers that match, the cheapest first.

        query: raw (MB, seconds), see the API's search
        """

        def search() -> list[Offer]:
            rows = self.sdk.search_offers(
                query=dict(query),
                type="bid" if interruptible else "on-demand",
                order="dph_total",
                limit=100,
                storage=disk_gb,  # or the price is that for 5 GB
            )
            options = dict(disk_gb=disk_gb, interruptible=interruptible)
            return [Offer.of_row(row, **options) for row in _rows(rows)]

        offers = self._ask("search", search)
        return sorted(offers, key=lambda offer: (offer.rates.hourly, offer.id))

    def instances(self) -> list[Instance]:
        """All of ours on the account: those with a label of ours."""
        instances: list[Instance] = []
        params: dict = {"select_filters": {}, "limit": PAGE}
        params["order_by"] = [{"col": "id", "dir": "asc"}]

        def page() -> tuple[list[Instance], str | None]:
            answer = self.sdk.show_instances_v1(params)
            rows = _rows(_dict(answer).get("instances"))
            ours = [row for row in rows if str(row.get("label")).startswith(f"{PREFIX}/")]
            token = answer.get("next_token")
            if not isinstance(token, (str, type(None))):
                raise BadAnswer("a page of a list without its number")
            return [Instance.of_row(row) for row in ours], token

        for _ in range(PAGES):
            more, token = self._ask("list", page)
            instances += more
            if not token:
                return instances
            if token == params.get("after_token"):
                break
            params["after_token"] = token
        raise Unavailable("vast.ai's list of instances has no end")

    def exists(self, id: int) -> bool:
        """Whether the instance is still there, asked by its number and not by a list."""

        def is_there() -> bool:
            answer = self.sdk.client.get(f"/instances/{id}/", query_args={"owner": "me"})
            if answer.status_code == 404 and AUTH not in answer.text:
                return False
            answer.raise_for_status()
            return _dict(answer.json())["instances"] is not None

        return self._ask("show", is_there)

    # --- what costs or ends costs ---

    def buy(
        self, offer: Offer, *, image: str, disk_gb: float, label: str, onstart: str
    ) -> int | None:
        """Orders the offer, once: the number of the instance, or None if no answer came, and only
        the list will show whether there is one. Raises Refused, UserError (it may not buy)."""
        more = {"bid_price": offer.bid} if offer.bid else {}
        more |= dict(ssh=True, direct=True, cancel_unavail=True)
        while True:
            self._wait_for_turn("create")
            try:
                answer = self.sdk.create_instance(
                    offer.id, image=image, disk=disk_gb, label=label, onstart_cmd=onstart, **more
                )
            except Exception as error:
                if not _is_of_the_line(error):
                    raise
                status = _status(error)
                if status == 429:
                    time.sleep(PENALTY * self.spacing)
                    continue
                if status in (401, 403) or AUTH in _said(error):
                    raise UserError(f"vast.ai refuses to sell ({status}): {_said(error)}") from None
                if status is not None and 400 <= status < 500:
                    raise Refused(_said(error)) from None
                return None
            id = answer.get("new_contract") if isinstance(answer, dict) else None
            return id if type(id) is int else None

    def destroy(self, id: int) -> None:
        """Asks until the service has taken the order, or says that there is no such instance."""

        def order() -> None:
            try:
                self.sdk.destroy_instance(id)
            except Exception as error:
                if _status(error) not in (404, 410) or AUTH in _said(error):
                    raise

        self._ask("destroy", order, f"destroy instance {id}")

    def attach_key(self, id: int, public_key: str) -> None:
        """Lets the ssh key into a running instance."""
        self._ask("ssh", lambda: _dict(self.sdk.attach_ssh(id, public_key)))

    # --- how it is asked ---

    def _wait_for_turn(self, endpoint: str) -> None:
        with self.locks[endpoint]:
            interval = 1.2 * INTERVALS[endpoint] * self.spacing
            pause = self.last[endpoint] + interval - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            self.last[endpoint] = time.monotonic()

    def _ask(self, endpoint: str, call: Callable[[], Answer], what: str = "") -> Answer:
        """What the call makes of the answer, once that has the documented shape. Raises Unavailable
        (no answer to `what`) after TRIES, UserError if the key is refused or the day's searches are
        used up."""
        wait, why, began = PATIENCE, "", time.monotonic()
        for attempt in range(TRIES):
            if self.looking and time.monotonic() - began > LOOK_SECONDS:
                break
            if attempt:
                time.sleep(wait * self.spacing)
                wait = min(2 * wait, LONGEST_WAIT)
            self._wait_for_turn(endpoint)
            try:
                return call()
            except Exception as error:
                if not _is_of_the_line(error):
                    raise
                status, why = _status(error), _said(error)
                if status in (401, 403) or AUTH in why:
                    raise UserError(
                        f"vast.ai refuses the key ({status}): check it with `doctor`, or make a "
                        "new one on the account's page"
                    ) from None
                require("search_quota_exceeded" not in why, f"vast.ai: {why}: wait until tomorrow")
        failure = f"vast.ai gives no usable answer to {what or endpoint} ({why})"
        require(not self.looking, f"{failure}: try again later")
        raise Unavailable(failure)


def _rows(answer: object) -> list[dict]:
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
        raise BadAnswer(f"{str(answer)[:100]!r} instead of a list")
    return answer


def _dict(answer: object) -> dict:
    if not isinstance(answer, dict):
        raise BadAnswer(f"{str(answer)[:100]!r} instead of an object")
    return answer


def _is_of_the_line(error: Exception) -> bool:
    """Whether the answer was lost or unreadable, rather than our code wrong."""
    import requests

    # beside the first two: what the package makes of an answer of another shape
    kinds = (BadAnswer, AttributeError, KeyError, RecursionError, TypeError, ValueError)
    return isinstance(error, (requests.exceptions.RequestException, *kinds))


def _status(error: Exception) -> int | None:
    """HTTP status of an answer, None where there was none."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _said(error: Exception) -> str:
    """What the service said, in a line. Never the request, whose headers hold the key."""
    response = getattr(error, "response", None)
    if response is None:
        return str(error) if isinstance(error, BadAnswer) else type(error).__name__
    return printable(f"{response.status_code} {response.text}", 150)
