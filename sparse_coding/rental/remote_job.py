"""What runs on a rented machine: its checks, the job, snapshots of the results.

Called over ssh by remote.py as `sh sparse_coding/rental/remote.sh VERB ...`; answers are JSON on
stdout. Standard library only (config and files need no more): nothing is installed there yet.

    check       what the machine lacks, in seconds
    install     the packages of requirements.txt that are missing
    submit      starts the job on stdin, detached, unless it runs or has ended already
    status      whether it runs, how it ended, its last lines
    snapshot    ~/.sae/snapshot: the results as they are now, each file whole, with SHA256SUMS
"""

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sparse_coding.files import held, sha256, write_json

HOME = Path.home() / ".sae"
JOB, STATUS, LOG, LOCK = (HOME / name for name in ("job.json", "status.json", "job.log", "lock"))
SNAPSHOT, SUMS = HOME / "snapshot", "SHA256SUMS"
WRITE_ONCE = {".safetensors", ".json", ".csv", ".png", ".html"}  # replaced whole by the scripts
INSTALL_GB = 12.0  # a CUDA build of torch, unpacked beside its downloads; ours, generous


def main(argv: list[str]) -> None:
    """Answers one verb."""
    verbs = {"check": check, "install": install, "submit": submit, "status": status,
             "snapshot": snapshot, "_run": run_job}  # fmt: skip
    HOME.mkdir(mode=0o700, exist_ok=True)
    answer = verbs[argv[0]](*argv[1:])
    if answer is not None:
        print(json.dumps(answer), flush=True)


# --- the machine ---


def check(disk_gb: str, need_gpu: str) -> dict:
    """What is there, and under `problems` what would stop the job, each with its remedy."""
    lacking = missing_packages()
    free = shutil.disk_usage(Path.home()).free / 1e9
    needed = float(disk_gb) + (INSTALL_GB if "torch" in lacking else 0)
    problems = []
    if free < needed:
        problems.append(f"{free:.0f} GB of disk are free, {needed:.0f} needed: raise --disk-gb")
    gpu = gpu_name()
    if need_gpu == "gpu" and not gpu:
        problems.append("nvidia-smi finds no GPU: the machine is broken")
    elif need_gpu == "gpu" and "torch" not in lacking:
        problems += cuda_problems()
    return {
        "python": sys.version.split()[0],
        "gpu": gpu,
        "free_gb": round(free, 1),
        "missing": lacking,
        "problems": problems,
    }


def missing_packages() -> dict[str, str]:
    """Pins of requirements.txt that are not met: name -> the version that is wanted."""
    lacking = {}
    for line in Path("requirements.txt").read_text().splitlines():
        pin = re.match(r"([\w.-]+)==([\w.]+)", line)
        if pin:
            try:  # 2.13.0+cu126 is a build of 2.13.0
                found = metadata.version(pin[1]).partition("+")[0]
            except metadata.PackageNotFoundError:
                found = None
            if found != pin[2]:
                lacking[pin[1]] = pin[2]
    return lacking


def gpu_name() -> str:
    """Name and driver of the first GPU, empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def cuda_problems() -> list[str]:
    """Whether torch computes on the GPU: a driver too old for it shows only there."""
    test = (
        "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA GPU: its build needs "
        "a newer driver: raise --min-cuda or choose an image with an older CUDA'; "
        "x = torch.ones(64, 64, device='cuda'); assert (x @ x).sum().item() == 64**3"
    )
    done = subprocess.run([sys.executable, "-c", test], capture_output=True, text=True)
    return [] if done.returncode == 0 else [(done.stderr.strip().split("\n") or ["?"])[-1]]


def install() -> dict:
    """Into the image's own python: the machine is thrown away afterwards."""
    lacking = missing_packages()
    pins = [f"{name}=={version}" for name, version in lacking.items()]
    if pins:
        environment = os.environ | {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_NO_CACHE_DIR": "1"}
        command = [sys.executable, "-m", "pip", "install", "--quiet", *pins]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pip install fails: {done.stderr.strip()[-300:]}")
    return {"installed": lacking, "missing": missing_packages()}


# --- the job ---


def submit() -> dict:
    """Starts the job; one that is there already is left alone, running or ended."""
    job = json.load(sys.stdin)
    if job != read(JOB):
        if is_running():
            sys.exit("another job is running here: wait for it, or destroy the machine")
        STATUS.unlink(missing_ok=True)
        write_json(JOB, job)
    if not is_running() and "exit" not in read(STATUS):
        with open(LOG, "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "sparse_coding.rental.remote_job", "_run"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 10
        while not is_running() and "exit" not in read(STATUS) and time.monotonic() < end:
            time.sleep(0.05)
    return status()


def run_job() -> None:
    """The job itself, in a process of its own that holds the lock while it lives."""
    with open(LOCK, "a") as lock:  # not files.held: the job inherits this open file, so that
        fcntl.flock(lock, fcntl.LOCK_EX)  # a keeper that is killed leaves no gap
        if "exit" in read(STATUS):  # it waited for another one
            return
        job = read(JOB)
        write_json(STATUS, {"pid": os.getpid()})
        python = sys.executable if job["command"][0] == "python" else job["command"][0]
        process = subprocess.Popen(
            [python, *job["command"][1:]],
            env=os.environ | job["env"] | secrets(Path(job["secrets"])),
            preexec_fn=die_with_parent,
            pass_fds=[lock.fileno()],
        )
        write_json(STATUS, {"exit": process.wait()})


def die_with_parent() -> None:
    """Else a job whose keeper was killed would run on, unseen, beside its successor."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, Linux


def secrets(path: Path) -> dict[str, str]:
    """NAME=value lines that came over ssh into memory; they are gone after a restart."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(line.split("=", 1) for line in lines if "=" in line)


def is_running() -> bool:
    """Whether the job's process, or its keeper, holds the lock."""

    def busy() -> None:
        raise BlockingIOError

    try:
        with held(LOCK, when_busy=busy):
            return False
    except BlockingIOError:
        return True


def status() -> dict:
    """running, exit (None while it is not known), the last line of its log and some before it."""
    tail = LOG.read_bytes()[-2000:].decode(errors="replace") if LOG.exists() else ""
    lines = [line.split("\r")[-1].strip() for line in tail.splitlines() if line.strip()]
    return {
        "running": is_running(),
        "exit": read(STATUS).get("exit"),
        "line": lines[-1] if lines else "",
        "tail": "\n".join(lines[-8:]),
    }


def read(path: Path) -> dict:
    """A JSON file, {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


# --- results ---


def snapshot() -> dict:
    """A copy in which no file changes any more: hard links where the scripts replace files whole.

    Returns:
        sha256 of SHA256SUMS, which names every file: the state of the results in one word
    """
    folder = Path(read(JOB)["output_dir"])
    shutil.rmtree(SNAPSHOT, ignore_errors=True)
    SNAPSHOT.mkdir()
    lines = []
    for path in sorted(files_of(folder)):
        copy = SNAPSHOT / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix in WRITE_ONCE:
                os.link(path, copy)
            else:
                shutil.copy2(path, copy)
        except FileNotFoundError:  # an old checkpoint, dropped meanwhile
            continue
        lines.append(f"{sha256(copy)}  {path.relative_to(folder)}\n")
    (SNAPSHOT / SUMS).write_text("".join(lines))
    return {"state": sha256(SNAPSHOT / SUMS)}


def files_of(folder: Path) -> Iterator[Path]:
    """Its files, without those that are being written, locks, links, and sums of before."""
    for path in folder.rglob("*"):
        ours = not path.name.startswith(".") and path.name != SUMS
        if ours and not path.is_symlink() and path.is_file():
            yield path


if __name__ == "__main__":
    main(sys.argv[1:])
