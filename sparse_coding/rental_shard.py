"""The life of one shard on rented machines, to verified results at home and no machine left.
Floor 2, without torch.
"""

import contextlib
import json
import shlex
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_coding.config import UserError
from sparse_coding.remote import REMOTE_DIR, RemoteError
from sparse_coding.rental_desk import Desk, Lost
from sparse_coding.rental_machine import Machine, Patience, Stopped, Watch
from sparse_coding.rental_records import ShardRecord
from sparse_coding.rental_results import Results
from sparse_coding.vast import Unavailable

RESTARTS = 3  # of a job whose keeper was killed, on one machine
LAST_PULL = 120.0  # seconds for what can still be saved when a run is stopped
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
            Stopped, Failed, OverBudget, UserError, Unavailable: in each case no machine is left,
                but where the results have no room here.
        """
        if self.record.done:
            return
        why = "the command failed"
        try:
            self.work()
            why = "done"
        except Stopped:
            why = "stopped"
            self.save_what_can_be()
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
                lost = Lost(str(error), avoid=error.kind != "unreachable")
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
        watch, pulled, restarts = Watch(self.patience), time.monotonic(), 0
        while True:
            self.machine.check_stop()
            with contextlib.suppress(Unavailable):  # the job does without the service
                self.machine.keep_alive(watch)
            status = self.status()
            if status:
                watch.heard()
                self.line = status["line"]
                if status["exit"] is not None:
                    return self.finish(status)
                if not status["running"]:
                    restarts += 1
                    if restarts > RESTARTS:
                        raise Failed(f"the job was killed {restarts} times:\n{status['tail']}")
                    self.submit()
                elif time.monotonic() - pulled > 60 * self.patience.pull_minutes:
                    self.pull()
                    pulled = time.monotonic()
            self.check_time()
            self.desk.stop.wait(self.desk.poll_seconds)

    def status(self) -> dict | None:
        """Of the job; None while the machine can't be reached. Raises RemoteError if it is bad."""
        try:
            return self.machine.ask("status")
        except RemoteError as error:
            if error.kind != "unreachable":
                raise
            self.machine.remote.other_endpoint()
            return None

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
        """Fetches the present state; keeps the machine where that has no room here."""
        try:
            self.results.pull(self.machine.remote)
        except UserError:
            self.keep = True
            until = time.strftime("%H:%M", time.localtime(self.record.current.expires))
            self.machine.say(f"keeps instance {self.record.current.id}, billing, until {until}")
            raise
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
