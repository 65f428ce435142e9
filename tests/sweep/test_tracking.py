"""metrics.jsonl first, W&B beside it: with the real wandb, and no network but loopback."""

import contextlib
import http.server
import inspect
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sparse_coding.sweep import tracking
from sparse_coding.sweep.tracking import Tracker

REPO = Path(__file__).parents[2]
API_KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form wandb accepts; belongs to nobody
RECORDS = [{"step": 10 * i, "seed": 0, "train/mse/a": i / 8} for i in range(3)]


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """The developer's own key, settings and files stay out of these tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def server():
    """Starts loopback servers: "hang" never answers, a number is the status of every answer."""
    started = []

    def start(kind: str) -> "Server":
        started.append(Server(kind))
        return started[-1]

    yield start
    for one in started:
        one.released.set()
        one.shutdown()
        one.server_close()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.kind, self.released, self.queries = kind, threading.Event(), []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """Silence: clients that have given up are what these tests are about."""


class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.queries.append(query)
        if self.server.kind == "hang":
            self.server.released.wait()
        body = json.dumps({"data": graphql_data(query)}).encode()
        self.send_response(int(self.server.kind))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815 (the names http.server looks for)

    def log_message(self, *args) -> None:
        pass


def graphql_data(query: bytes) -> dict:
    """As little as wandb needs to open a run online."""
    project = {"id": "1", "name": "toy", "entity": {"id": "1", "name": "us"}}
    if b"query RunResumeStatus" in query:
        return {"model": {**project, "bucket": None}}
    if b"mutation UpsertBucket" in query:
        bucket = {"id": "1", "name": "id", "displayName": "run", "project": project}
        return {"upsertBucket": {"inserted": True, "bucket": bucket}}
    return {}


def tracker(folder: Path, mode: str, **kwargs) -> Tracker:
    return Tracker(
        folder, mode=mode, project="toy", run_name="run", config={"lr": 0.5, "n": 3}, **kwargs
    )


def lines(err: str) -> list[str]:
    """Those that have been written on stderr, some of them over a bar."""
    return [line for line in err.replace("\r", "\n").split("\n") if line]


def jsonl(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def wandb_records(folder: Path) -> list:
    """All protobuf records of the only .wandb file below `folder`.

    The file is LevelDB's log format after 7 bytes: blocks of 32 KiB that hold chunks of crc (4),
    length (2), kind (1: whole, 2: first, 3: middle, 4: last) and data.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/*run-*/*.wandb")
    data, position, buffer, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        buffer += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(buffer))
            buffer = b""
    return records


def history(records: list) -> list[dict]:
    """What was logged, without wandb's own keys; the keys of media are joined by dots."""
    rows = [{".".join(i.nested_key): i.value_json for i in r.history.item} for r in records]
    return [
        {key: json.loads(value) for key, value in row.items() if not key.startswith("_")}
        for row in rows
        if row
    ]


def run_script(body: str, **kwargs) -> subprocess.CompletedProcess:
    """Runs `body` as a user's process, with `tracker` and RECORDS of this file."""
    script = f"import sys; sys.path[:0] = [{str(REPO)!r}]\n{HEAD}{body}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, **kwargs
    )


HEAD = f"""
import time
from pathlib import Path
from sparse_coding.sweep import tracking
from sparse_coding.sweep.tracking import Tracker
RECORDS = {RECORDS!r}
{inspect.getsource(tracker)}
tracking.WANDB_SETTINGS |= {{"init_timeout": 1.0, "finish_timeout": 1.0}}
"""
LOG_AND_FINISH = """
t = tracker(Path("out"), {mode!r})
start = time.monotonic()
for record in RECORDS:
    t.log(record)
print(time.monotonic() - start)
t.finish(figures={{}}, table=[])
"""


def test_every_record_is_one_line_and_what_is_not_finite_is_null(tmp_path):
    t = tracker(tmp_path, "disabled")
    t.log({"step": 0, "seed": 1, "train/mse/a": 0.25})
    t.log({"step": 10, "seed": 1, "train/mse/a": math.nan, "metrics/mmcs/a": -math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == (  # before close: every line is flushed
        '{"step": 0, "seed": 1, "train/mse/a": 0.25}\n'
        '{"step": 10, "seed": 1, "train/mse/a": null, "metrics/mmcs/a": null}\n'
    )
    t.close()


def test_rewind_drops_a_torn_line_and_the_records_that_will_come_again(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    odd = f"{'[' * 50_000}\n" + '{"step": ' + 5000 * "7" + '}\n{"step": "x"}\n[1]\n'
    (tmp_path / "metrics.jsonl").write_text(lines + odd + '{"step": 30, "se')
    t = tracker(tmp_path, "disabled")
    t.rewind(lambda record: record["step"] <= 10)
    t.log({"step": 20, "seed": 5})
    t.close()
    assert jsonl(tmp_path) == [*RECORDS[:2], {"step": 20, "seed": 5}]
    assert [path.name for path in tmp_path.glob("*metrics*")] == ["metrics.jsonl"]


@pytest.mark.parametrize("content", ["{", '{"x": 1}', '{"id": 3}', "[" * 50_000])
def test_a_record_without_an_id_begins_a_new_run_of_wandb(tmp_path, content, capsys):
    path = tmp_path / "wandb_run-metrics.json"
    path.write_text(content)
    id = tracker(tmp_path, "disabled")._run_id()
    assert len(id) == 8
    assert f"{path} is damaged" in capsys.readouterr().err
    assert tracker(tmp_path, "disabled")._run_id() == id


def test_rewind_leaves_out_lines_that_are_no_records_and_says_so(tmp_path, capsys):
    lines = [json.dumps(record).encode() + b"\n" for record in RECORDS]
    damaged = lines[0].replace(b'"step"', b'"st\xe9p"')
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], damaged, *lines[1:]]))
    t = tracker(tmp_path, "disabled")
    t.rewind(lambda record: True)
    t.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert "metrics.jsonl is damaged (1 of its lines are no records)" in capsys.readouterr().err


def test_disabled_never_imports_wandb(tmp_path):
    body = LOG_AND_FINISH.format(mode="disabled") + 'assert "wandb" not in sys.modules'
    assert run_script(body, cwd=tmp_path).returncode == 0
    assert jsonl(tmp_path / "out") == RECORDS
    assert not (tmp_path / "out/wandb").exists()


def test_wandb_mode_of_the_environment_decides_for_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    t = tracker(tmp_path, "auto")
    t.close()
    assert [path.name for path in tmp_path.glob("*.json*")] == ["metrics.jsonl"]


def test_offline_holds_history_config_figures_and_table(tmp_path, capfd):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 2)).save(tmp_path / "mmcs.png")
    t = tracker(tmp_path, "auto")  # no key: offline, without a word
    for record in RECORDS:
        t.log(record)
    t.log({"step": 0, "seed": 0, "train/mse/b": math.nan})  # the next group starts at 0 again
    cells = [{"cell": "a", "mmcs": 0.75}, {"cell": "b", "mmcs": None}]
    t.finish(figures={"mmcs": tmp_path / "mmcs.png"}, table=cells)
    assert capfd.readouterr() == ("", "")

    records = wandb_records(tmp_path)
    config = {i.key: i.value_json for r in records for i in r.run.config.update}
    assert (config["lr"], config["n"]) == ("0.5", "3")
    assert [r.run.project for r in records if r.HasField("run")] == ["toy"]
    metrics = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in records}
    assert metrics["*"] == "step"
    logged = history(records)
    assert logged[:3] == RECORDS
    assert math.isnan(logged[3].pop("train/mse/b"))
    assert logged[3] == {"step": 0, "seed": 0}
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    assert (logged[4]["figures/mmcs.width"], logged[4]["figures/mmcs.height"]) == (4, 2)
    assert (files / logged[4]["figures/mmcs.path"]).read_bytes()[1:4] == b"PNG"
    table = json.loads((files / logged[5]["summary/cells.path"]).read_text())
    assert table["columns"] == ["cell", "mmcs"]
    assert table["data"] == [["a", 0.75], ["b", None]]
    assert not list((tmp_path / "home").rglob("staging/*"))


def test_the_same_command_continues_the_same_run_and_each_shard_has_its_own(tmp_path):
    ids = []
    for name in ("metrics.jsonl", "metrics.jsonl", "metrics-1of2.jsonl"):
        t = tracker(tmp_path, "offline", jsonl_name=name)
        t.log(RECORDS[0])
        t.finish(figures={}, table=[])
        newest = max(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
        ids.append(newest.stem)
    assert ids[0] == ids[1] != ids[2]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3
    assert jsonl(tmp_path) == [RECORDS[0]] * 2
    assert jsonl(tmp_path, "metrics-1of2.jsonl") == [RECORDS[0]]


@pytest.mark.parametrize("kind", ["hang", "500", "401", "refuse"])
def test_a_broken_server_costs_one_warning_and_the_run_goes_on_offline(
    tmp_path, monkeypatch, server, kind
):
    # port 9 ("discard") of this machine: nobody listens
    url = "http://127.0.0.1:9" if kind == "refuse" else server(kind).url
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    start = time.monotonic()
    done = run_script(LOG_AND_FINISH.format(mode="auto"), cwd=tmp_path)
    assert time.monotonic() - start < 10  # init_timeout 1 s, and the exit does not wait either
    assert done.returncode == 0
    assert float(done.stdout) < 0.5  # s for the records: training did not wait
    (warning,) = lines(done.stderr)
    assert warning.startswith("warning: W&B is offline for this run (CommError: ")
    assert f"wandb sync {tmp_path / 'out/wandb/offline-run-'}" in warning
    assert jsonl(tmp_path / "out") == RECORDS
    for failed in (tmp_path / "out/wandb").glob("run-*/*.wandb"):
        failed.unlink()
    assert history(wandb_records(tmp_path / "out")) == RECORDS
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and API_KEY in p.read_text("latin1")]


def test_online_without_a_key_never_prompts_not_even_on_a_terminal(tmp_path):
    controller, terminal = pty.openpty()
    done = run_script(LOG_AND_FINISH.format(mode="online"), cwd=tmp_path, stdin=terminal)
    os.close(controller), os.close(terminal)
    assert done.returncode == 0
    (warning,) = lines(done.stderr)
    assert "no API key is configured: run `wandb login`" in warning
    assert history(wandb_records(tmp_path / "out")) == RECORDS


def test_a_network_that_goes_away_in_the_middle_bounds_finish(tmp_path, monkeypatch, server, capfd):
    up = server("200")
    monkeypatch.setenv("WANDB_BASE_URL", up.url)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setitem(tracking.WANDB_SETTINGS, "finish_timeout", 1.0)
    t = tracker(tmp_path, "auto")
    wait_until(lambda: any(b"UpsertBucket" in query for query in up.queries))
    wait_until(lambda: list(tmp_path.glob("wandb/run-*/*.wandb")))
    up.kind = "hang"
    for record in RECORDS:
        t.log(record)
    start = time.monotonic()
    t.finish(figures={}, table=[])
    assert time.monotonic() - start < 6
    (warning,) = lines(capfd.readouterr().err)
    assert "(TimeoutError: " in warning
    assert f"wandb sync {tmp_path / 'wandb/run-'}" in warning
    assert history(wandb_records(tmp_path)) == jsonl(tmp_path) == RECORDS


def service_of(process: psutil.Process) -> psutil.Process:
    """wandb's own service below the process, once it is there."""
    names = lambda: {c.name(): c for c in process.children(recursive=True)}  # noqa: E731
    wait_until(lambda: "wandb-core" in names())
    return names()["wandb-core"]


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may go between two looks
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_stuck_service_is_waited_for_once(tmp_path, monkeypatch, capfd):
    t = tracker(tmp_path, "offline")
    t.log(RECORDS[0])
    wait_until(lambda: list(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    service = service_of(psutil.Process())
    service.suspend()
    monkeypatch.setattr(tracking, "WAIT_S", 0.5)
    start = time.monotonic()
    t.close()
    t.close()  # nothing left to do
    assert time.monotonic() - start < 3
    (warning,) = lines(capfd.readouterr().err)
    assert warning.startswith("warning: W&B is off for the rest of this run (no end after 0.5 s)")
    assert jsonl(tmp_path) == [RECORDS[0]]
    service.resume()
    wait_until(lambda: gone(service))  # it ends with the process that had started it


def test_sigterm_ends_the_run_at_once_and_leaves_no_service_behind(tmp_path):
    body = """
t = tracker(Path("out"), "offline")
t.log(RECORDS[0])
print("logged", flush=True)
time.sleep(60)
"""
    script = f"import sys; sys.path[:0] = [{str(REPO)!r}]\n{HEAD}{body}"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    process.stdout.readline()
    service = service_of(psutil.Process(process.pid))
    process.terminate()
    assert process.wait(timeout=5) == -signal.SIGTERM
    process.stdout.close()
    wait_until(lambda: gone(service))
    assert history(wandb_records(tmp_path / "out")) == [RECORDS[0]]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
