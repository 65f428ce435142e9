"""What runs on a rented machine, called there as remote.sh calls it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from builders.scripts import ROOT, clean_environment

from sparse_coding.rental import remote_job

METADATA = "Metadata-Version: 2.1\nName: made-on-the-spot\nVersion: 1.2\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
UNTIL_TOLD = """import os, time
open('starts', 'a').write('x')
for _ in range(600):
    if os.path.exists('go'): break
    time.sleep(0.05)
"""
COUNT = "import time\nfor i in range({n}):\n    print('step', i, flush=True); time.sleep(0.05)\n"


class Machine:
    """A home with the code, as it is after the push."""

    def __init__(self, home: Path, requirements: str = ""):
        self.home, self.code = home, home / "sparse_coding"
        (self.code / "sparse_coding" / "rental").mkdir(parents=True)
        for name in ("rental/remote_job.py", "rental/remote.sh", "rental/__init__.py",
                     "__init__.py", "config.py", "files.py"):  # fmt: skip
            source = ROOT / "sparse_coding" / name
            (self.code / "sparse_coding" / name).write_text(source.read_text())
        (self.code / "requirements.txt").write_text(requirements)
        self.env = clean_environment(home) | {"SPARSE_CODING_PYTHON": sys.executable}

    def ask(self, verb: str, stdin: str = "") -> dict:
        done = self.call(verb, stdin)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def call(self, verb: str, stdin: str = "") -> subprocess.CompletedProcess:
        command = ["sh", "sparse_coding/rental/remote.sh", *verb.split()]
        options = dict(cwd=self.code, env=self.env, input=stdin, capture_output=True, text=True)
        return subprocess.run(command, **options, timeout=30)

    def submit(self, code: str, **more) -> dict:
        (self.code / "job.py").write_text(code)
        job = {"command": ["python", "job.py"], "output_dir": "out", "secrets": "none", "env": {}}
        return self.ask("submit", json.dumps(job | more))

    def wait(self) -> dict:
        end = time.monotonic() + 20
        while self.ask("status")["exit"] is None and time.monotonic() < end:
            time.sleep(0.1)
        return self.ask("status")

    @property
    def pid(self) -> int:
        return json.loads((self.home / ".sae" / "status.json").read_text())["pid"]

    def starts(self, expected: str) -> str:
        """What jobs have written into `starts`, when it is that or after 10 s."""
        path, end = self.code / "starts", time.monotonic() + 10
        while time.monotonic() < end and not (path.exists() and path.read_text() == expected):
            time.sleep(0.1)
        return path.read_text()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# --- the job ---


def test_a_job_runs_to_its_end_and_says_how(machine):
    assert machine.submit(COUNT.format(n=3) + "raise SystemExit(4)")["running"]
    status = machine.wait()
    assert (status["exit"], status["line"], status["running"]) == (4, "step 2", False)


def test_the_same_job_is_not_started_twice_and_another_not_beside_it(machine):
    machine.submit(UNTIL_TOLD)
    machine.submit(UNTIL_TOLD)
    refused = machine.call("submit", json.dumps({"command": ["python", "other.py"]}))
    assert refused.returncode != 0
    assert "another job is running here" in refused.stderr
    (machine.code / "go").touch()
    assert machine.wait()["exit"] == 0
    machine.submit(UNTIL_TOLD)  # it has ended: its results are there
    assert (machine.code / "starts").read_text() == "x"


def test_a_job_whose_keeper_is_killed_dies_with_it_and_is_started_again(machine):
    code = "open('starts', 'a').write('x')\n" + COUNT.format(n=40)
    machine.submit(code)
    assert machine.starts("x") == "x"  # else it may be killed before it wrote anything
    os.kill(machine.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while machine.ask("status")["running"] and time.monotonic() < end:
        time.sleep(0.1)
    status = machine.ask("status")
    assert (status["running"], status["exit"]) == (False, None)
    assert machine.submit(code)["running"]
    assert machine.starts("xx") == "xx"
    os.kill(machine.pid, signal.SIGKILL)


def test_secrets_reach_the_job_through_memory_only(machine, tmp_path):
    secret = tmp_path / "shm"
    secret.write_text("HF_TOKEN=canary=1\n")
    code = "import os; print(os.environ['HF_TOKEN'], os.environ['MODE'])"
    machine.submit(code, secrets=str(secret), env={"MODE": "offline"})
    assert machine.wait()["line"] == "canary=1 offline"
    assert "canary" not in (machine.home / ".sae" / "job.json").read_text()


def test_a_progress_bar_gives_its_last_state_as_the_line(machine):
    machine.submit("import sys; sys.stderr.write('\\r 10 %\\r 20 %'); sys.stderr.flush()")
    assert machine.wait()["line"] == "20 %"


# --- the machine ---


def test_the_standard_library_is_all_that_it_needs(machine):
    command = [sys.executable, "-S", "-c", "import sparse_coding.rental.remote_job"]
    subprocess.run(command, cwd=machine.code, env=machine.env, check=True)


def test_requirements_that_are_met_are_not_missing_and_builds_of_a_version_count(tmp_path):
    pins = "pytest==9.2.0  # there\nruff==0.0.1\nno-such-package==1.0\nvastai>=1\n"
    machine = Machine(tmp_path, pins)
    found = machine.ask("check 0.001 any")
    assert found["missing"] == {"ruff": "0.0.1", "no-such-package": "1.0"}
    assert found["problems"] == []
    assert found["python"] == sys.version.split()[0]


def test_a_local_build_of_torch_is_the_pinned_version(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("requirements.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(remote_job.metadata, "version", lambda name: "2.13.0+cu126")
    assert remote_job.missing_packages() == {}
    monkeypatch.setattr(remote_job.metadata, "version", lambda name: "2.13.1+cu126")
    assert remote_job.missing_packages() == {"torch": "2.13.0"}


def test_a_machine_without_gpu_or_disk_is_refused_with_the_remedy(machine):
    problems = machine.ask("check 1e6 gpu")["problems"]
    assert "raise --disk-gb" in problems[0]
    assert "nvidia-smi finds no GPU" in problems[1]


def test_a_gpu_that_torch_can_not_use_is_found_out(machine, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'RTX 3090, 550.54'\n")
    (tools / "nvidia-smi").chmod(0o755)
    machine.env["PATH"] = f"{tools}:{machine.env['PATH']}"
    found = machine.ask("check 0.001 gpu")
    assert found["gpu"] == "RTX 3090, 550.54"
    assert "raise --min-cuda" in found["problems"][0]  # torch is there, but no CUDA


def test_missing_packages_are_installed_into_the_python_that_runs_the_job(tmp_path):
    with zipfile.ZipFile(tmp_path / "made_on_the_spot-1.2-py3-none-any.whl", "w") as wheel:
        for name, text in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", "")):
            wheel.writestr(f"made_on_the_spot-1.2.dist-info/{name}", text)
    venv = tmp_path / "venv"
    options = ["--system-site-packages", "--without-pip"]
    subprocess.run([sys.executable, "-m", "venv", *options, venv], check=True)
    machine = Machine(tmp_path / "home", "made-on-the-spot==1.2\n")
    machine.env |= {"SPARSE_CODING_PYTHON": str(venv / "bin" / "python")}
    machine.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    assert machine.ask("install") == {"installed": {"made-on-the-spot": "1.2"}, "missing": {}}
    (machine.code / "requirements.txt").write_text("never-made==1.0\n")
    failed = machine.call("install")
    assert failed.returncode != 0
    assert "pip install fails" in failed.stderr


def test_without_a_python_that_is_new_enough_the_image_is_named_as_the_cause(machine, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    machine.env["SPARSE_CODING_PYTHON"] = f"{old} /no/such/python"
    done = machine.call("status")
    assert done.returncode == 3
    assert "choose another --image" in done.stderr


# --- results ---


def test_a_snapshot_is_whole_verified_by_its_sums_and_holds_still(machine):
    machine.submit("raise SystemExit")
    machine.wait()
    out = machine.code / "out"
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "a.json").write_text("{}")
    (out / "metrics.jsonl").write_text("one\n")
    (out / ".run.lock").write_text("")
    (out / ".a.json.12.tmp").write_text("half")
    (out / "link").symlink_to("/etc/passwd")
    first = machine.ask("snapshot")
    folder = machine.home / ".sae" / "snapshot"
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    digests = {"cells/a.json": b"{}", "metrics.jsonl": b"one\n"}
    wanted = {name: hashlib.sha256(content).hexdigest() for name, content in digests.items()}
    assert dict(line.split("  ")[::-1] for line in sums) == wanted
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == [
        "SHA256SUMS", "a.json", "metrics.jsonl",
    ]  # fmt: skip
    with open(out / "metrics.jsonl", "a") as file:
        file.write("two\n")
    assert (folder / "metrics.jsonl").read_text() == "one\n"
    second = machine.ask("snapshot")
    assert second["state"] != first["state"]
    assert machine.ask("snapshot") == second
