"""The time series of a run: metrics.jsonl first, Weights & Biases (W&B) as a sink beside it.

Every record is one line of JSON, flushed before `log` returns. W&B is a convenience: it may not
ask, hang, slow down or kill a run. So it lives in a daemon thread of its own, training only puts
records on a queue, every wait has a bound, and a failure is one warning line on stderr.
"""

import atexit
import contextlib
import json
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

# Seconds. Measured with wandb 0.31 on two CPU cores: import 0.4, init offline 0.4, finish 0.01.
FINISH_WAIT_S = 30.0  # bound of finish(): the two timeouts below, and W&B's own start and stop
CLOSE_WAIT_S = 12.0  # bound of close(): somebody has pressed Ctrl-C and waits
KILL_WAIT_S = 2.0  # beyond these, for the thread to notice that wandb's service is gone
WANDB_SETTINGS = {
    "init_timeout": 10.0,  # s; a server that has not answered by then is done without
    "finish_timeout": 15.0,  # s for the last uploads; what is left stays on disk
    "finish_timeout_raises": True,
    "x_transaction_log_flush_interval": 2.0,  # s of W&B records a SIGKILL can lose (default 15)
    "silent": True,  # our program prints its own lines
    "console": "off",
    "save_code": False,  # code, git and machine facts: our config.json has them
    "disable_git": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class Tracker:
    """Writes `folder/<jsonl_name>` and mirrors it to W&B. One at a time in a process.

    mode: "auto" (the environment's WANDB_MODE, else online when wandb finds an API key, else
    offline), "online", "offline" or "disabled" (wandb is not even imported). The run's id is
    kept in `folder`, so that the same command, started again, continues the same W&B run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        run_name: str,
        config: dict,
        jsonl_name: str = "metrics.jsonl",
    ) -> None:
        mode = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / jsonl_name
        self._file = self._path.open("a", encoding="utf-8")
        self._sink = None
        if mode != "disabled":
            run_id = _stored_run_id(folder / f"wandb_run-{Path(jsonl_name).stem}.json")
            run = {"id": run_id, "project": project, "name": run_name, "config": dict(config)}
            self._sink = _WandbSink(mode, {**run, "dir": str(folder.resolve())})

    def log(self, record: dict) -> None:
        """Appends {"step": ..., "seed": ..., "<namespace>/<name>": ...} as one line of JSON."""
        # JSON knows neither NaN nor infinity: they become null.
        plain = json.loads(json.dumps(record), parse_constant=lambda _: None)
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        if self._sink:
            self._sink.put(dict(record))

    def rewind(self, keep: Callable[[dict], bool]) -> None:
        """Drops the records that a resumed run will log again, and a line torn by SIGKILL.

        Only the file goes back; in W&B the repeated points lie on top of the first ones.
        """
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._file.close()
        _write_atomically(self._path, "".join(line for line in whole if keep(json.loads(line))))
        self._file = self._path.open("a", encoding="utf-8")

    def finish(self, *, figures: dict[str, Path], table: list[dict]) -> None:
        """Ends a complete run, within FINISH_WAIT_S: W&B gets PNGs and a table row per cell."""
        self._file.close()
        if self._sink:
            self._sink.stop(figures, table, exit_code=0, wait_s=FINISH_WAIT_S)

    def close(self) -> None:
        """Ends an interrupted run, within CLOSE_WAIT_S. Does nothing after finish()."""
        self._file.close()
        if self._sink:
            self._sink.stop({}, [], exit_code=1, wait_s=CLOSE_WAIT_S)


class _WandbSink:
    """A W&B run in a daemon thread: put() returns at once, stop() within its bound."""

    def __init__(self, mode: str, run: dict) -> None:
        self._arguments, self._run, self._on = run, None, True
        self._ending: tuple[dict[str, Path], list[dict], int] | None = None
        self._records: queue.SimpleQueue[dict | None] = queue.SimpleQueue()  # None is the end
        # wandb's own telemetry prints, and with a silent server adds 12 s to the exit; tables are
        # staged in the home directory. Neither is one of wandb's settings.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(run["dir"], "wandb")))
        self._thread = threading.Thread(target=self._work, args=(mode,), daemon=True)
        self._thread.start()

    def put(self, record: dict) -> None:
        if self._on:
            self._records.put(record)

    def stop(self, figures: dict, table: list[dict], *, exit_code: int, wait_s: float) -> None:
        """Lets the thread end the run, and goes on without it after wait_s seconds."""
        if self._ending is not None:
            return
        self._ending = (figures, table, exit_code)
        self._records.put(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._switch_off(TimeoutError(f"no end after {wait_s:g} s"))
            _kill_wandb_service()  # else wandb's own exit hook waits for it, without a bound
            self._thread.join(KILL_WAIT_S)
        atexit.unregister(self.stop)

    def _work(self, mode: str) -> None:
        try:
            self._start(mode)
            while (record := self._records.get()) is not None and self._on:
                self._run.log(record)
            self._end(*self._ending)
        # Broad on purpose: a convenience may not end hours of training, whatever it raises.
        # Nothing is hidden: the warning names type and message.
        except Exception as error:
            self._switch_off(error)
        finally:
            with contextlib.suppress(Exception):  # leaves no service process and no exit hook
                sys.modules["wandb"].teardown()

    def _start(self, mode: str) -> None:
        """Opens the run: online if it can be, else offline with a line that says why."""
        reason = "no API key is configured: run `wandb login`" if mode == "online" else ""
        if mode in ("auto", "online"):
            try:
                self._run = self._open("online")
            except Exception as error:  # broad for the reason given in _work
                if not self._on:  # stop() has given up meanwhile
                    raise
                reason = _one_line(error)
        if self._run is None:
            self._run = self._open("offline")
            if reason:
                self._warn(f"W&B is offline for this run ({reason})")
        # The x-axis is our "step", which starts at 0 with every group of cells; wandb's may not.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _open(self, mode: str):
        """The new wandb run; None where it should be online and there is no API key."""
        import wandb

        wandb.teardown()  # an attempt that failed still holds the run's id
        wandb.setup(wandb.Settings(mode=mode, **WANDB_SETTINGS))
        # After wandb's own unbounded hook, hence run before it at exit.
        atexit.register(self.stop, {}, [], exit_code=1, wait_s=CLOSE_WAIT_S)
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            return None
        return wandb.init(**self._arguments, mode=mode, resume="allow", reinit="create_new")

    def _end(self, figures: dict[str, Path], table: list[dict], exit_code: int) -> None:
        import wandb

        try:
            for name, path in figures.items():
                self._run.log({f"figures/{name}": wandb.Image(str(path))})
            if table:  # last: wandb asks the server whether it may store it
                rows = [list(row.values()) for row in table]
                cells = wandb.Table(list(table[0]), rows, allow_mixed_types=True)
                self._run.log({"summary/cells": cells})
        finally:
            self._run.finish(exit_code)

    def _switch_off(self, error: Exception) -> None:
        if self._on:
            self._on = False
            self._warn(f"W&B is off for the rest of this run ({_one_line(error)})")

    def _warn(self, message: str) -> None:
        later = f"; to upload later: wandb sync {self._run.settings.sync_dir}" if self._run else ""
        print(f"warning: {message}; metrics.jsonl goes on{later}", file=sys.stderr, flush=True)


def _kill_wandb_service() -> None:
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # gone by itself
            if child.name() == "wandb-core":
                child.kill()


def _stored_run_id(path: Path) -> str:
    if not path.exists():
        _write_atomically(path, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))["id"]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
