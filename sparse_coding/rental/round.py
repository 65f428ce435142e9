"""A run on rented machines, opened from its constants and its files."""

import json
import math
import re
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparse_coding.config import UserError, pick, require
from sparse_coding.rental import fleet
from sparse_coding.rental.desk import Desk
from sparse_coding.rental.machine import Patience
from sparse_coding.rental.market import Market, find_key
from sparse_coding.rental.preflight import (
    git_state,
    require_script,
    require_tools,
    secrets_for,
    tracked_files,
)
from sparse_coding.rental.records import Budget, Records
from sparse_coding.rental.remote import make_key
from sparse_coding.rental.shard import Job, Shard
from sparse_coding.rental.terms import Terms
from sparse_coding.sweep.run_folder import GIT_STATE

WATCH_SECONDS = 20  # between two looks at the clock of a machine that ends itself, at most


@dataclass
class Round:
    """The shards of a run with what they share."""

    desk: Desk
    shards: list[Shard]
    reporter: fleet.Reporter
    output_dir: Path

    def agree(self, cfg: object) -> bool:
        """Says the price and asks; False for --dry-run.

        Raises:
            UserError: it is above the caps, or nobody agreed.
        """
        price = fleet.quote(self.desk, self.shards, hours=cfg.hours)
        print(f"{self.desk.run}: {len(self.shards)} shards, {len(price.offers)} machines to rent")
        for line in price.lines(self.desk.terms, cfg.hours, self.desk.market.credit()):
            print(line)
        if cfg.dry_run:
            print("dry run: nothing bought")
            return False
        if price.offers:
            fleet.confirm(cfg.yes)
        return True


def open_market(cfg: object) -> Market:
    return Market(find_key(), spacing=cfg.api_spacing)


def terms_of(cfg: object, *, renting: bool = False) -> Terms:
    """Raises UserError for a cap that is missing where money is to be spent."""
    for name in ("max_dph", "max_total") if renting else ():
        flag = "--" + name.replace("_", "-")
        what = "per hour and machine" if name == "max_dph" else "in all"
        missing = getattr(cfg, name) is None
        require(not missing, f"{flag} is missing: say how many dollars {what} may be spent")
    cap = math.inf if cfg.max_dph is None else cfg.max_dph
    gpus = tuple(name.replace("_", " ") for name in cfg.gpu_names)
    return pick(Terms, cfg, max_dph=cap, gpu_names=gpus)


def open_round(cfg: object, command: list[str], root: Path, *, renting: bool) -> Round:
    """The run that the command or --run names, made if it is to be rented for.

    Raises:
        UserError: something is missing at home, or the run is another one.
    """
    require_tools()
    terms = terms_of(cfg, renting=renting)
    files = tracked_files(root)
    if command:
        require_script(command, root, files)
    name = _name_of(cfg, command, renting=renting)
    records = Records(fleet.RENTALS / name)
    secrets = secrets_for(cfg.send_env, root)
    market = open_market(cfg)
    make_key(Path(cfg.ssh_key))
    plan = {"command": command, "instances": cfg.instances}
    if renting:
        _claim(records, plan, root)
    else:
        plan = records.plan() | ({"command": command} if command else {})
    reporter = fleet.Reporter()
    shard_records = [records.load(i + 1) for i in range(plan["instances"])]
    every = int(max(1, min(WATCH_SECONDS, 2 * cfg.poll_seconds)))
    desk = Desk(
        market=market, run=name, terms=terms, records=records,
        budget=Budget(cfg.max_total or math.inf, shard_records),
        onstart=partial(fleet.onstart, every=every), poll_seconds=cfg.poll_seconds,
        scale=cfg.api_spacing, stop=threading.Event(), say=reporter.say,
    )  # fmt: skip
    shards = []
    for record in shard_records:
        job = Job(
            command=_words(plan, record.shard, name), env=_environment(root, secrets),
            output_dir=f"outputs/{name}", root=root, files=files, secrets=secrets,
            need_gpu=cfg.need_gpu,
        )  # fmt: skip
        shards.append(Shard(desk, record, job, pick(Patience, cfg), key=Path(cfg.ssh_key)))
    return Round(desk, shards, reporter, Path("outputs") / name)


def _name_of(cfg: object, command: list[str], *, renting: bool) -> str:
    """--run, or the name that the command has, or that of the run opened last."""
    name = cfg.run or (fleet.run_name(command, cfg.instances) if command else newest_run(renting))
    good = re.fullmatch(r"[\w.-]{1,100}", name)  # it becomes a part of labels
    require(bool(good), f"--run {name} must be letters, digits, - _ and . only, 100 at most")
    return name


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


def _claim(records: Records, plan: dict, root: Path) -> None:
    """Notes what the run is. Raises UserError if the name belongs to another one."""
    records.make()
    path = records.folder / "plan.json"
    if path.exists():
        known = records.plan()
        for key in plan:
            require(known[key] == plan[key], f"--run {records.folder.name} has {key} {known[key]}, "
                    f"not {plan[key]}: choose another name")  # fmt: skip
    records.write_plan(plan | {"began": time.time(), **git_state(root)})


def newest_run(renting: bool) -> str:
    """The run that was opened last. Raises UserError if there is none."""
    if renting:
        return "by-hand"
    plans = sorted(fleet.RENTALS.glob("*/plan.json"), key=lambda p: p.stat().st_mtime)
    if not plans:
        raise UserError(f"no run in {fleet.RENTALS}/ yet: sweep or launch one, or give --run")
    return plans[-1].parent.name
