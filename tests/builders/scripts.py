"""Builders for the tests that call a script as a user does.

`run_script` starts a fresh interpreter. `fork_script` runs the same script in a process forked from
one that has torch loaded already: a run costs 0.1 s instead of 2 s, and is otherwise the same (own
process, arguments, working directory, environment, output files, exit code).
"""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = (
    300  # of one run: a tiny one takes 1 to 5 s, kernels are compiled for 20 or, crowded, 100
)

TRAINING = "sparse_coding.sae.ensemble.Ensemble.steps_"  # a call takes up to 16 steps
NO_FIGURES = {"sparse_coding.toy.replication.FIGURES": []}  # they take most of a tiny run
SMALL = {  # for run.py: several chunks and checkpoints, no figure but small density histograms
    "sparse_coding.lm.activations.harvest.CHUNK_BYTES": 2**18,
    "sparse_coding.sweep.training.CHECKPOINT_SECONDS": 0.03,
    "sparse_coding.sweep.training.CHECKPOINT_SHARE": 1.0,
    "sparse_coding.lm.target.SANITY_TOKENS": 512,
    "sparse_coding.lm.show.FIGURES": [],
    "sparse_coding.lm.show.FRONTIERS": [],
    "sparse_coding.figures.heatmap.DPI": 20,
}
EACH_STEP = {  # checkpoints come after every call of TRAINING, and not by the clock
    "sparse_coding.sweep.training.CHECKPOINT_SECONDS": 0.0,
    "sparse_coding.sweep.training.CHECKPOINT_SHARE": 1e9,
}

LOADED_LATE = ("safetensors.torch", "torch._dynamo")
# Loaded once, forked per job. Jobs are JSON lines on stdin, answers JSON lines on stdout.
SERVER = """
import contextlib, gc, importlib, itertools, json, os, pkgutil, runpy, signal, sys, time
script = sys.argv[1]
sys.path[0] = os.path.dirname(script)  # as for `python script`
import tyro  # the script loads this, and the modules, when it needs them
for name in sys.argv[2:]:
    importlib.import_module(name)
tyro.cli(int, args=["1"])
runpy.run_path(script, run_name="preload")
if "torch" in sys.modules:
    from sparse_coding.sae.engines import cpu, cpu_compile
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        if cpu_compile.has_kernels():
            cpu.kernels_compile()
gc.freeze()  # else every fork walks, and so copies, all of torch's objects when it ends
while line := sys.stdin.readline():
    job = json.loads(line)
    if "wait" in job:
        end, pid = time.monotonic() + job["timeout_s"], 0
        while not pid and time.monotonic() < end:
            pid, status = os.waitpid(job["wait"], os.WNOHANG)
            time.sleep(0.005)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
os.chdir(job["cwd"])
os.environ.update(job["env"])
for fd, path in ((1, job["stdout"]), (2, job["stderr"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

def replace(name, value_of):
    place, _, attribute = name.rpartition(".")
    place = pkgutil.resolve_name(place)
    setattr(place, attribute, value_of(getattr(place, attribute)))  # of nothing: an error

def pausing(function):
    calls = itertools.count(1)
    def paused(*args, **kwargs):
        if next(calls) == job["pause_at"][1]:
            open(job["path"] + ".paused", "w").close()
            end = time.monotonic() + job["timeout_s"]
            while not os.path.exists(job["path"] + ".resumed") and time.monotonic() < end:
                time.sleep(0.005)
        return function(*args, **kwargs)
    return paused

for name, value in job["patch"].items():
    replace(name, lambda _: value)
if job["before"]:
    sys.path.append(job["tests"])
    pkgutil.resolve_name("builders.faults." + job["before"][0])(**job["before"][1])
if job["pause_at"]:
    replace(job["pause_at"][0], pausing)
sys.argv = [job["script"], *job["argv"]]
runpy.run_path(job["script"], run_name="__main__")
"""


@dataclass(frozen=True)
class Done:
    """A finished process. code: negative if a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def err_lines(self) -> list[str]:
        """Lines of stderr as a terminal leaves them, without the progress bar."""
        lines = [line.split("\r")[-1] for line in self.err.split("\n")]
        return [line for line in lines if line.strip() and not re.search(r"\[\d\d:\d\d[<,]", line)]


def clean_environment(home: Path) -> dict[str, str]:
    """No proxy, key or PYTHONPATH of the developer; one thread; no network is needed, so none."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", os.path.expanduser("~/.config/matplotlib")),
        "https_proxy": "http://127.0.0.1:9",  # nothing listens there
        "http_proxy": "http://127.0.0.1:9",
    }


class Process:
    """A script running in a fork of the server."""

    def __init__(self, server: "Server", job: dict):
        self.server, self.job = server, job
        self.pid: int = server.ask(job)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Done:
        """The end of it; fails the test, and kills it, if that does not come in time."""
        code = self.server.ask({"wait": self.pid, "timeout_s": timeout_s})
        if code is None:
            self.signal(signal.SIGKILL)
            self.server.ask({"wait": self.pid, "timeout_s": 10})
            pytest.fail(f"{self.job['argv']} did not end within {timeout_s} s: {self.err()}")
        return Done(code, self.out(), self.err())

    def out(self) -> str:
        """What it has printed so far."""
        return self._read("stdout")

    def err(self) -> str:
        """What it has written to stderr so far."""
        return self._read("stderr")

    def _read(self, stream: str) -> str:
        path = Path(self.job[stream])
        return path.read_text() if path.is_file() else ""  # killed before it could be made

    def signal(self, signum: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, signum)  # not reaped before wait(): the pid is still ours

    def kill(self) -> None:
        """SIGKILL; returns when it has ended."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait_until_paused(self) -> None:
        """Until it stands at its pause_at."""
        self.wait_until(Path(self.job["path"] + ".paused").exists)

    def resume(self) -> None:
        """Lets it go on from its pause_at. A signal that was sent before comes first."""
        Path(self.job["path"] + ".resumed").touch()

    def wait_until(self, happened: Callable[[], object], timeout_s: float = 60) -> None:
        """Fails the test if that does not happen in time."""
        end = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < end, f"not within {timeout_s} s; stderr: {self.err()}"
            time.sleep(0.002)


class Server:
    """The process that is forked for each run of one script.

    patch: see start; modules: that it has loaded too
    """

    def __init__(
        self, script: Path, home: Path, *, patch: dict, modules: tuple[str, ...] = LOADED_LATE
    ):
        self.script, self.folder, self.patch, self.n_jobs = script, home, patch, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, script, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=home,
            env=clean_environment(home),
        )

    def ask(self, job: dict) -> object:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *flags: str,
        cwd: Path | None = None,
        patch: dict | None = None,
        pause_at: tuple[str, int] | None = None,
        before: tuple[str, dict] | None = None,
        env: dict[str, str] | None = None,
        script: Path | None = None,
        stdout: str | None = None,
    ) -> Process:
        """patch: {"module.NAME": value}, set before the script starts; else few or no figures.
        pause_at: ("module.function" or "module.Class.method", n): before the nth call of it the run
            waits for Process.resume, so that a test can stop it in a phase and not by luck
        before: (function, arguments) of builders/faults.py, called before the script starts
        script: a copy of it to run instead, with the modules of the first
        stdout: a device to print to, instead of a file
        """
        self.n_jobs += 1
        path = str(self.folder / f"job-{self.n_jobs}")
        job = {"argv": [str(f) for f in flags], "cwd": str(cwd or self.folder)}
        job |= {"path": path, "stdout": stdout or f"{path}.out", "stderr": f"{path}.err"}
        job |= {"patch": self.patch if patch is None else patch, "env": env or {}}
        job |= {"pause_at": pause_at, "timeout_s": TIMEOUT_S}
        job |= {"before": before, "tests": str(ROOT / "tests")}
        job["script"] = str(script or self.script)
        return Process(self, job)

    def run(
        self,
        *flags: str,
        cwd: Path | None = None,
        patch: dict | None = None,
        before: tuple[str, dict] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Done:
        return self.start(*flags, cwd=cwd, patch=patch, before=before).wait(timeout_s)


def run_script(
    command: list[str], *, cwd: Path, more_environment: dict[str, str] | None = None
) -> Done:
    """`python <command>` in a fresh interpreter and a clean environment, stdin closed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=clean_environment(cwd) | (more_environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def served(script: str, home: Path, **options: object) -> Iterator[Server]:
    server = Server(ROOT / script, home, **options)
    yield server
    server.process.stdin.close()
    server.process.wait(10)


def bytes_under(folder: Path) -> dict[str, bytes]:
    """Every file below the folder by its relative path; lock files are no content."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def table(folder: Path) -> list[dict[str, str]]:
    """results.csv as it stands there."""
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_done(done: Done) -> None:
    """Exit code 0, and nothing on stderr but the progress bar."""
    assert done.code == 0, done.err
    assert done.err_lines == []


def assert_refused(done: Done, *words: str) -> None:
    """One line on stderr that has these words, exit code 2, no traceback."""
    assert done.code == 2, done.err
    (line,) = done.err_lines
    assert re.match(r"\w+\.py: error: ", line), line
    assert [word for word in words if word not in line] == [], line


def temporaries(folder: Path) -> list[str]:
    """Files that a write left behind."""
    return [p.name for p in folder.rglob(".*") if p.name.endswith(".tmp") or len(p.name) == 10]


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, options: str) -> Iterator[None]:
    """A disk of its own at the folder; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
