"""Buys and ends machines, so that none is bought twice and none is left.

What lives is what the service lists under our labels. The one machine of a shard is that of its
current attempt; whatever else lives for the shard is a stray, and is ended.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from sparse_coding.config import UserError
from sparse_coding.rental.market import Instance, Label, Market, Offer, Refused, Terms, Unavailable
from sparse_coding.rental.records import (
    LOST,
    Attempt,
    Ledger,
    OverBudget,
    RentalError,
    ShardRecord,
    printable,
)
from sparse_coding.rental.remote import Stopped

LISTED_WITHIN = 60.0  # seconds after its order in which a machine gets into the list; assumed
OFFERS_LAST = 60.0  # seconds for which a search counts: there is a daily quota of them
ENDING = 600.0  # seconds after which a machine that is listed in spite of its end is given up
SHORTEST_H = 0.1  # hours of life below which a machine is not worth its start
ONSTART = Path(__file__).with_name("onstart.sh")  # at most 4096 characters, vast.ai's limit
WATCH_SECONDS = 20  # between two looks at the clock of a machine that ends itself, at most
REPORT_SECONDS = 30.0  # between two lines of progress
HEED_SECONDS = 0.05  # until a signal is heeded, at most
SCREEN_SECONDS = 1.0  # in which a line gets onto a screen that anybody looks at

Item = TypeVar("Item")


def say(text: str, shard: int = 0) -> None:
    """A line with the time, of a shard or (0) of all. Machines don't wait for the screen: one that
    was stopped by Ctrl-S shows the line later, one that was closed never."""
    of = f"shard {shard}: " if shard else ""
    shown = "\n".join(printable(line, 500) for line in text.split("\n"))
    line = f"{time.strftime('%H:%M:%S')} {of}{shown}\n".encode(errors="replace")

    def write() -> None:
        with contextlib.suppress(OSError):
            os.write(1, line)  # print would hold a lock on which the interpreter's end waits

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(SCREEN_SECONDS)


def at_once(
    step: Callable[[Item], None], items: Iterable[Item], *, report: Callable = lambda: None
) -> dict[Item, Exception]:
    """Takes the step with all items, each in a thread: what went wrong, by item. No failure keeps
    another item from its end."""
    items = list(items)
    with ThreadPoolExecutor(len(items) or 1) as pool:
        futures = {item: pool.submit(step, item) for item in items}
        reported = time.monotonic()
        # a signal that comes just before a wait is heeded only after it: so waits are short
        while wait(futures.values(), timeout=HEED_SECONDS).not_done:
            if time.monotonic() - reported >= REPORT_SECONDS:
                report()
                reported = time.monotonic()
    return {item: error for item, future in futures.items() if (error := future.exception())}


class MachineLost(RentalError):
    """The machine is of no use any more, by its own fault; another one may be."""


class Outbid(MachineLost):
    """Somebody bid more for it: nobody's fault."""


@dataclass
class Provisioner:
    """What all shards of a run share.

    scale: times all waits for the service
    """

    market: Market
    run: str
    terms: Terms
    ledger: Ledger
    poll_seconds: float
    scale: float
    stop: threading.Event = field(default_factory=threading.Event)
    buying: threading.Lock = field(default_factory=threading.Lock)
    offered: tuple[float, list[Offer]] = (float("-inf"), [])

    def instances(self, shard: int | None = None) -> list[Instance]:
        """What lives under the label of the run, or of one of its shards. Raises Unavailable."""
        ours = [i for i in self.market.instances() if i.label and i.label.run == self.run]
        return [i for i in ours if shard in (None, i.label.shard)]

    # --- buying ---

    def order(self, record: ShardRecord) -> Attempt:
        """Orders the cheapest suitable machine; refused offers are passed over. Raises OverBudget,
        UserError if nothing suitable is offered, Stopped before one was bought."""
        refused: set[int] = set()
        why = "none is left that fits the caps and minimums"
        while True:
            with self.buying:  # one shard at a time: no two want the same machine
                if self.stop.is_set():
                    raise Stopped
                offer = next((o for o in self.suitable() if o.id not in refused), None)
                if offer is None:
                    raise UserError(f"no machine to be had for shard {record.shard}: {why}")
                try:
                    return self._buy(record, offer)
                except Refused as error:
                    why = str(error)
                    refused.add(offer.id)

    def suitable(self) -> list[Offer]:
        """Offers within the caps on machines that no shard has and that never failed."""
        terms, (when, offers) = self.terms, self.offered
        if time.monotonic() - when > OFFERS_LAST * self.scale:
            options = dict(disk_gb=terms.disk_gb, interruptible=terms.interruptible)
            offers = self.market.offers(terms.query(), **options)
            self.offered = (time.monotonic(), offers)
        taken: set[int] = set()
        for record in self.ledger.shards:
            taken |= set(record.avoid)
            taken |= {record.current.machine_id} if record.current else set()
        fit = [o for o in offers if o.machine_id not in taken]
        return [o for o in fit if o.rates.hourly <= terms.max_dph]

    def _buy(self, record: ShardRecord, offer: Offer) -> Attempt:
        """Raises OverBudget, Refused; UserError if the account may not buy."""
        rates, terms, now = offer.rates, self.terms, time.time()
        hours = min(terms.max_hours, self.ledger.hours_left(rates, terms.traffic(rates)))
        if hours < min(SHORTEST_H, terms.max_hours):
            raise OverBudget
        attempt = Attempt(
            number=len(record.attempts) + 1, machine_id=offer.machine_id, gpu_name=offer.gpu_name,
            rates=rates, ordered=now, expires=int(now + hours * 3600),
            planned_up=terms.results_gb, planned_down=terms.image_gb, gb_down=terms.image_gb,
        )  # fmt: skip
        self.ledger.enter(record, attempt)  # before the order: a killed command must know of it
        label = Label(self.run, record.shard, attempt.number, int(attempt.expires))
        try:
            attempt.id = self.market.buy(
                offer,
                image=terms.image,
                disk_gb=terms.disk_gb,
                label=str(label),
                onstart=self._onstart(attempt.expires, hours * 3600),
            )
        except (Refused, UserError) as error:
            attempt.not_made(f"not sold: {error}")
            raise
        finally:
            self.ledger.save(record)
        number = f"instance {attempt.id}, " if attempt.id else ""
        price = f"{offer.n_gpus} x {offer.gpu_name}, ${rates.hourly:.3f}/h"
        say(f"rents {number}{price}, machine {offer.machine_id}", record.shard)
        return attempt

    def _onstart(self, expires: float, lifetime_s: float) -> str:
        """The script with which a machine starts: it ends itself."""
        every = max(1, min(WATCH_SECONDS, 2 * self.poll_seconds))
        text = ONSTART.read_text()
        for name, value in (("EVERY", every), ("DEADLINE", expires), ("LIFETIME", lifetime_s)):
            text = text.replace(f"@{name}@", str(int(value)))
        return text

    # --- looking ---

    def locate(self, record: ShardRecord) -> Instance | None:
        """The machine of the shard's current attempt as it is listed, None if it isn't yet; strays
        are ended. Raises MachineLost if it costs more than the caps allow, or there is none."""
        attempt = record.current
        instance = self._sort_out(record, self.instances(record.shard))
        late = time.time() > attempt.ordered + LISTED_WITHIN * self.scale
        if instance is None and late and not (attempt.id and self.market.exists(attempt.id)):
            if attempt.id is None:
                attempt.not_made(LOST)
            else:
                attempt.vanished(time.time())
            self.ledger.save(record)
            raise MachineLost(attempt.why)
        if instance is not None:
            attempt.seen(instance.status, time.time())
            self._check_price(record, instance)
        return instance

    def _sort_out(self, record: ShardRecord, listed: list[Instance]) -> Instance | None:
        """The current attempt's machine of those listed for the shard; ends the others."""
        attempt, current, known = record.current, None, record.current.id
        for instance in listed:
            if attempt.id is None and instance.label.attempt == attempt.number:
                attempt.id = instance.id
                say(f"the answer to the order was lost; it is instance {instance.id}", record.shard)
            if instance.id == attempt.id:
                current = instance
            else:
                say(f"ends the stray instance {instance.id}", record.shard)
                self._end_stray(record, instance)
        if attempt.id != known or listed not in ([], [current]):
            self.ledger.save(record)
        return current

    def _check_price(self, record: ShardRecord, instance: Instance) -> None:
        """Raises MachineLost if the machine costs more than the caps allow."""
        attempt, price = record.current, instance.dph_total
        dearer = price > attempt.rates.hourly + 1e-9
        if dearer:
            attempt.rates = replace(attempt.rates, gpu=price - attempt.rates.disk)
        if not price <= self.terms.max_dph + 1e-9:  # nan: no price is above any cap
            cap = f"--max-dph {self.terms.max_dph:g}"
            raise MachineLost(f"it costs ${price:.3f}/h, above {cap}")
        if self.ledger.committed() > self.ledger.max_total + 1e-9:
            raise MachineLost(f"at ${price:.3f}/h it could exceed --max-total")
        if dearer:  # last: where it can't be noted, it is ended all the same
            self.ledger.save(record)

    # --- ending ---

    def _end_stray(self, record: ShardRecord, instance: Instance) -> None:
        self.market.destroy(instance.id)
        for attempt in record.attempts:
            if attempt.number == instance.label.attempt and attempt.id is None:
                attempt.made_late(instance.id, time.time())

    def end(self, record: ShardRecord, why: str) -> None:
        """Ends all machines of a shard, and returns when the service lists none of them. Raises
        Unavailable, once all were tried, if it does not say so of one."""
        attempt = record.current
        known = attempt is not None and attempt.id is not None
        wrong = at_once(self.market.destroy, [attempt.id] if known else [])
        ended = time.time()
        # a machine of an order without an answer may show up yet
        until = attempt.ordered + LISTED_WITHIN * self.scale if attempt and not known else 0.0
        give_up = time.monotonic() + ENDING * self.scale
        while True:
            living = [i for i in self.instances(record.shard) if i.id not in wrong]
            if not living and time.time() >= until:
                break
            failed = at_once(partial(self._end_stray, record), living)
            wrong |= {instance.id: error for instance, error in failed.items()}
            if living and time.monotonic() > give_up:
                raise Unavailable(f"instance {living[0].id} is still listed, although ended")
            time.sleep(self.poll_seconds / 5)
        if known and not wrong and self.market.exists(attempt.id):
            raise Unavailable(f"instance {attempt.id} is listed no more, but is still there")
        if known and attempt.id not in wrong:
            attempt.ended(ended, why)
        elif attempt and not known:
            attempt.not_made(why)
        self.ledger.save(record)
        if wrong:
            raise next(iter(wrong.values()))
