"""The life of one shard on rented machines, to verified results at home and no machine left."""

import contextlib
import errno
import json
import shlex
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_coding.rental.desk import Desk, Lost, Stopped
from sparse_coding.rental.machine import Machine, Patience, Watch
from sparse_coding.rental.market import Unavailable
from sparse_coding.rental.records import ShardRecord
from sparse_coding.rental.remote import REMOTE_DIR, RemoteError
from sparse_coding.rental.results import Results

RESTARTS = 3  # of a job whose keeper was killed, on one machine
LAST_PULL = 120.0  # seconds for what can still be saved when a run is stopped
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MARGIN = 120.0  # seconds before the end of its lifetime in which a machine is emptied, at most


class Failed(Exception):
    """The job itself failed, or the time is up: another machine would not help."""


@dataclass(frozen=True)
class Job:
    """What runs on the machines.

    command: of this shard; files: tracked ones, relative to root
    secrets: NAME=value lines, sent over ssh's stdin into memory there
    """

    command: list[str]
    env: dict[str, str]
    output_dir: str
    root: Path
    files: list[str]
    secrets: bytes
    need_gpu: bool


class Shard:
    """One shard of a run, with the machine that it is on."""

    def __init__(self, desk: Desk, record: ShardRecord, job: Job, patience: Patience, *, key: Path):
        self.desk, self.record, self.job, self.patience = desk, record, job, patience
        self.results = Results(desk.records.folder, record.shard)
        self.machine = Machine(desk, record, patience, key=key, progress=self.enter)
        self.phase, self.line = "waiting", ""
        self.keep = False  # the machine lives on: it has results that have no room at home

    def enter(self, phase: str) -> None:
        self.phase = phase

    def live(self) -> None:
        """All of it.

        Raises:
            Stopped, Failed, OverBudget, UserError, Unavailable: no machine is left, or the message
                says that one may be.
            OSError: our disk is full; the machine is kept, with results that have no room here.
        """
        why = "the command failed"
        try:
            if not self.record.done:  # else a killed command may have left its machine
                self.work()
            why = "done"
        except Stopped:
            why = "stopped"
            self.save_what_can_be()
            raise
        except OSError as error:
            self.keep = error.errno in DISK_FULL and self.record.current is not None
            if self.keep:
                until = time.strftime("%H:%M", time.localtime(self.record.current.expires))
                self.machine.say(f"keeps instance {self.record.current.id}, billing, until {until}")
            raise
        finally:
            if not self.keep:
                self.enter("ending")
                self.desk.end(self.record, why)
            self.enter(why)

    def work(self) -> None:
        """On one machine after the other, until the results are home."""
        failures, why = 0, ""
        while failures < self.patience.attempts:
            try:
                self.machine.rent()
                self.machine.set_up(self.job.root, self.job.files, need_gpu=self.job.need_gpu)
                self.restore()
                self.submit()
                return self.follow()
            except Lost as error:
                lost = error
            except RemoteError as error:
                if error.kind == "stopped":
                    raise Stopped from None
                lost = Lost(str(error), avoid=error.kind not in ("unreachable", "cut"))
            # a machine that was bid for may be taken away: that is no failure
            lost.avoid = lost.avoid or not self.record.current.bid
            self.machine.give_up(lost)
            failures, why = failures + lost.avoid, str(lost)
        raise Failed(f"{failures} machines failed, the last: {why}")

    def restore(self) -> None:
        """Puts the last verified state where the job resumes from it, unless it has a newer one."""
        if self.results.state and not self.machine.ask("status")["running"]:
            self.enter("restoring")
            there = f"{REMOTE_DIR}/{self.job.output_dir}"
            self.machine.remote.push_folder(self.results.verified, there)

    def submit(self) -> None:
        """Starts the job there, unless it is there already."""
        where = f"/dev/shm/sparse_coding-{self.record.current.id}"
        if self.job.secrets:
            command = f"umask 077 && cat > {shlex.quote(where)}"
            self.machine.remote.run(command, stdin=self.job.secrets)
        job = {
            "command": self.job.command,
            "output_dir": self.job.output_dir,
            "secrets": where,
            "env": self.job.env,
        }
        self.machine.ask("submit", stdin=json.dumps(job).encode())
        self.enter("running")

    def follow(self) -> None:
        """Watches the job, fetching checkpoints, until its results are home.

        Raises:
            Failed: it ended with an error, or its time is up. Lost: the machine did not hold.
        """
        watch = Watch(self.patience)
        self.pulled, self.restarts = time.monotonic(), 0
        while True:
            self.machine.check_stop()
            with contextlib.suppress(Unavailable):  # the job does without the service
                self.machine.keep_alive(watch)
            try:
                if self.attend():
                    return
                watch.heard()
            except RemoteError as error:  # if that lasts, the watch gives the machine up
                if error.kind in ("host_key", "disk", "stopped"):
                    raise
                self.machine.remote.other_endpoint()
            self.check_time()
            self.desk.stop.wait(self.desk.poll_seconds)

    def attend(self) -> bool:
        """One look at the job, with what it calls for; whether its results are home.

        Raises:
            Failed: it ended with an error, or is killed again and again.
        """
        status = self.machine.ask("status")
        self.line = status["line"]
        if status["exit"] is not None:
            self.finish(status)
            return True
        if not status["running"]:
            self.restarts += 1
            if self.restarts > RESTARTS:
                raise Failed(f"the job was killed {self.restarts} times:\n{status['tail']}")
            self.submit()
        elif time.monotonic() - self.pulled > 60 * self.patience.pull_minutes:
            self.pull()
            self.pulled = time.monotonic()
        return False

    def check_time(self) -> None:
        """Raises Failed, with the last state at home, shortly before the machine ends itself."""
        rental = self.record.current
        margin = min(MARGIN, 0.1 * (rental.expires - rental.ordered))
        if time.time() > rental.expires - margin:
            self.save_what_can_be()
            raise Failed("its lifetime is over: raise --max-hours; the same command then goes on")

    def finish(self, status: dict) -> None:
        """Brings the results home, and marks them as being there.

        Raises:
            Failed: the job ended with an error; its results up to then are home.
        """
        self.enter("fetching")
        self.pull()
        if status["exit"] != 0:
            raise Failed(f"the job ends with exit code {status['exit']}:\n{status['tail']}")
        self.record.done = True
        self.desk.records.save(self.record)
        with contextlib.suppress(RemoteError):  # so that it ends itself, should we be cut off now
            self.machine.remote.run("touch .sae/done")
        self.machine.say("results are home, verified")

    def pull(self) -> None:
        """Fetches the present state."""
        try:
            self.results.pull(self.machine.remote)
        finally:
            self.machine.note_traffic()

    def save_what_can_be(self) -> None:
        """One more pull, in a bounded time, although everything else has stopped."""
        if self.machine.remote is None or self.phase not in ("running", "fetching"):
            return
        limit = threading.Event()
        timer = threading.Timer(LAST_PULL, limit.set)
        timer.start()
        self.machine.remote = replace(self.machine.remote, stop=limit)
        try:
            self.pull()
            self.machine.say("its last state is home")
        except RemoteError as error:
            self.machine.say(f"its last state could not be fetched ({error})")
        finally:
            timer.cancel()
