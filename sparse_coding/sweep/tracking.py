"""The time series of a run: metrics.jsonl first, Weights & Biases (W&B) beside it.

W&B may not ask, hang, slow down or end a run. So it has a process of its own: training only puts
records on a queue, the end of a run waits for that process once, for a bounded time, and a failure
is one warning line on stderr.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_coding.files import Damaged, naming, read_record, write_atomic, write_record

if TYPE_CHECKING:
    import wandb

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0  # for W&B to end a run: the two timeouts below, and its own start and stop
WANDB_SETTINGS = dict(
    init_timeout=10.0,  # s; a server that has not answered by then is done without
    finish_timeout=15.0, finish_timeout_raises=True,  # s for the last uploads; the rest stays here
    x_transaction_log_flush_interval=2.0,  # s of W&B records that a SIGKILL can lose (default 15)
    silent=True, console="off",  # our program prints its own lines
    save_code=False, disable_git=True,  # our config.json has these facts, and those of the machine
    x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
)  # fmt: skip


class Tracker:
    """Writes `folder/<jsonl_name>` and mirrors it to W&B.

    mode: "auto" (the environment's WANDB_MODE, else online when wandb finds an API key, else
    offline), "online", "offline" or "disabled" (wandb is not even imported). The run's id is
    kept in `folder`, so that the same command, started again, continues the same W&B run.
    """

    def __init__(self, folder: Path, *, mode: str, project: str, run_name: str, config: dict,
                 jsonl_name: str = "metrics.jsonl") -> None:  # fmt: skip
        mode = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / jsonl_name
        self._file = self._path.open("a", encoding="utf-8")
        self._sink = None
        if mode != "disabled":
            run = {"project": project, "name": run_name, "dir": str(folder.resolve())}
            run |= {"config": dict(config), "id": self._run_id()}
            self._sink = _Sink(mode, run)

    def _run_id(self) -> str:
        """Of the W&B run, kept in the folder."""
        path = self._path.with_name(f"wandb_run-{self._path.stem}.json")
        try:
            if isinstance(id := read_record(path).get("id"), str):
                return id
            raise Damaged(path, "it holds no id")
        except FileNotFoundError:
            pass
        except Damaged as error:
            error.warn("a new W&B run is begun")
        write_record(path, {"id": uuid.uuid4().hex[:8]})
        return read_record(path)["id"]

    def log(self, record: dict) -> None:
        """Appends {"step": ..., "seed": ..., "<namespace>/<name>": ...}; NaN and inf as null."""
        plain = json.loads(json.dumps(record), parse_constant=lambda _: None)
        with naming(self._path):
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()
        if self._sink:
            self._sink.put(record)

    def rewind(self, keep: Callable[[dict], bool]) -> None:
        """Drops the records that a resumed run will log again, and lines that are no records.

        Only the file goes back; in W&B the repeated points lie on top of the first ones.
        """
        series = read_series(self._path)
        self._file.close()
        write_atomic(self._path, b"".join(line for line, record in series.items() if keep(record)))
        self._file = self._path.open("a", encoding="utf-8")

    def finish(self, *, figures: dict[str, Path], table: list[dict]) -> None:
        """Ends a complete run, within WAIT_S: W&B gets the PNGs and a table row per cell."""
        self._end(figures, table, exit_code=0)

    def close(self) -> None:
        """Ends an interrupted run, within WAIT_S. Does nothing after finish()."""
        self._end({}, [], exit_code=1)

    def _end(self, figures: dict[str, Path], table: list[dict], *, exit_code: int) -> None:
        self._file.close()
        if self._sink:
            paths = {name: str(path.resolve()) for name, path in figures.items()}
            self._sink.stop({"figures": paths, "table": table, "exit_code": exit_code})
            self._sink = None


def read_series(path: Path) -> dict[bytes, dict]:
    """The lines of a time series, each once, with the records that they hold. Lines that hold none
    are left out, which is said; one without an end is what a killed process leaves."""
    series, n_damaged = {}, 0
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            series[line + b"\n"] = record
        else:
            n_damaged += 1
    if n_damaged:
        Damaged(path, f"{n_damaged} of its lines are no records").warn("they are left out")
    return series


class _Sink:
    """The process that mirrors a run, `_mirror`: put() returns at once, stop() within WAIT_S."""

    def __init__(self, mode: str, run: dict) -> None:
        environment = {
            # wandb's own telemetry prints, and with a silent server adds 12 s to the exit; tables
            # are staged in the home directory. Neither is one of wandb's settings.
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_DATA_DIR": str(Path(run["dir"], "wandb")),
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True,
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
        self.messages: queue.SimpleQueue[dict | None] = queue.SimpleQueue()  # None is the end
        threading.Thread(target=self._send, daemon=True).start()
        self.put({"mode": mode, "settings": WANDB_SETTINGS, "run": run})

    def put(self, message: dict | None) -> None:
        """A record, the ending, or None after it."""
        if self.process.poll() is None:
            self.messages.put(message)

    def stop(self, ending: dict) -> None:
        """Has the run ended, and goes on without W&B if that takes too long."""
        self.put(ending)
        self.put(None)
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _warn("off for the rest of this run", f"no end after {WAIT_S:g} s")

    def _send(self) -> None:
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:  # it may have ended
            while (message := self.messages.get()) is not None:
                print(json.dumps(message), file=pipe, flush=True)


# --- in the process that mirrors ---


def _mirror(messages: Iterator[dict]) -> None:
    """Opens the run that the first message describes, logs the others; the last one ends it. Where
    none does, our process was killed."""
    first, run = next(messages), None
    try:
        run = _open(**first)
        ending = {"figures": {}, "table": [], "exit_code": 1}
        for message in messages:
            if "exit_code" in message:
                ending = message
            else:
                run.log(message)
        _end(run, **ending)
    # Broad on purpose: W&B is a convenience, and what it raises (it also calls sys.exit) may not
    # end hours of training. Nothing is hidden: the warning names type and message.
    except (Exception, SystemExit) as error:
        _warn("off for the rest of this run", error, run)


def _open(mode: str, settings: dict, run: dict) -> "wandb.Run":
    """The run, online if it is to be and can be, else offline with a line that says why."""
    opened, reason = None, ""
    if mode in ("auto", "online"):
        try:
            opened = _open_as("online", settings, run)
        except Exception as error:  # broad for the reason given in _mirror
            reason = error
        if opened is None and mode == "online" and not reason:
            reason = "no API key is configured: run `wandb login`"
    if opened is None:
        opened = _open_as("offline", settings, run)
        if reason:
            _warn("offline for this run", reason, opened)
    # The x-axis is our "step", which starts at 0 with every group of cells; wandb's may not.
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    return opened


def _open_as(mode: str, settings: dict, run: dict) -> "wandb.Run | None":
    """The run; None where it should be online and there is no API key."""
    import wandb

    wandb.teardown()  # a failed attempt still holds the run's id
    wandb.setup(wandb.Settings(mode=mode, **settings))
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        return None
    return wandb.init(**run, mode=mode, resume="allow", reinit="create_new")


def _end(run: "wandb.Run", figures: dict[str, str], table: list[dict], exit_code: int) -> None:
    import wandb

    try:
        for name, path in figures.items():
            run.log({f"figures/{name}": wandb.Image(path)})
        if table:  # last: wandb asks the server whether it may store it
            rows = [list(row.values()) for row in table]
            cells = wandb.Table(list(table[0]), rows, allow_mixed_types=True)
            run.log({"summary/cells": cells})
    finally:
        run.finish(exit_code)


def _warn(fate: str, why: Exception | str, run: "wandb.Run | None" = None) -> None:
    """One line on stderr, over a progress bar if there is one."""
    why = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    later = f"; to upload later: wandb sync {run.settings.sync_dir}" if run else ""
    line = f"warning: W&B is {fate} ({why}); metrics.jsonl goes on{later}"
    print("\r" + " ".join(line.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    _mirror(map(json.loads, sys.stdin))
    with contextlib.suppress(Exception):  # its service may have crashed
        sys.modules["wandb"].teardown()  # writes what did not get through
    os._exit(0)  # without wandb's own exit hook
