"""A user with a checkout and a rental market on loopback, and what must hold after every sweep.

The machines run `tiny_job.py`, which keeps the contract of the scripts (--shard, --output-dir, the
same command resumes, without --shard it merges) and takes a second, so that hundreds of sweeps can
be made to fail. test_vastai_utils.py runs the real toy script once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from builders.scripts import ROOT, Done, Process, Server, served
from builders.vast.instance import missing_tools, script, ssh_user
from builders.vast.server import FakeVast

TINY_JOB = '''
"""Six cells of some work each, in the way of the scripts."""
import argparse, hashlib, json, os, pathlib, sys, time

flags = argparse.ArgumentParser()
flags.add_argument("--shard", default="")
flags.add_argument("--output-dir", required=True)
flags.add_argument("--seconds", type=float, default=0.1)  # of a cell
flags.add_argument("--hold", default="")  # from cell 3 on it waits while this file exists
flags.add_argument("--exit", type=int, default=0)
cfg = flags.parse_args()
out = pathlib.Path(cfg.output_dir)
for name in ("cells", "checkpoints/a"):
    (out / name).mkdir(parents=True, exist_ok=True)

def write(path, text):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)

write(out / "config.json", json.dumps({"argv": sys.argv[1:]}))
index, count = map(int, cfg.shard.split("/")) if cfg.shard else (1, 1)
for cell in range(index - 1, 6, count):
    path = out / "cells" / f"cell-{cell}.json"
    if path.exists():
        continue
    if not cfg.shard and "SPARSE_CODING_GIT_STATE" not in os.environ:
        sys.exit("cells are missing")  # here nothing is trained: all must have come from there
    while cell >= 3 and cfg.hold and os.path.exists(cfg.hold):
        open(cfg.hold + ".reached", "w").close()
        time.sleep(0.02)
    value = b""
    for step in range(5):  # a checkpoint per step, from which a resume goes on
        checkpoint = out / "checkpoints" / "a" / f"{cell}.safetensors"
        done = {"step": 0, "value": ""}
        if checkpoint.exists():
            done = json.loads(checkpoint.read_text())
        if done["step"] > step:
            continue
        time.sleep(cfg.seconds / 5)
        value = hashlib.sha256(f"{done['value']} {cell} {step}".encode()).hexdigest()
        write(checkpoint, json.dumps({"step": step + 1, "value": value}))
    write(path, json.dumps({"cell": cell, "value": value}))
    checkpoint.unlink()
    with open(out / f"metrics-{index}.jsonl", "a") as file:
        file.write(json.dumps({"cell": cell}) + "\\n")
    print(f"cell {cell}", flush=True)
if cfg.exit:
    print("RuntimeError: the job went wrong", file=sys.stderr)
    sys.exit(cfg.exit)
if not cfg.shard:
    rows = [json.loads((out / "cells" / f"cell-{c}.json").read_text()) for c in range(6)]
    lines = ["cell,value", *(f"{row['cell']},{row['value']}" for row in rows)]
    write(out / "results.csv", "\\n".join(lines) + "\\n")
    write(out / "DONE", "")
'''
JOB = ["--", "python", "tiny_job.py"]
FAST = ["--yes", "--no-need-gpu", "--poll-seconds", "0.2", "--api-spacing", "0.02",
        "--max-dph", "0.5", "--max-total", "1", "--max-hours", "0.05", "--pull-minutes", "0.005",
        "--image-gb", "0", "--start-minutes", "0.5", "--lost-minutes", "0.5"]  # fmt: skip
HASTY = ["--start-minutes", "0.05", "--lost-minutes", "0.1"]  # where a machine is to be given up
QUICK = {"sparse_coding.rental.market.TIMEOUT": 1.5, "sparse_coding.rental.remote.PAUSE": 0.2,
         "sparse_coding.rental.remote.USER": ssh_user()}  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_" + 6 * "Canary", "OTHER": "other-canary-1d6b"}
API_KEY = "account-canary-52f0c1"
OFFERS = [
    {"gpu_name": "RTX 3090", "dph_base": 0.1 + 0.01 * i, "machine_id": 10 + i, "min_bid": 0.05}
    for i in range(8)
]


@contextlib.contextmanager
def rental_server(folder: Path) -> Iterator[Server]:
    """Forks vastai_utils.py of a checkout: a git one with the package, a script and tiny_job.py.

    A secret lies there untracked. Skips where sshd or rsync is missing; in CI that is a failure.
    """
    reason = missing_tools()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("vastai_utils.py", "replicate_toy_models.py", ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparse_coding", checkout / "sparse_coding", ignore=ignored)
    (checkout / "requirements.txt").write_text("")
    (checkout / "tiny_job.py").write_text(TINY_JOB)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        git(checkout, "-c", "user.name=a", "-c", "user.email=a@b.invalid", *words)
    (checkout / "secrets.json").write_text(json.dumps({"OTHER": SECRETS["OTHER"]}))
    (checkout / "secrets.json").chmod(0o600)
    (checkout / "notes.txt").write_text("untracked-canary-77aa")
    with served(checkout / "vastai_utils.py", folder, patch=QUICK, modules=("vastai",)) as server:
        yield server


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@dataclass
class User:
    """A checkout, and a market to rent from."""

    lab: FakeVast
    checkout: Path
    server: Server
    commands: set[str] = field(default_factory=set)  # lines of /proc/*/cmdline that were seen

    def start(self, *words: str, env: dict[str, str] | None = None, **options: object) -> Process:
        """vastai_utils.py with these words; options: those of Server.start."""
        known = {"VAST_URL": self.lab.url, "VAST_API_KEY": API_KEY, "no_proxy": "127.0.0.1",
                 "HF_TOKEN": SECRETS["HF_TOKEN"], "HOME": str(self.checkout.parent)}  # fmt: skip
        script = self.checkout / "vastai_utils.py"
        where = dict(cwd=self.checkout, env=known | (env or {}), script=script)
        return self.server.start(*words, **where, **options)

    def call(self, *words: str) -> Done:
        return self.start(*words).wait(60)

    def start_sweep(
        self, *flags: str, instances: int = 2, job: list[str] = JOB, **options: object
    ) -> Process:
        return self.start("sweep", "--instances", instances, *FAST, *flags, *job, **options)

    def sweep(self, *flags: str, timeout_s: float = 60, **options: object) -> Done:
        return self.start_sweep(*flags, **options).wait(timeout_s)

    def rent(self, label: str) -> int:
        """A machine of which no file here knows: its number."""
        offer = next(o["id"] for o in self.lab.offers() if self.lab.market.on_sale(o["id"]))
        return self.lab.market.create(offer, {"label": label, "image": "image"}).number

    # --- a job that waits ---

    @property
    def hold(self) -> Path:
        """While this file exists, a job of held() waits before its cell 3."""
        return self.checkout.parent / "hold"

    def held(self) -> list[str]:
        """The tiny job, waiting before its cell 3 until let_go()."""
        self.hold.touch()
        return [*JOB, "--hold", self.hold]

    def let_go(self) -> None:
        self.hold.unlink()

    def until_held(self, process: Process) -> None:
        """Waits until the job on a machine waits before its cell 3."""
        process.wait_until(self.hold.with_name("hold.reached").exists)

    def until_fetched(self, process: Process) -> None:
        """Waits until the cells before the hold have been fetched, verified."""
        process.wait_until(lambda: any(self.folder.glob("*/results-1/cells/cell-2.json")))

    # --- what there is afterwards ---

    @property
    def folder(self) -> Path:
        return self.checkout / "rentals"

    @property
    def output(self) -> Path:
        """Where the results of the one run are."""
        (folder,) = (self.checkout / "outputs").iterdir()
        return folder

    def trained(self) -> int:
        """Cells of the first shard that were trained, each as often as it was."""
        return len((self.output / "metrics-1.jsonl").read_text().splitlines())

    def records(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*/shard-*.json"))]


@contextlib.contextmanager
def renting(tmp_path: Path, server: Server, **config: object) -> Iterator[User]:
    """A user in a market of eight RTX 3090."""
    checkout = tmp_path / "checkout"
    shutil.copytree(server.folder / "checkout", checkout, symlinks=True)
    with FakeVast(tmp_path / "lab", offers=OFFERS, api_key=API_KEY, **config) as lab:
        one_thread = "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE"  # as here: the same last bits
        run = f'#!/bin/sh\n{one_thread} exec {sys.executable} "$@"\n'
        script(lab.root / "bin" / "python3", run)
        user = User(lab, checkout, server)
        with watched_commands(user.commands):
            yield user


class Screen:
    """A terminal of one's own to print to: `name`, as Server.start's stdout."""

    def __init__(self):
        self.near, self.far = os.openpty()
        self.name = os.ttyname(self.far)

    def stop(self) -> None:
        """Ctrl-S: whoever prints waits."""
        termios.tcflow(self.far, termios.TCOOFF)

    def go_on(self) -> None:
        """Ctrl-Q."""
        termios.tcflow(self.far, termios.TCOON)

    def close(self) -> None:
        """The window is closed: whoever prints gets an error."""
        os.close(self.near)


@contextlib.contextmanager
def watched_commands(seen: set[str]) -> Iterator[None]:
    """Notes the command line of every process, many times a second."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for name in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    line = Path("/proc", name, "cmdline").read_bytes()
                    seen.add(line.replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def expected_rows() -> str:
    """results.csv of the tiny job, computed here."""
    lines = ["cell,value"]
    for cell in range(6):
        value = ""
        for step in range(5):
            value = hashlib.sha256(f"{value} {cell} {step}".encode()).hexdigest()
        lines.append(f"{cell},{value}")
    return "\n".join(lines) + "\n"


def assert_nothing_lives(user: User, most: float = 1.0) -> None:
    """No instance is left, and no more was spent than --max-total allows."""
    assert user.lab.live() == []
    assert sum(row["total"] for row in user.lab.ledger()) <= most


def assert_whole(user: User, done: Done, machines: int | None = None) -> None:
    """The sweep is complete: the same table, nothing left, so many machines bought."""
    assert done.code == 0, done.out + done.err
    assert (user.output / "results.csv").read_text() == expected_rows()
    assert_nothing_lives(user)
    assert machines in (None, len(user.lab.ledger())), done.out


def assert_no_secret_shows(user: User, *outputs: str) -> None:
    """In no request, command line, output, file of the checkout, or file that was pushed."""
    texts = {"requests": json.dumps(user.lab.requests()), "commands": "\n".join(user.commands)}
    texts |= {f"output {i}": text for i, text in enumerate(outputs)}
    files = [
        p for p in user.checkout.rglob("*") if ".git" not in p.relative_to(user.checkout).parts
    ]
    pushed = list(user.lab.root.glob("i*/home/**/*"))  # what is kept in memory there is elsewhere
    assert pushed
    assert {"secrets.json", "notes.txt"}.isdisjoint(path.name for path in pushed)
    for path in [*files, *pushed]:
        if path.is_file() and path.name != "secrets.json":
            texts[str(path)] = path.read_text(errors="replace")
    for where, text in texts.items():
        for canary in [*SECRETS.values(), API_KEY]:
            assert canary not in text, f"{canary} is in {where}"
