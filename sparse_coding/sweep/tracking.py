"""The time series of a run: metrics.jsonl first, Weights & Biases (W&B) beside it.

W&B may not ask, hang, slow down or kill a run. So it lives in a thread of its own, training only
puts records on a queue, every wait has a bound, and a failure is one warning line on stderr.
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

import psutil
from tqdm import tqdm

from sparse_coding.files import write_atomic

# Seconds. Measured with wandb 0.31 on two CPU cores: import 0.4, init offline 0.4, finish 0.01.
FINISH_WAIT_S = 30.0  # bound of finish(): the two timeouts below, and W&B's own start and stop
CLOSE_WAIT_S = 12.0  # bound of close(): somebody has pressed Ctrl-C and waits
KILL_WAIT_S = 2.0  # beyond these, for the thread to notice that wandb's service is gone
WANDB_SETTINGS = dict(
    init_timeout=10.0,  # s; a server that has not answered by then is done without
    finish_timeout=15.0, finish_timeout_raises=True,  # s for the last uploads; the rest stays here
    x_transaction_log_flush_interval=2.0,  # s of W&B records that a SIGKILL can lose (default 15)
    silent=True, console="off",  # our program prints its own lines
    save_code=False, disable_git=True,  # our config.json has these facts, and those of the machine
    x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
)  # fmt: skip


class Tracker:
    """Writes `folder/<jsonl_name>` and mirrors it to W&B. One at a time in a process.

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
            id_file = folder / f"wandb_run-{self._path.stem}.json"
            if not id_file.exists():
                write_atomic(id_file, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
            run = {"project": project, "name": run_name, "dir": str(folder.resolve())}
            run |= {"config": dict(config), "id": json.loads(id_file.read_text())["id"]}
            self._sink = _WandbSink(mode, run)

    def log(self, record: dict) -> None:
        """Appends {"step": ..., "seed": ..., "<namespace>/<name>": ...}; NaN and inf as null."""
        plain = json.loads(json.dumps(record), parse_constant=lambda _: None)
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        if self._sink:
            self._sink.put(record)

    def rewind(self, keep: Callable[[dict], bool]) -> None:
        """Drops the records that a resumed run will log again, and a line torn by SIGKILL.

        Only the file goes back; in W&B the repeated points lie on top of the first ones.
        """
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._file.close()
        write_atomic(self._path, "".join(line for line in whole if keep(json.loads(line))))
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
        self._arguments, self._run, self._ending, self._on = run, None, None, True
        self._records: queue.SimpleQueue[dict | None] = queue.SimpleQueue()  # None is the end
        # wandb's own telemetry prints, and with a silent server adds 12 s to the exit; tables are
        # staged in the home directory. Neither is one of wandb's settings.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(run["dir"], "wandb")))
        self._thread = threading.Thread(target=self._work, args=(mode,), daemon=True)
        self._thread.start()

    def put(self, record: dict) -> None:
        if self._on:
            self._records.put(dict(record))

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
        # Broad on purpose: a convenience may not end hours of training, whatever it raises (and
        # wandb does call sys.exit). Nothing is hidden: the warning names type and message.
        except (Exception, SystemExit) as error:
            self._switch_off(error)
        finally:
            _tear_down()

    def _start(self, mode: str) -> None:
        """Opens the run: online if it can be, else offline with a line that says why."""
        reason = "no API key is configured: run `wandb login`" if mode == "online" else ""
        if mode in ("auto", "online"):
            try:
                self._run = self._open("online")
            except Exception as error:  # broad for the reason given in _work
                if not self._on:  # stop() has given up meanwhile
                    raise
                reason = error
        if self._run is None:
            _tear_down()  # a failed attempt still holds the run's id
            self._run = self._open("offline")
            if reason:
                self._warn("offline for this run", reason)
        # The x-axis is our "step", which starts at 0 with every group of cells; wandb's may not.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _open(self, mode: str):
        """The new wandb run; None where it should be online and there is no API key."""
        import wandb

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

    def _switch_off(self, error: BaseException) -> None:
        if self._on:
            self._on = False
            self._warn("off for the rest of this run", error)

    def _warn(self, fate: str, why: BaseException | str) -> None:
        why = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        later = f"; to upload later: wandb sync {self._run.settings.sync_dir}" if self._run else ""
        line = f"warning: W&B is {fate} ({why}); metrics.jsonl goes on{later}"
        tqdm.write(" ".join(line.split()), file=sys.stderr)


def _tear_down() -> None:
    """Leaves no service process and no exit hook of wandb behind."""
    with contextlib.suppress(Exception, SystemExit):  # a crashed service cannot be stopped
        sys.modules["wandb"].teardown()


def _kill_wandb_service() -> None:
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # gone by itself
            if child.name() == "wandb-core":
                child.kill()
