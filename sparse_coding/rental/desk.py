"""Buying and ending machines so that none is bought twice and none is left.

What lives is what the service lists under our labels. A purchase whose answer was lost is looked
for there; whatever else lives for a shard than the machine it works on is ended.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sparse_coding.config import UserError
from sparse_coding.rental.market import Market, Unavailable
from sparse_coding.rental.records import Budget, OverBudget, Records, Rental, ShardRecord
from sparse_coding.rental.terms import Instance, Label, Offer, Rates, Terms

LOST_ORDER = 60.0  # seconds for which an order without an answer is looked for in the list
OFFERS_LAST = 60.0  # seconds for which a search counts: there is a daily quota of them
ENDING = 600.0  # seconds after which a machine that is listed in spite of its end is given up
BID_FACTOR = 1.2  # a bid over the lowest that wins now; SkyPilot and vast.ai's examples do alike
LOST = "the answer to the order was lost, and no instance appeared"
SHORTEST_H = 0.1  # hours of life below which a machine is not worth its start


class Stopped(Exception):
    """By a signal."""


class Lost(Exception):
    """The machine is of no use any more; another one may be.

    avoid: it is the machine's fault, so it is not rented again
    """

    def __init__(self, why: str, *, avoid: bool = False):
        super().__init__(why)
        self.avoid = avoid


@dataclass
class Desk:
    """What all shards of a run share.

    onstart: expiry (epoch seconds), lifetime (s) -> the script that each machine starts with
    scale: times all waits for the service; say: prints a line
    """

    market: Market
    run: str
    terms: Terms
    records: Records
    budget: Budget
    onstart: Callable[[float, float], str]
    poll_seconds: float
    scale: float
    stop: threading.Event
    say: Callable[[str], None]
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the list
    listed: tuple[float, list[Instance]] = (float("-inf"), [])
    buying: threading.Lock = field(default_factory=threading.Lock)  # one shard at a time
    offered: tuple[float, list[Offer]] = (float("-inf"), [])

    def instances(self, *, fresh: bool = False) -> list[Instance]:
        """Of this run, at most poll_seconds old unless fresh.

        Raises:
            Unavailable: the service does not say.
        """
        asked = time.monotonic()
        with self.lock:  # one call serves all shards
            when, found = self.listed
            if when < asked and (fresh or time.monotonic() - when > self.poll_seconds * 0.9):
                began = time.monotonic()
                found = [i for i in self.market.instances() if i.label and i.label.run == self.run]
                self.listed = (began, found)
            return found

    def of_shard(self, shard: int, *, fresh: bool = False) -> list[Instance]:
        return [i for i in self.instances(fresh=fresh) if i.label.shard == shard]

    # --- buying ---

    def rent(self, record: ShardRecord) -> Rental:
        """The machine of a shard: one that lives already, else the cheapest that can be bought.

        Raises:
            OverBudget: what is left does not pay for one. UserError: nothing suitable is offered.
            Stopped: before one was bought.
        """
        living = self.of_shard(record.shard, fresh=True)
        if living:
            return self._adopt(record, living)
        if record.current:
            record.current.written_off(time.time())
            self.records.save(record)
        tried: set[int] = set()
        why = "none is left that fits the caps and minimums"
        while True:
            with self.buying:
                if self.stop.is_set():
                    raise Stopped
                offer = next((o for o in self.suitable() if o.id not in tried), None)
                if offer is None:
                    raise UserError(f"no machine to be had for shard {record.shard}: {why}")
                tried.add(offer.id)
                rental, sure, why = self._order(record, offer)
            if rental.id is not None or (not sure and self._find_order(record, rental)):
                return rental

    def _adopt(self, record: ShardRecord, living: list[Instance]) -> Rental:
        known = record.current
        mine = [i for i in living if known and i.id == known.id] or [
            max(living, key=lambda i: (i.label.attempt, i.id))
        ]
        instance = mine[0]
        if known is None or known.id not in (None, instance.id):
            rates = Rates(instance.dph_total, 0.0, 0.0, 0.0)  # of which part is not known
            known = Rental(
                attempt=instance.label.attempt, machine_id=instance.machine_id, rates=rates,
                gpu_name=instance.gpu_name, ordered=instance.started or time.time(),
                expires=instance.label.expires,
            )  # fmt: skip
            record.rentals.append(known)
        known.id = instance.id
        self.records.save(record)
        self.say(f"shard {record.shard}: goes on with instance {instance.id}")
        self.end_strays(record)
        return known

    def suitable(self) -> list[Offer]:
        """Offers within the caps on machines that no other shard has and that never failed."""
        terms, (when, offers) = self.terms, self.offered
        if time.monotonic() - when > OFFERS_LAST * self.scale:
            options = dict(disk_gb=terms.disk_gb, interruptible=terms.interruptible)
            offers = self.market.offers(terms.query(), **options)
            self.offered = (time.monotonic(), offers)
        taken = {i.machine_id for i in self.instances()}
        for other in self.budget.records:
            taken |= set(other.avoid)
            taken |= {other.current.machine_id} if other.current else set()
        fit = [o for o in offers if o.machine_id not in taken]
        return [o for o in fit if self.price(o) <= terms.max_dph]

    def price(self, offer: Offer) -> float:
        """$/h that it will cost: of an interruptible one, with our bid."""
        return (
            self.bid(offer) + offer.rates.disk if self.terms.interruptible else offer.rates.hourly
        )

    def rates(self, offer: Offer) -> Rates:
        """As they will be billed."""
        return replace(offer.rates, gpu=self.price(offer) - offer.rates.disk)

    def bid(self, offer: Offer) -> float:
        if not self.terms.interruptible:
            return 0.0
        most = self.terms.max_dph - offer.rates.disk
        return max(offer.min_bid, min(most, offer.min_bid * BID_FACTOR))

    def _order(self, record: ShardRecord, offer: Offer) -> tuple[Rental, bool, str]:
        """(rental, whether its fate is known, why it has no id)"""
        rates = self.rates(offer)
        hours = min(self.terms.max_hours, self.budget.hours_left(rates, self.terms.traffic(rates)))
        if hours < min(SHORTEST_H, self.terms.max_hours):
            raise OverBudget
        now = time.time()
        rental = Rental(
            attempt=len(record.rentals) + 1, machine_id=offer.machine_id, gpu_name=offer.gpu_name,
            rates=rates, ordered=now, expires=int(now + hours * 3600), bid=self.bid(offer),
            planned=(self.terms.results_gb, self.terms.image_gb), gb_down=self.terms.image_gb,
        )  # fmt: skip
        self.budget.order(record, rental)
        self.records.save(record)  # before the order: a killed controller must know of it
        label = Label(self.run, record.shard, rental.attempt, int(rental.expires))
        bought = self.market.buy(
            offer,
            image=self.terms.image,
            disk_gb=self.terms.disk_gb,
            label=str(label),
            onstart=self.onstart(rental.expires, hours * 3600),
            bid=rental.bid,
        )
        rental.id = bought.id
        if bought.sure and bought.id is None:
            rental.never_was(f"not sold: {bought.why}")
        self.records.save(record)
        if bought.id is not None:
            self.say(
                f"shard {record.shard}: rents instance {bought.id}, {offer.n_gpus} x "
                f"{offer.gpu_name}, ${rates.hourly:.3f}/h, machine {offer.machine_id}"
            )
        return rental, bought.sure, bought.why

    def _find_order(self, record: ShardRecord, rental: Rental) -> bool:
        """Whether the service has the machine of an order whose answer was lost."""
        end = time.monotonic() + LOST_ORDER * self.scale
        while True:
            for instance in self.of_shard(record.shard, fresh=True):
                if instance.label.attempt == rental.attempt:
                    rental.id = instance.id
                    self.records.save(record)
                    self.say(
                        f"shard {record.shard}: the answer to the order was lost; it is instance "
                        f"{instance.id}"
                    )
                    return True
            if time.monotonic() > end:
                break
            self.stop.wait(self.poll_seconds)
        # it may still show up: then it is a stray, and is ended as one
        rental.never_was(LOST)
        self.records.save(record)
        return False

    def check_price(self, record: ShardRecord, instance: Instance) -> None:
        """Raises Lost if the machine costs more than the caps allow."""
        rental = record.current
        if instance.dph_total > rental.rates.hourly + 1e-9:
            rental.rates = replace(rental.rates, gpu=instance.dph_total - rental.rates.disk)
            self.records.save(record)
        price = instance.dph_total
        if price > self.terms.max_dph + 1e-9:
            why = f"it costs ${price:.3f}/h, above --max-dph {self.terms.max_dph:g}"
            raise Lost(why, avoid=True)
        if self.budget.committed() > self.budget.max_total + 1e-9:
            raise Lost(f"at ${price:.3f}/h it could exceed --max-total", avoid=True)

    # --- ending ---

    def end_strays(self, record: ShardRecord) -> None:
        """Ends what lives for the shard, by an order of ours, beside the machine it works on.

        Raises:
            UserError: another machine was there before, and is none of ours: the run is led from
                elsewhere too. Of two leaders the later one yields.
        """
        known = record.current.id if record.current else None
        for instance in self.of_shard(record.shard):
            if instance.id == known:
                continue
            if self._is_ours(record, instance) or (known and instance.id > known):
                self.say(f"shard {record.shard}: ends the stray instance {instance.id}")
                self._end_stray(record, instance)
            elif known:
                raise UserError(
                    f"instance {instance.id} works on shard {record.shard} already, led by another "
                    "command elsewhere: leave it to that one, or give --run another name"
                )

    def _is_ours(self, record: ShardRecord, instance: Instance) -> bool:
        """Whether an order of ours made it: one with its number, or one whose answer was lost."""
        orders = {r.attempt for r in record.rentals if r.id is None}
        return instance.id in {r.id for r in record.rentals} or instance.label.attempt in orders

    def _end_stray(self, record: ShardRecord, instance: Instance) -> None:
        self.market.destroy(instance.id)
        for rental in record.rentals:
            if rental.attempt == instance.label.attempt and rental.id is None:
                rental.appeared(instance.id, time.time())
        self.records.save(record)

    def end(self, record: ShardRecord, why: str) -> None:
        """Ends all machines of a shard that orders of ours made, and returns when the service lists
        none of them.

        Raises:
            Unavailable: it does not say so.
        """
        rental, ended = record.current, time.time()
        if rental and rental.id is not None:
            self.market.destroy(rental.id)
            ended = time.time()
        lost = [r.ordered for r in record.rentals if r.id is None and r.why in ("", LOST)]
        until = max(lost, default=0) + LOST_ORDER * self.scale  # it may yet show up
        give_up = time.monotonic() + ENDING * self.scale
        while True:
            listed = self.of_shard(record.shard, fresh=True)
            living = [i for i in listed if self._is_ours(record, i)]
            if not living and time.time() >= until:
                break
            for instance in living:
                self._end_stray(record, instance)
            if living and time.monotonic() > give_up:
                raise Unavailable(f"instance {living[0].id} is still listed, although ended")
            time.sleep(self.poll_seconds / 5)
        if rental:
            if rental.id is not None and self.market.exists(rental.id):
                raise Unavailable(f"instance {rental.id} is listed no more, but is still there")
            rental.ended(ended, why)
            self.records.save(record)
