"""A sweep on rented machines: opened from its files, priced, all shards at once, one table."""

import difflib
import importlib.util
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import Interrupted, UserError, fingerprint, pick, require
from sparse_coding.files import sha256, write_json, written_whole
from sparse_coding.rental.controller import Controller, Job
from sparse_coding.rental.market import RUN_NAME, Market, Offer, Terms, Unavailable, find_key
from sparse_coding.rental.preflight import (
    git_state,
    require_script,
    require_tools,
    secrets_for,
    tracked_files,
)
from sparse_coding.rental.provisioner import Provisioner, at_once, say
from sparse_coding.rental.records import GRACE_H, Cost, Ledger, RentalError, printable, read_plan
from sparse_coding.rental.remote import Results, Stopped, make_key, wrong_files
from sparse_coding.rental.remote_job import SUMS
from sparse_coding.rental.settings import Settings
from sparse_coding.sweep.run_folder import GIT_STATE, locked

RENTALS = Path("rentals")  # a folder per run: its plan, prices, results on their way
OF_ONE_SHARD = {"config.json", "metrics.jsonl"}  # written by every shard, with its own command


@dataclass
class Run:
    """The shards of a run with what they share."""

    provisioner: Provisioner
    shards: list[Controller]
    output_dir: Path
    interrupted: Interrupted | None = None  # by a signal in at_once

    @property
    def name(self) -> str:
        """Its records are in rentals/<name>/."""
        return self.provisioner.run

    @property
    def ledger(self) -> Ledger:
        """The money of all its attempts."""
        return self.provisioner.ledger

    # --- the price ---

    def agree(self, cfg: Settings) -> bool:
        """Says the price and asks; False for --dry-run. Raises UserError if it is above the caps,
        or nobody agrees."""
        offers = self._offers()
        print(f"{self.name}: {len(self.shards)} shards, {len(offers)} machines to rent")
        for offer in offers:
            print(f"  {offer}")
        self._say_price(offers, cfg.hours)
        if cfg.dry_run:
            print("dry run: nothing bought")
            return False
        if offers:
            confirm(cfg.yes)
        return True

    def _offers(self) -> list[Offer]:
        """One for each machine that is still to be rented. Raises UserError for too few."""
        living = {(i.label.shard, i.label.attempt) for i in self.provisioner.instances()}
        records = [shard.record for shard in self.shards if not shard.record.done]
        needed = [r for r in records if not r.current or (r.shard, r.current.number) not in living]
        offers = self.provisioner.suitable()[: len(needed)] if needed else []
        if needed and not offers:
            raise UserError(nearest_offers(self.provisioner.market, self.provisioner.terms))
        require(
            len(offers) == len(needed),
            f"{len(needed)} machines are needed, {len(offers)} fit the caps and minimums: lower "
            "--instances, or give more --gpu-names",
        )
        return offers

    def _say_price(self, offers: list[Offer], hours: float) -> None:
        """Raises UserError if the worst case exceeds --max-total."""
        terms, ledger, before = self.provisioner.terms, self.ledger, self.ledger.spent()
        traffic = dict(gb_up=terms.results_gb, gb_down=terms.image_gb)

        def price(h: float) -> Cost:
            costs = [o.rates.cost(running_h=h, existing_h=h, **traffic) for o in offers]
            return sum(costs, Cost())

        worst = price(terms.max_hours + GRACE_H)
        require(
            ledger.committed() + worst.total <= ledger.max_total + 1e-9,
            f"at most ${ledger.committed() + worst.total:.2f} (spent before: ${before.total:.2f}) "
            f"is above --max-total {ledger.max_total:g}: raise it, or lower --max-hours",
        )
        if before.total:
            print(f"spent before: {before}")
        print(f"expected, at {hours:g} h each: {price(hours)}")
        print(f"at most, if all live to their deadline of {terms.max_hours:g} h: {worst}")
        credit = self.provisioner.market.credit()
        if credit < worst.total:
            print(f"warning: the account's credit of ${credit:.2f} is less than that")

    # --- all shards at once ---

    def at_once(
        self, step: Callable[[Controller], None], shards: list[Controller] | None = None
    ) -> dict[Controller, Exception]:
        """Takes the step with all shards, or with some: what went wrong, by shard. A signal stops
        what can be stopped; if it did, it is kept in `interrupted`."""

        def told(shard: Controller) -> None:
            try:
                step(shard)
            except Exception as error:
                known = isinstance(error, (UserError, RentalError))
                if not isinstance(error, Stopped):
                    shard.say(str(error) if known else repr(error))
                raise

        with signals_stop(self.provisioner.stop) as came:
            wrong = at_once(told, shards or self.shards, report=lambda: say(self.progress()))
        if came and wrong:
            self.interrupted = Interrupted(came[0], "stopped: the same command goes on")
        return wrong

    def conclude(self, wrong: dict[Controller, Exception]) -> None:
        """Raises what tells most of what went wrong: that a machine may be left, then bad input, a
        signal, the failure of a shard."""
        errors = list(wrong.values())
        left = [str(error) for error in errors if isinstance(error, Unavailable)]
        if left:
            raise RentalError("; ".join(left))
        for error in errors:
            if isinstance(error, (UserError, OSError)):
                raise error
        if self.interrupted:
            raise self.interrupted
        if errors:
            failed = f"{len(wrong)} of {len(self.shards)} shards failed"
            raise RentalError(f"{failed}: the same command goes on")

    def progress(self) -> str:
        """What has been spent, what each shard is at, the last line of one of the jobs."""
        phases = ", ".join(f"{s.record.shard} {s.phase}" for s in self.shards)
        line = next((s.line for s in self.shards if s.line and not s.record.done), "")
        return f"${self.ledger.spent().total:.3f} | {phases} | {line[:90]}"

    def left_over(self) -> str:
        """Whether a machine of the run still lives, as the service lists it."""
        living = self.provisioner.instances()
        if not living:
            return "no machine of it is left"
        names = ", ".join(f"{i.id} until {time.ctime(i.label.expires)}" for i in living)
        return f"STILL BILLING: instance {names}"

    # --- one table ---

    def merge(self, command: list[str]) -> int:
        """Puts the shards' results together and lets the script merge them; its exit code."""
        done, code = self.output_dir / "DONE", 0
        if not done.exists():
            merge([shard.results for shard in self.shards], self.output_dir)
        if not done.exists():
            words = [*command[1:], "--output-dir", str(self.output_dir.resolve())]
            if importlib.util.find_spec("torch") is None:
                say(f"torch is missing here. Where it is, this merges: python {shlex.join(words)}")
                code = 1
            else:
                root = self.shards[0].job.root
                code = subprocess.run([sys.executable, *words], cwd=root).returncode
        runs = f"{self.output_dir}/wandb/offline-run-*"
        if any((self.output_dir / "wandb").glob("offline-run-*")):
            say(f"W&B runs were written to disk; to upload: wandb sync {runs}")
        say(f"results: {self.output_dir}")
        return code


def nearest_offers(market: Market, terms: Terms) -> str:
    """What to say when nothing is on offer: other names, or the cheapest price."""

    def search(query: dict) -> list[Offer]:
        return market.offers(query, disk_gb=terms.disk_gb, interruptible=terms.interruptible)

    named = search({"gpu_name": {"in": list(terms.gpu_names)}})
    asked = ", ".join(terms.gpu_names)
    if not named:
        names = sorted({offer.gpu_name for offer in search({})})
        near = difflib.get_close_matches(terms.gpu_names[0], names, 3, 0.4) or names[:6]
        require(bool(names), "vast.ai offers no machine at all just now: try again later")
        return f"no offer of {asked}: did you mean {', '.join(near)}?"
    return (
        f"none of {len(named)} offers of {asked} fits the caps and minimums (--max-dph "
        f"{terms.max_dph:g}, ...); the cheapest of them costs ${named[0].rates.hourly:.3f}/h"
    )


def confirm(yes: bool) -> None:
    """Raises UserError unless --yes or a y at the terminal."""
    if yes:
        return
    require(sys.stdin.isatty(), "nobody is there to confirm the price: add --yes to accept it")
    require(input("rent? [y/N] ").strip().lower() in ("y", "yes"), "not confirmed: nothing bought")


@contextmanager
def signals_stop(stop: threading.Event) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and, but for nohup, a closed terminal set `stop`; the list holds the first
    that came."""
    came: list[int] = []

    def note(signum: int, frame: object) -> None:
        if not came:  # and nothing else: what is interrupted may hold any lock, that of `stop` too
            came.append(signum)
            stop.set()

    def tell() -> None:
        stop.wait()
        if came:
            say("stopping: the machines are emptied and ended, which takes a moment")

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup: it outlives its terminal
        wanted.append(signal.SIGHUP)
    before = {s: signal.signal(s, note) for s in wanted}
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def merge(shards: list[Results], folder: Path) -> None:
    """Puts the shards' files into one folder, where the script then merges their cells. Raises
    UserError for two different results of one cell, or files that are not what they were."""
    for results in shards:
        wrong = wrong_files(results.verified)
        if wrong:
            raise UserError(f"{wrong[0]} has changed since it was fetched: remove the folder "
                            f"{results.verified} and give the same command again")  # fmt: skip
        for source in sorted(p for p in results.verified.rglob("*") if p.is_file()):
            name = source.relative_to(results.verified)
            target = folder / name
            if str(name) == SUMS or (str(name) in OF_ONE_SHARD and target.exists()):
                continue
            in_the_way = target.is_dir() or any(p.is_file() for p in target.parents)
            if in_the_way or (target.exists() and sha256(target) != sha256(source)):
                # a cell twice with different numbers is a fault to look at, not to paper over
                raise UserError(f"{target} is there already with other contents than {source}")
            if not target.exists():
                with written_whole(target) as temporary:
                    shutil.copy2(source, temporary)


# --- from constants and files ---


def open_market(cfg: Settings, *, looking: bool = False) -> Market:
    """The service, with the user's key. Raises UserError if there is none."""
    return Market(find_key(), spacing=cfg.api_spacing, looking=looking)


def terms_of(cfg: Settings, *, renting: bool = False) -> Terms:
    """Raises UserError for a cap that is missing where money is to be spent."""
    for name, what in (("max_dph", "per hour and machine"), ("max_total", "in all")):
        flag = "--" + name.replace("_", "-")
        missing = renting and getattr(cfg, name) is None
        require(not missing, f"{flag} is missing: say how many dollars {what} may be spent")
    cap = math.inf if cfg.max_dph is None else cfg.max_dph
    gpus = tuple(name.replace("_", " ") for name in cfg.gpu_names)
    return pick(Terms, cfg, max_dph=cap, gpu_names=gpus)


def open_run(
    cfg: Settings, command: list[str], root: Path, *, renting: bool = False,
    alone: ExitStack | None = None,
) -> Run:  # fmt: skip
    """The run that the command or --run names, made if it is to be rented for.

    alone: holds, from before its records are read, the lock that keeps other commands out
    Raises:
        UserError: something is missing here, the name is that of another run, or another command
            holds the lock.
    """
    require_tools()
    terms = terms_of(cfg, renting=renting)
    files = tracked_files(root, find_key())
    if command:
        require_script(command, root, files)
    name = _name_of(cfg, command, renting=renting)
    folder, secrets = RENTALS / name, secrets_for(cfg.send_env, root)
    market = open_market(cfg)
    make_key(Path(cfg.ssh_key))
    if renting:
        plan = _claim(folder, {"command": command, "instances": cfg.instances}, root)
    else:
        plan = read_plan(folder) | ({"command": command} if command else {})
    if alone is not None:
        alone.enter_context(locked(folder))
    ledger = Ledger(folder, plan["instances"], cfg.max_total or math.inf)
    provisioner = Provisioner(market, name, terms, ledger, cfg.poll_seconds, cfg.api_spacing)
    shards = []
    for record in ledger.shards:
        job = Job(
            command=_words(plan, record.shard, name), env=_environment(root, secrets),
            output_dir=f"outputs/{name}", root=root, files=files, secrets=secrets,
            need_gpu=cfg.need_gpu,
        )  # fmt: skip
        shards.append(Controller(provisioner, record, job, key=Path(cfg.ssh_key)))
    return Run(provisioner, shards, Path("outputs") / name)


def _name_of(cfg: Settings, command: list[str], *, renting: bool) -> str:
    """--run; or a name that the same command has again; or the run that was opened last."""
    name = cfg.run
    if not name and command:
        constants = {"command": tuple(command), "shards": cfg.instances}
        name = f"{Path(command[1]).stem}-{fingerprint(constants)}"
    elif not name:
        name = "by-hand" if renting else newest_run()
    good = re.fullmatch(RUN_NAME, name)  # it becomes a part of labels, and a folder
    require(bool(good), f"--run {printable(name)} must be letters, digits, - _ and . only, 100 at "
            "most, the first a letter, digit or _")  # fmt: skip
    return name


def newest_run() -> str:
    """The run that was opened last. Raises UserError if there is none."""
    plans = sorted(RENTALS.glob("*/plan.json"), key=lambda p: p.stat().st_mtime)
    require(bool(plans), f"no run in {RENTALS}/ yet: sweep or launch one, or give --run")
    return plans[-1].parent.name


def _words(plan: dict, shard: int, name: str) -> list[str]:
    """The command of one shard, as it is run there."""
    if not plan["command"]:
        return []
    words = ["python", *plan["command"][1:], "--output-dir", f"outputs/{name}"]
    return words + (["--shard", f"{shard}/{plan['instances']}"] if plan["instances"] > 1 else [])


def _environment(root: Path, secrets: bytes) -> dict[str, str]:
    """Of the job: W&B writes to disk unless it is sent a key; there is no git checkout there."""
    state = {name: value for name, value in git_state(root).items() if name != "git_diff"}
    offline = {} if b"WANDB_API_KEY=" in secrets else {"WANDB_MODE": "offline"}
    return {GIT_STATE: json.dumps(state)} | offline


def _claim(folder: Path, plan: dict, root: Path) -> dict:
    """Notes what the run is. Raises UserError if the name belongs to another one."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    known = read_plan(folder) if (folder / "plan.json").exists() else plan
    for key in plan:
        require(known[key] == plan[key], f"--run {folder.name} has {key} {known[key]}, not "
                f"{plan[key]}: choose another name")  # fmt: skip
    write_json(folder / "plan.json", plan | {"began": time.time(), **git_state(root)})
    return plan
