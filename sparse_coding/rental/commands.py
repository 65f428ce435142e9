"""The commands of vastai_utils.py: functions of its constants, of what stands after --, and of the
checkout's folder; each returns an exit code."""

import contextlib
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sparse_coding.config import UserError, require
from sparse_coding.rental.controller import Controller
from sparse_coding.rental.market import Instance, Unavailable, find_key
from sparse_coding.rental.preflight import USAGE, require_tools, tracked_files
from sparse_coding.rental.provisioner import MachineLost, at_once, say
from sparse_coding.rental.records import Ledger, RentalError, printable, read_plan
from sparse_coding.rental.remote import REMOTE_DIR, RemoteError, Stopped, make_key
from sparse_coding.rental.run import (
    RENTALS,
    Run,
    merge,
    nearest_offers,
    open_market,
    open_run,
    signals_stop,
    terms_of,
)
from sparse_coding.rental.settings import Settings

LONGEST_LINE = 2000  # characters of a log, which is a stranger's

# --- looking ---


def doctor(cfg: Settings, command: list[str], root: Path) -> int:
    """Everything that a sweep needs, tried without buying."""
    require_tools()
    pushed = tracked_files(root, find_key())
    print(f"tools: ssh and rsync are there; {len(pushed)} files would be pushed")
    market = open_market(cfg, looking=True)
    print(f"account: the key works, credit ${market.credit():.2f}")
    make_key(Path(cfg.ssh_key))
    print(f"ssh key: {cfg.ssh_key}.pub, attached to each machine when it runs")
    offers = market.offers({}, disk_gb=cfg.disk_gb, interruptible=False)
    print(f"search: {len(offers)} offers of any kind")
    living = market.instances()
    print(f"list: {len(living)} machines of ours live{' (see status)' if living else ''}")
    print("all well. Smallest real test, some cents: sweep --max-dph 0.3 --max-total 0.10 "
          "--max-hours 0.3 -- python replicate_toy_models.py --preset smoke")  # fmt: skip
    return 0


def search(cfg: Settings, command: list[str], root: Path) -> int:
    """Suitable offers, the cheapest first, with what they cost for --hours."""
    market, terms = open_market(cfg, looking=True), terms_of(cfg)
    offers = market.offers(terms.query(), disk_gb=cfg.disk_gb, interruptible=cfg.interruptible)
    offers = [offer for offer in offers if offer.rates.hourly <= terms.max_dph]
    if not offers:
        raise UserError(nearest_offers(market, terms))
    print(f"in all: {cfg.hours:g} h with {cfg.disk_gb:g} GB of disk, traffic of {cfg.image_gb:g} "
          f"GB down and {cfg.results_gb:g} GB up")  # fmt: skip
    for offer in offers[:20]:
        total = offer.rates.hourly * cfg.hours + terms.traffic(offer.rates)
        print(f"  ${total:.3f} in all: {offer}")
    return 0


def status(cfg: Settings, command: list[str], root: Path) -> int:
    """What of ours lives, what it has cost, when it ends."""
    living = open_market(cfg, looking=True).instances()
    for instance in living:
        print(_status_line(instance))
    if not living:
        print("no machine of ours lives")
    for plan in sorted(RENTALS.glob("*/plan.json")):
        ledger = Ledger(plan.parent, read_plan(plan.parent)["instances"])
        n_done, n = sum(shard.done for shard in ledger.shards), len(ledger.shards)
        print(f"{plan.parent.name}: {n_done} of {n} shards done, {ledger.spent()}")
    return 0


def _status_line(instance: Instance) -> str:
    label, notes = instance.label, []
    if label is None:
        return f"instance {instance.id}: {instance.status}, a label that is none of ours now"
    record = Ledger(RENTALS / label.run, label.shard).shards[-1]
    attempts = [a for a in record.attempts if a.id == instance.id]
    left = label.expires - time.time()
    if left < 0:
        notes.append("OVERDUE: reap ends it")
    if not attempts:
        notes.append("not rented from here")
    elif record.current not in attempts:
        notes.append("a stray: reap or destroy it")
    if instance.status != "running":
        notes.append("its disk is billed in this state too")
    cost = f", ${attempts[0].cost(time.time()).total:.3f} so far" if attempts else ""
    return (
        f"instance {instance.id}: {label.run} shard {label.shard}, {instance.status}, "
        f"{instance.gpu_name}, ${instance.dph_total:.3f}/h{cost}, ends itself in "
        f"{max(left, 0) / 60:.0f} min, GPU {instance.gpu_util:.0f} %"
        + "".join(f"; {note}" for note in notes)
    )


# --- a whole sweep ---


def sweep(cfg: Settings, command: list[str], root: Path) -> int:
    """Rents, trains, fetches, ends, merges."""
    require(bool(command), USAGE)
    with _alone(cfg, command, root, renting=True) as opened:
        living = opened.provisioner.instances()
        done = (opened.output_dir / "DONE").exists() and all(s.record.done for s in opened.shards)
        if done and not living:
            print(f"done before: {opened.output_dir / 'report.html'}; no machine of it is left")
            return 0
        if not opened.agree(cfg):
            return 0
        wrong = opened.at_once(Controller.complete)
        code = 1 if wrong else opened.merge(command)
        say(f"this sweep cost about {opened.ledger.spent()}")
        say(opened.left_over())
        opened.conclude(wrong)
        return code


@contextlib.contextmanager
def _alone(
    cfg: Settings, command: list[str], root: Path, *, renting: bool = False
) -> Iterator[Run]:
    """open_run, with the run's records to itself."""
    with contextlib.ExitStack() as lock:
        yield open_run(cfg, command, root, renting=renting, alone=lock)


# --- by hand ---


def launch(cfg: Settings, command: list[str], root: Path) -> int:
    """Machines, reached and set up, for `run`. They end themselves after --max-hours."""
    with _alone(cfg, command, root, renting=True) as opened:
        if not opened.agree(cfg):
            return 0
        wrong = opened.at_once(Controller.get_ready)
        if wrong:
            wrong |= opened.at_once(lambda s: opened.provisioner.end(s.record, "launch failed"))
            say(opened.left_over())
            opened.conclude(wrong)
    print(f"ready: python vastai_utils.py run --run {opened.name} -- python ...")
    return 0


def sync(cfg: Settings, command: list[str], root: Path) -> int:
    """Pushes what git tracks to the machines of the run."""
    for shard in _reached(cfg, open_run(cfg, [], root)):
        shard.remote.push(root, shard.job.files)
        print(f"shard {shard.record.shard}: {len(shard.job.files)} files are there")
    return 0


def copy_models(cfg: Settings, command: list[str], root: Path) -> int:
    """Pushes models/ to the machines of the run."""
    models = root / "models"
    require(models.is_dir(), f"{models} is missing: nothing to push")
    for shard in _reached(cfg, open_run(cfg, [], root)):
        shard.remote.push_folder(models, f"{REMOTE_DIR}/models")
        print(f"shard {shard.record.shard}: models/ is there")
    return 0


def run(cfg: Settings, command: list[str], root: Path) -> int:
    """Starts the command on the machines of the run, a shard on each."""
    require(bool(command), USAGE)
    with _alone(cfg, command, root) as opened:
        for shard in _reached(cfg, opened):
            shard.submit()
            print(f"shard {shard.record.shard}: runs {shlex.join(shard.job.command)}")
    return 0


def logs(cfg: Settings, command: list[str], root: Path) -> int:
    """The last lines of the job; --follow: and those to come."""
    for shard in _reached(cfg, open_run(cfg, [], root)):
        tail = "tail -n 40 " + ("-f " if cfg.follow else "") + ".sae/job.log"
        command = shard.remote.ssh_command(tail)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as log:
            for line in iter(lambda: log.stdout.readline(LONGEST_LINE), ""):
                print(printable(line, LONGEST_LINE), flush=True)
    return 0


def fetch(cfg: Settings, command: list[str], root: Path) -> int:
    """Fetches the results as they are now, verified."""
    with _alone(cfg, [], root) as opened:
        shards = _reached(cfg, opened)
        opened.conclude(opened.at_once(Controller.pull, shards))
        merge([shard.results for shard in shards], opened.output_dir)
    print(f"fetched: {opened.output_dir}")
    return 0


def ssh(cfg: Settings, command: list[str], root: Path) -> int:
    """A shell on the machine of a shard, or what stands after --."""
    shard = _reached(cfg, open_run(cfg, [], root))[0]
    words = shard.remote.ssh_command(*command)
    os.execvp(words[0], words)


def _reached(cfg: Settings, opened: Run) -> list[Controller]:
    """Those of --shard whose machines live, with ssh to them. Raises RentalError if one can't be
    reached, UserError if none lives."""
    reached = []
    for shard in opened.shards:
        instances = opened.provisioner.instances(shard.record.shard)
        if cfg.shard in (0, shard.record.shard) and instances:
            _reach(shard, instances[0])
            reached.append(shard)
    require(bool(reached), f"no machine of {opened.name} lives: see status")
    return reached


def _reach(shard: Controller, instance: Instance) -> None:
    require(bool(instance.endpoints), f"instance {instance.id} is {instance.status}: wait")
    shard.connect(instance)
    with contextlib.suppress(Unavailable):
        if not shard.reach(instance):
            shard.remote.run("true")


# --- ending ---


def destroy(cfg: Settings, command: list[str], root: Path) -> int:
    """Ends the machines of a run, after a fetch unless --discard."""
    with signals_stop(threading.Event()), _alone(cfg, command, root) as opened:

        def empty(shard: Controller) -> None:
            instances = opened.provisioner.instances(shard.record.shard)
            if instances and not cfg.discard and not shard.record.done:
                try:
                    shard.phase = "fetching"
                    _reach(shard, instances[0])
                    shard.pull()
                except Stopped:
                    shard.pull_once_more()
                except (MachineLost, RemoteError) as error:
                    raise UserError(f"shard {shard.record.shard}: the results can't be fetched "
                                    f"({error}): add --discard to lose them") from None  # fmt: skip
            opened.provisioner.end(shard.record, "destroyed by hand")

        wrong = opened.at_once(empty)
        say(f"{opened.left_over()}; {opened.ledger.spent()}")
        opened.conclude(wrong)
    return 0


def reap(cfg: Settings, command: list[str], root: Path) -> int:
    """Ends every machine of ours that is past its deadline, from anywhere, without local files;
    --all: and those that are not."""
    market = open_market(cfg)

    def end(instance: Instance) -> None:
        say(f"ends {instance.id} ({instance.label or 'label unknown'}), {instance.status}")
        market.destroy(instance.id)
        if market.exists(instance.id):
            raise Unavailable(f"instance {instance.id} is still there, although ended")

    with signals_stop(threading.Event()):  # which nothing heeds: what was asked for is done
        living = market.instances()
        due = [i for i in living if cfg.all or (i.label and i.label.expires <= time.time())]
        wrong = at_once(end, due)
    if wrong:
        raise RentalError("; ".join(map(str, wrong.values())))
    print(f"{len(due)} ended" if due else "nothing to end")
    for instance in living:
        if instance not in due:
            print(f"not due: {_status_line(instance)}")
    return 0


VERBS = {"doctor": doctor, "search": search, "sweep": sweep, "launch": launch, "status": status,
         "sync": sync, "run": run, "logs": logs, "fetch": fetch, "ssh": ssh, "destroy": destroy,
         "reap": reap, "copy-models": copy_models, "copy-recent": fetch}  # fmt: skip
