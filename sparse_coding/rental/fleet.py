"""A sweep on rented machines: its price, all shards at once, one table."""

import difflib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import UserError, fingerprint, require
from sparse_coding.rental.desk import Desk, Stopped
from sparse_coding.rental.market import Market, Unavailable
from sparse_coding.rental.records import GRACE_H, OverBudget, spent
from sparse_coding.rental.results import merge
from sparse_coding.rental.shard import Failed, Shard
from sparse_coding.rental.terms import Cost, Offer, Terms, cost_of

RENTALS = Path("rentals")  # a folder per run: its plan, prices, results on their way
ONSTART = Path(__file__).with_name("onstart.sh")
ONSTART_LIMIT = 4096  # characters, of vast.ai
Say = Callable[[str], None]
REPORT_SECONDS = 60.0  # between lines of progress where nobody watches; 2 where somebody does


def onstart(expires: float, lifetime_s: float, *, every: int) -> str:
    """The script with which a machine starts: it ends itself.

    every: seconds between two looks at the clock
    """
    text = ONSTART.read_text()
    for name, value in (("EVERY", every), ("DEADLINE", expires), ("LIFETIME", lifetime_s)):
        text = text.replace(f"@{name}@", str(int(value)))
    assert len(text) <= ONSTART_LIMIT
    return text


def run_name(command: list[str], n_shards: int) -> str:
    """The same command has the same name, and so resumes."""
    stem = Path(command[1]).stem
    return f"{stem}-{fingerprint({'command': tuple(command), 'shards': n_shards})}"


# --- the price ---


@dataclass(frozen=True)
class Quote:
    """What a sweep will cost, before anything is bought. offers: one per machine to be rented."""

    offers: list[Offer]
    before: Cost
    expected: Cost
    worst: Cost

    def lines(self, terms: Terms, hours: float, credit: float) -> Iterator[str]:
        for offer in self.offers:
            yield (
                f"  {offer.n_gpus} x {offer.gpu_name:<14} ${offer.rates.hourly:.3f}/h with "
                f"{terms.disk_gb:g} GB, reliability {offer.reliability:.3f}, "
                f"{offer.inet_down:.0f} Mbit/s, {offer.days_left:.0f} days left, {offer.place}"
            )
        if self.before.total:
            yield f"spent before: {self.before}"
        yield f"expected, at {hours:g} h each: {self.expected}"
        yield f"at most, if all live to their deadline of {terms.max_hours:g} h: {self.worst}"
        if credit < self.worst.total:
            yield f"warning: the account's credit of ${credit:.2f} is less than that"


def quote(desk: Desk, shards: list[Shard], *, hours: float) -> Quote:
    """Of the machines that are still to be rented.

    hours: that one machine is expected to live
    Raises:
        UserError: not enough offers, or the worst case exceeds --max-total.
    """
    terms = desk.terms
    living = {i.label.shard for i in desk.instances(fresh=True)}
    wanted = [s for s in shards if not s.record.done and s.record.shard not in living]
    offers = desk.suitable()[: len(wanted)] if wanted else []
    if wanted and not offers:
        raise UserError(nearest_gpus(desk.market, terms))
    n_short = len(wanted) - len(offers)
    require(
        n_short <= 0,
        f"{len(wanted)} machines are wanted, {len(offers)} fit the caps and minimums: lower "
        "--instances, or give more --gpu-names",
    )
    before = spent([shard.record for shard in shards])
    expected = worst = Cost()
    for offer in offers:
        rates = desk.rates(offer)
        traffic = dict(gb_up=terms.results_gb, gb_down=terms.image_gb)
        most = terms.max_hours + GRACE_H
        expected += cost_of(rates, running_h=hours, existing_h=hours, **traffic)
        worst += cost_of(rates, running_h=most, existing_h=most, **traffic)
    total = desk.budget.committed() + worst.total
    cap = desk.budget.max_total
    require(
        total <= cap + 1e-9,
        f"at most ${total:.2f} (spent before: ${before.total:.2f}) is above --max-total {cap:g}: "
        "raise it, or lower --max-hours",
    )
    return Quote(offers, before, expected, worst)


def nearest_gpus(market: Market, terms: Terms) -> str:
    """What to say when nothing is on offer: other names, or the cheapest price."""

    def search(query: dict) -> list[Offer]:
        return market.offers(query, disk_gb=terms.disk_gb, interruptible=terms.interruptible)

    named = search({"gpu_name": {"in": list(terms.gpu_names)}})
    if not named:
        names = sorted({offer.gpu_name for offer in search({})})
        wrong = terms.gpu_names[0]
        near = difflib.get_close_matches(wrong.replace("_", " "), names, 3, 0.4) or names[:6]
        require(bool(names), "vast.ai offers no machine at all just now: try again later")
        return f"no offer of {', '.join(terms.gpu_names)}: did you mean {', '.join(near)}?"
    cheapest = min(named, key=lambda offer: offer.rates.hourly)
    return (
        f"none of {len(named)} offers of {', '.join(terms.gpu_names)} fits the caps and minimums "
        f"(--max-dph {terms.max_dph:g}, ...); the cheapest of them costs "
        f"${cheapest.rates.hourly:.3f}/h"
    )


def confirm(yes: bool) -> None:
    """Raises UserError unless --yes or a y at the terminal."""
    if yes:
        return
    require(sys.stdin.isatty(), "nobody is there to confirm the price: add --yes to accept it")
    require(input("rent? [y/N] ").strip().lower() in ("y", "yes"), "not confirmed: nothing bought")


# --- all shards at once ---


class Reporter:
    """Lines with the time, and what all shards are at."""

    def __init__(self) -> None:
        self.lock, self.pending = threading.Lock(), False
        self.watched = sys.stdout.isatty()
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        with self.lock:
            clear = "\r\033[K" if self.pending else ""
            print(f"{clear}{time.strftime('%H:%M:%S')} {text}", flush=True)
            self.pending = False

    def progress(self, shards: list[Shard]) -> None:
        """One line of all shards, when it is time for one."""
        going = [shard for shard in shards if not shard.record.done]
        due = time.monotonic() - self.last > (2 if self.watched else REPORT_SECONDS)
        if not due or not going:
            return
        self.last = time.monotonic()
        parts = ", ".join(f"{s.record.shard} {s.phase}" for s in going)
        line = next((s.line for s in going if s.line), "")
        text = f"${spent([s.record for s in shards]).total:.3f} | {parts} | {line[:90]}"
        if not self.watched:
            self.say(text)
            return
        with self.lock:
            width = os.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", flush=True)
            self.pending = True


@contextmanager
def signals_stop(stop: threading.Event, say: Say) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM set `stop`; the list holds the signal that came."""
    came: list[int] = []

    def note(signum: int, frame: object) -> None:
        say("stopping: the machines are emptied and ended, which takes a moment")
        came.append(signum)
        stop.set()

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def live_all(
    shards: list[Shard], desk: Desk, reporter: Reporter
) -> tuple[dict[int, Exception], int | None]:
    """Runs all shards to their ends: what went wrong, by shard, and the signal that came."""
    wrong: dict[int, Exception] = {}

    def live(shard: Shard) -> None:
        try:
            shard.live()
        except Exception as error:  # kept: the other shards go on, the caller tells
            wrong[shard.record.shard] = error
            if not isinstance(error, Stopped):
                reporter.say(f"shard {shard.record.shard}: {said(error)}")

    with signals_stop(desk.stop, reporter.say) as came:
        threads = [threading.Thread(target=live, args=(shard,)) for shard in shards]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.2) if threads[0].is_alive() else time.sleep(0.2)
            reporter.progress(shards)
    return wrong, came[0] if came else None


def said(error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, OverBudget):
        return "what is left of --max-total pays for no further machine: raise it"
    if isinstance(error, Unavailable):
        return f"{error}: look with `status`, end with `destroy` or `reap`"
    known = isinstance(error, (UserError, Failed, Stopped))
    return str(error) if known else f"{type(error).__name__}: {error}"


def left_over(desk: Desk) -> str:
    """Whether a machine of the run still lives, as the service lists it."""
    living = desk.instances(fresh=True)
    if not living:
        return "no machine of it is left"
    names = ", ".join(f"{i.id} until {time.ctime(i.label.expires)}" for i in living)
    return f"STILL BILLING: instance {names}"


# --- one table ---


def merge_at_home(shards: list[Shard], command: list[str], output_dir: Path, say: Say) -> int:
    """Puts the shards' results into output_dir and lets the script merge them; its exit code."""
    if not (output_dir / "DONE").exists():
        merge([shard.results for shard in shards], output_dir)
    code = 0
    if not (output_dir / "DONE").exists():
        words = [*command[1:], "--output-dir", str(output_dir.resolve())]
        if importlib.util.find_spec("torch") is None:
            say(f"torch is missing here. Where it is, this merges: python {shlex.join(words)}")
            code = 1
        else:
            code = subprocess.run([sys.executable, *words], cwd=shards[0].job.root).returncode
    runs = sorted((output_dir / "wandb").glob("offline-run-*"))
    if runs:
        say(
            f"{len(runs)} W&B runs, offline; to upload: wandb sync {output_dir}/wandb/offline-run-*"
        )
    say(f"results: {output_dir}")
    return code
