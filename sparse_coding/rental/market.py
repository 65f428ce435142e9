"""The vast.ai service through its official SDK, made safe to buy from.

Three things that the SDK does not do, each of which has cost somebody money: a purchase is never
sent twice (its answer may be lost after it took effect); an answer of another shape than documented
is an error and never "no instances"; reads and destroys are repeated until they succeed, at the
intervals that the service documents.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparse_coding.config import UserError, require
from sparse_coding.files import require_private
from sparse_coding.rental.terms import PREFIX, BadAnswer, Instance, Offer

# seconds between calls to one endpoint: x-rate-limit of vast.ai's OpenAPI files, August 2026, and
# a fifth more, since answers to earlier calls take their time
INTERVALS = {"create": 4.5, "destroy": 3.0, "list": 1.0, "show": 2.0, "search": 6.0, "bid": 5.5,
             "ssh": 1.0, "logs": 1.0, "user": 1.0}  # fmt: skip
PENALTY = 12.0  # seconds, after a 429 on create: it was refused before it took effect
TRIES, PATIENCE, LONGEST_WAIT = 8, 1.0, 30.0  # of a read or destroy; waits double from PATIENCE
TIMEOUT = 30.0  # seconds for one answer
AUTH = "auth_error"  # in the 404 that a wrong key gets: not every 404 means that nothing is there
PAGE = 25  # instances per answer, the service's limit


Answer = TypeVar("Answer")


class Unavailable(Exception):
    """The service gave no usable answer, however often it was asked."""


@dataclass(frozen=True)
class Purchase:
    """What came of an order: an instance, a refused offer, or (id None, sure False) who knows."""

    id: int | None
    sure: bool
    why: str = ""


def find_key() -> str:
    """The account's API key, where the vastai package looks for it.

    Raises:
        UserError: there is none, or its file can be read by others.
    """
    key = os.environ.get("VAST_API_KEY", "").strip()
    if key:
        return key
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for path in (config / "vastai" / "vast_api_key", Path.home() / ".vast_api_key"):
        if path.exists():
            require_private(path)
            return path.read_text().strip()
    raise UserError(
        "no vast.ai key: make one on the account's page, then set VAST_API_KEY or write it to "
        "~/.config/vastai/vast_api_key (chmod 600)"
    )


class Market:
    """The service, for one account. Every method may be called from any thread.

    Args:
        spacing: times the documented intervals between calls; tests on loopback take 0
    """

    def __init__(self, key: str, *, spacing: float = 1.0):
        try:
            from vastai import VastAI
        except ImportError:
            raise UserError(
                "the vastai package is missing: pip install -r requirements-vast.txt"
            ) from None
        # VAST_URL: another server, as for the SDK. With its default of 3 tries it buys twice
        self.sdk = VastAI(api_key=key, server_url=os.environ.get("VAST_URL"), retry=1)
        self.sdk.client.timeout = TIMEOUT
        self.spacing = spacing
        self.locks = {name: threading.Lock() for name in INTERVALS}
        self.last = dict.fromkeys(INTERVALS, float("-inf"))

    # --- reads ---

    def credit(self) -> float:
        """Dollars left on the account."""
        return self._ask("user", lambda: float(_dict(self.sdk.show_user()).get("credit") or 0.0))

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

        found = self._ask("search", search)
        return sorted(found, key=lambda offer: (offer.rates.hourly, offer.id))

    def instances(self) -> list[Instance]:
        """All of ours on the account: those with a label of ours."""
        found: list[Instance] = []
        params: dict = {"select_filters": {}, "limit": PAGE}
        params["order_by"] = [{"col": "id", "dir": "asc"}]

        def page() -> tuple[list[Instance], str | None]:
            answer = self.sdk.show_instances_v1(params)
            rows = _rows(_dict(answer).get("instances"))
            ours = [row for row in rows if (row.get("label") or "").startswith(f"{PREFIX}/")]
            return [Instance.of_row(row) for row in ours], answer.get("next_token")

        while True:
            more, token = self._ask("list", page)
            found += more
            if not token:
                return found
            params["after_token"] = token

    def exists(self, id: int) -> bool:
        """Whether the instance is still there, asked by its number and not by a list."""

        def is_there() -> bool:
            answer = self.sdk.client.get(f"/instances/{id}/", query_args={"owner": "me"})
            if answer.status_code == 404 and AUTH not in answer.text:
                return False
            answer.raise_for_status()
            return _dict(answer.json())["instances"] is not None

        return self._ask("show", is_there)

    def log(self, id: int) -> str:
        """What the container and the daemon that starts it have printed, or why that is not known:
        of use where ssh is not."""
        parts = []
        for name, daemon in (("container", False), ("daemon", True)):
            try:
                text = self.sdk.logs(id, tail="200", daemon_logs=daemon)
            except Exception as error:  # a log is a help, never a reason to stop
                text = f"none: {type(error).__name__}"
            parts.append(f"--- {name} ---\n{text}\n")
        return "".join(parts)

    # --- what costs or ends costs ---

    def buy(
        self, offer: Offer, *, image: str, disk_gb: float, label: str, onstart: str, bid: float
    ) -> Purchase:
        """Orders the offer, once.

        bid: $/h of an interruptible instance; 0: on demand
        Raises:
            UserError: the account may not buy.
        """
        terms = {"bid_price": bid} if bid else {}
        while True:
            self._wait_for_turn("create")
            try:
                answer = self.sdk.create_instance(
                    id=offer.id,
                    image=image,
                    disk=disk_gb,
                    label=label,
                    onstart_cmd=onstart,
                    ssh=True,
                    direct=True,
                    cancel_unavail=True,
                    **terms,
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
                taken = status is not None and 400 <= status < 500
                return Purchase(None, sure=taken, why=_said(error))
            id = answer.get("new_contract") if isinstance(answer, dict) else None
            if isinstance(id, int):
                return Purchase(id, sure=True)
            return Purchase(None, sure=False, why=f"it answered {str(answer)[:100]}")

    def destroy(self, id: int) -> None:
        """Asks until the service has taken the order, or says that there is no such instance."""

        def order() -> None:
            try:
                self.sdk.destroy_instance(id)
            except Exception as error:
                if _status(error) not in (404, 410) or AUTH in _said(error):
                    raise

        self._ask("destroy", order)

    def raise_bid(self, id: int, price: float) -> None:
        """price: $/h"""
        self._ask("bid", lambda: self.sdk.change_bid(id, price=price))

    def attach_key(self, id: int, public_key: str) -> None:
        """Lets the ssh key into a running instance."""
        self._ask("ssh", lambda: self.sdk.attach_ssh(id, public_key))

    # --- how it is asked ---

    def _wait_for_turn(self, endpoint: str) -> None:
        with self.locks[endpoint]:
            interval = 1.2 * INTERVALS[endpoint] * self.spacing
            pause = self.last[endpoint] + interval - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            self.last[endpoint] = time.monotonic()

    def _ask(self, endpoint: str, call: Callable[[], Answer]) -> Answer:
        """What the call makes of the answer, once that has the documented shape.

        Raises:
            UserError: the key is refused, or the daily quota of searches is used up.
            Unavailable: no sound answer in TRIES.
        """
        wait, why = PATIENCE, ""
        for attempt in range(TRIES):
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
        raise Unavailable(f"vast.ai gives no usable answer to {endpoint} ({why})")


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

    return isinstance(error, (requests.exceptions.RequestException, BadAnswer, KeyError, TypeError))


def _status(error: Exception) -> int | None:
    """HTTP status of an answer, None where there was none."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _said(error: Exception) -> str:
    """What the service said, in a line. Never the request, whose headers hold the key."""
    response = getattr(error, "response", None)
    if response is None:
        return str(error) if isinstance(error, BadAnswer) else type(error).__name__
    return f"{response.status_code} {' '.join(response.text.split())[:150]}".strip()
