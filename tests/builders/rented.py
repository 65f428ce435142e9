"""A user's checkout, a rental market on loopback, and what must hold after every sweep.

The machines run `tiny_job.py`, which keeps the contract of the scripts (--shard, --output-dir, the
same command resumes, without --shard it merges) and takes a second, so that hundreds of sweeps can
be made to fail. test_vastai_utils.py runs the real toy script once.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from builders.scripts import ROOT, Done, Process, Server
from vast_instance import missing_tools
from vast_server import lab_process

TINY_JOB = '''
"""Six cells of some work each, in the way of the scripts."""
import argparse, hashlib, json, os, pathlib, signal, sys, time

flags = argparse.ArgumentParser()
flags.add_argument("--shard", default="")
flags.add_argument("--output-dir", required=True)
flags.add_argument("--seconds", type=float, default=0.1)
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
        sys.exit("cells are missing")  # at home nothing is trained: all must have come from there
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
        "--image-gb", "0", "--start-minutes", "0.05", "--lost-minutes", "0.05"]  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_" + 6 * "Canary", "OTHER": "other-canary-1d6b"}
API_KEY = "account-canary-52f0c1"
OFFERS = [
    {"gpu_name": "RTX 3090", "dph_base": 0.1 + 0.01 * i, "machine_id": 10 + i, "min_bid": 0.05}
    for i in range(8)
]


def require_lab() -> None:
    """Skips where sshd or rsync is missing; in CI that is a failure."""
    reason = missing_tools()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def make_checkout(folder: Path, *more: str) -> Path:
    """A git checkout with vastai_utils.py, the package and tiny_job.py; a secret lies untracked.

    more: scripts of ours
    """
    folder.mkdir()
    for name in ("vastai_utils.py", ".gitignore", *more):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "sparse_coding",
        folder / "sparse_coding",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (folder / "requirements.txt").write_text("")
    (folder / "tiny_job.py").write_text(TINY_JOB)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b.invalid", "commit", "-qm", "a")
    (folder / "secrets.json").write_text(json.dumps({"OTHER": SECRETS["OTHER"]}))
    (folder / "secrets.json").chmod(0o600)
    (folder / "notes.txt").write_text("untracked-canary-77aa")
    return folder


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@dataclass
class World:
    """A checkout with a market: what a user has."""

    lab: object
    checkout: Path
    server: Server
    commands: set[str] = field(default_factory=set)  # lines of /proc/*/cmdline that were seen

    @property
    def env(self) -> dict[str, str]:
        return {
            "VAST_URL": self.lab.url,
            "VAST_API_KEY": API_KEY,
            "HF_TOKEN": SECRETS["HF_TOKEN"],
            "HOME": str(self.checkout.parent),
            "no_proxy": "127.0.0.1",
        }

    @property
    def script(self) -> Path:
        return self.checkout / "vastai_utils.py"

    def start(self, *words: str, env: dict[str, str] | None = None) -> Process:
        return self.server.start(
            *words, cwd=self.checkout, env=self.env | (env or {}), script=self.script
        )

    def call(self, *words: str, timeout_s: float = 60) -> Done:
        return self.start(*words).wait(timeout_s)

    def start_sweep(self, *flags: str, instances: int = 2, job: list[str] = JOB) -> Process:
        return self.start("sweep", "--instances", instances, *FAST, *flags, *job)

    def sweep(self, *flags: str, timeout_s: float = 60, **options: object) -> Done:
        return self.start_sweep(*flags, **options).wait(timeout_s)

    @property
    def output(self) -> Path:
        """Where the results of the one run are."""
        (folder,) = (self.checkout / "outputs").iterdir()
        return folder

    def rows(self) -> str:
        return (self.output / "results.csv").read_text()

    def records(self) -> list[dict]:
        paths = sorted((self.checkout / "rentals").glob("*/shard-*.json"))
        return [json.loads(path.read_text()) for path in paths]


@contextlib.contextmanager
def market(tmp_path: Path, server: Server, **config: object) -> Iterator[World]:
    """A world with eight offers of RTX 3090 unless the config says otherwise."""
    config = {"offers": OFFERS, "api_key": API_KEY, "keep_files": True} | config
    checkout = tmp_path / "checkout"
    shutil.copytree(server.folder / "checkout", checkout, symlinks=True)
    with lab_process(config) as lab:
        bin_folder = Path(lab.root) / "bin"
        bin_folder.mkdir(exist_ok=True)
        python = bin_folder / "python3"
        one_thread = "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE"  # as here: the same last bits
        python.write_text(f'#!/bin/sh\n{one_thread} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        world = World(lab, checkout, server)
        with watched_commands(world.commands):
            yield world


@contextlib.contextmanager
def watched_commands(seen: set[str]) -> Iterator[None]:
    """Notes the command line of every process, many times a second."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

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


def assert_nothing_lives(world: World, most: float = 1.0) -> None:
    """No instance is left, and no more was spent than --max-total allows."""
    assert world.lab.live() == []
    assert world.lab.total() <= most


def assert_no_secret_shows(world: World, *outputs: str) -> None:
    """In no request, command line, output, file of the checkout, or file that was pushed."""
    canaries = [SECRETS["HF_TOKEN"], SECRETS["OTHER"]]
    requests = json.dumps([[r["path"], r["query"], r["body"]] for r in world.lab.requests()])
    texts = {"requests": requests, "commands": "\n".join(world.commands)}
    texts |= {f"output {i}": text for i, text in enumerate(outputs)}
    for path in [p for p in world.checkout.rglob("*") if p.is_file() and ".git/" not in str(p)]:
        if path.name != "secrets.json":
            texts[str(path)] = path.read_text(errors="replace")
    pushed = [p for p in Path(world.lab.root).rglob("*") if p.is_file() and not p.is_symlink()]
    for path in pushed:
        if "home" in path.parts:  # not what is kept in memory there
            assert path.name not in ("secrets.json", "notes.txt")
            with contextlib.suppress(OSError):
                texts[str(path)] = path.read_text(errors="replace")
    for where, text in texts.items():
        for canary in [*canaries, API_KEY]:
            assert canary not in text, f"{canary} is in {where}"
    assert not re.search(API_KEY, requests)
