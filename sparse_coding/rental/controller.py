"""Takes one shard to verified results here, on one rented machine after the other."""

import contextlib
import errno
import json
import shlex
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_coding.rental.market import Instance, Unavailable
from sparse_coding.rental.provisioner import MachineLost, Outbid, Provisioner, say
from sparse_coding.rental.records import RentalError, ShardRecord, printable
from sparse_coding.rental.remote import REMOTE_DIR, Remote, RemoteError, Results, Stopped

NEEDED_GB = 2.0  # free disk for a job's results and checkpoints, at least
# vast.ai's ssh mode brings sshd, not always rsync; and tmux, which it starts in login shells
HAVE_RSYNC = (
    "touch .no_auto_tmux; command -v rsync || "
    "(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rsync)"
)
RESTARTS = 3  # of a job that was killed, on one machine
LAST_PULL = 120.0  # seconds for what can still be fetched when a run is stopped
MARGIN = 120.0  # seconds before the end of its lifetime in which a machine is emptied, at most
TAIL_LINES = 8  # of a job's log in messages, as remote_job.py sends them
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class JobFailed(RentalError):
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


def _tail(status: dict) -> str:
    """The last lines of the job's log: a machine may say as many as it likes."""
    return "\n".join(status["tail"].split("\n")[-TAIL_LINES:])


class Controller:
    """One shard of a run: the machine of its current attempt, and the job on it.

    key: the private half of our ssh key; phase: what is being done; line: the last of the job's log
    """

    def __init__(self, provisioner: Provisioner, record: ShardRecord, job: Job, *, key: Path):
        self.provisioner, self.record, self.job, self.key = provisioner, record, job, key
        self.terms, self.ledger = provisioner.terms, provisioner.ledger
        self.results = Results(self.ledger.folder, record.shard)
        self.remote: Remote | None = None
        self.key_attached = False
        self.status, self.answered = "", time.monotonic()  # last status; since when it is silent
        self.phase, self.line = "waiting", ""
        self.pulled, self.restarts = 0.0, 0

    def say(self, text: str) -> None:
        """A line on the screen."""
        say(text, self.record.shard)

    def check_stop(self) -> None:
        """Raises Stopped if the user wants an end."""
        if self.provisioner.stop.is_set():
            raise Stopped

    # --- from the first machine to the last ---

    def complete(self) -> None:
        """All of it. After OSError (our disk is full) the machine is kept, with results that have
        no room here; after any other exception none is left, or its message says so."""
        why, keep = "the command failed", False
        try:
            if not self.record.done:  # else a killed command may have left its machine
                self.work()
            why = "done"
        except Stopped:
            why = "stopped"
            self.pull_once_more()
            raise
        except OSError as error:
            keep = error.errno in DISK_FULL and self.holds_results()
            if keep:
                until = time.strftime("%H:%M", time.localtime(self.record.current.expires))
                self.say(f"keeps instance {self.record.current.id}, billing, until {until}")
            raise
        finally:
            if not keep:
                self.phase = "ending"
                self.provisioner.end(self.record, why)
            self.phase = why

    def holds_results(self) -> bool:
        """Whether the machine has what is not here."""
        at_work = self.phase in ("running", "fetching") and not self.record.done
        return at_work and self.record.current is not None

    def work(self) -> None:
        """On one machine after the other, until the results are here."""
        failures, why = 0, ""
        while failures < self.terms.attempts:
            of_a_killed_command = self.record.current is not None
            try:
                self.start()
                self.set_up()
                self.restore()
                self.submit()
                return self.follow()
            except (MachineLost, RemoteError) as error:
                self.give_up(error)
                failures += not (of_a_killed_command or isinstance(error, Outbid))
                why = str(error)
        raise JobFailed(f"{failures} machines failed, the last: {why}")

    # --- a machine, until it answers ---

    def get_ready(self) -> None:
        """A machine that answers and is set up. Raises what start and set_up do."""
        self.start()
        self.set_up()
        self.check_stop()

    def start(self) -> None:
        """Waits for a machine that answers over ssh, that of a killed command or a new one.
        Raises MachineLost if it doesn't come up, and what Provisioner.order raises."""
        self.phase, self.remote, self.status = "renting", None, ""
        if self.record.current is None:
            self.provisioner.order(self.record)
        else:
            known = self.record.current.id
            self.say(f"goes on with instance {known}" if known else "looks for what it ordered")
        while True:
            self.check_stop()
            instance = self.locate()
            self.phase = instance.status if instance else "ordered"
            up = instance and instance.status == "running" and instance.endpoints
            if up and self.reach(instance):
                return
            self.provisioner.stop.wait(self.provisioner.poll_seconds)

    def locate(self) -> Instance | None:
        """The machine as it is listed, None if it isn't yet. Raises MachineLost if it is gone, too
        dear, outbid, or has been silent for too long."""
        instance = self.provisioner.locate(self.record)
        status = instance.status if instance else "created"
        if status == "stopped" and self.terms.interruptible:
            raise Outbid("it was outbid")
        if status != self.status:
            self.status, self.answered = status, time.monotonic()
        starting = status in ("created", "loading")
        limit = 60 * (self.terms.start_minutes if starting else self.terms.lost_minutes)
        waited = time.monotonic() - self.answered
        if waited > limit:
            where = "running, but not to be reached," if status == "running" else status
            message = f" ({instance.message})" if instance and instance.message else ""
            raise MachineLost(f"{where} for {waited / 60:.1f} min{message}")
        return instance

    def reach(self, instance: Instance) -> bool:
        """Whether ssh works by now. Raises MachineLost if it never will."""
        self.connect(instance)
        try:
            self.remote.run(HAVE_RSYNC, timeout=300)
            return True
        except RemoteError as error:
            if error.kind in ("host_key", "failed"):
                raise MachineLost(str(error)) from None
            if error.kind == "denied" and not self.key_attached:
                public = self.key.with_name(self.key.name + ".pub").read_text().strip()
                self.provisioner.market.attach_key(instance.id, public)
                self.key_attached = True
            self.remote.other_endpoint()
            return False

    def connect(self, instance: Instance) -> None:
        """Points ssh to where the machine is now: it may come back elsewhere."""
        if self.remote is None:
            shared = self.provisioner
            options = dict(key=self.key.resolve(), stop=shared.stop, scale=shared.scale)
            folder = self.ledger.folder.resolve()
            self.remote = Remote(instance.id, instance.endpoints, folder, **options)
            self.key_attached = False
        elif not instance.endpoints or instance.endpoints == self.remote.endpoints:
            return
        self.remote.endpoints = instance.endpoints
        self.remote.write_config()

    # --- set up, given up ---

    def set_up(self) -> None:
        """The code, and what it needs. Raises MachineLost, with the remedy, for a machine that
        can't do the work."""
        if "busy" in self.remote.run("test -e .sae/job.json && echo busy || true"):
            return  # the job of an earlier command: its code stays
        self.phase = "set-up"
        self.remote.push(self.job.root, self.job.files)
        check = f"check {NEEDED_GB:g} {'gpu' if self.job.need_gpu else 'any'}"
        report = self.remote.ask(check)
        if not report["problems"] and report["missing"]:
            self.say(f"installs {', '.join(report['missing'])}")
            self.remote.ask("install", timeout=1800)
            report = self.remote.ask(check)
        if report["problems"]:
            why = printable("; ".join(map(str, report["problems"])), 500)
            raise MachineLost(why or "its check fails without a word")
        self.say(
            f"instance {self.record.current.id} is set up: {report['gpu'] or 'no GPU'}, "
            f"Python {report['python']}, {report['free_gb']:.0f} GB free"
        )

    def note_traffic(self) -> None:
        """Moves the bytes counted over to the attempt, from the machine's side."""
        remote, attempt = self.remote, self.record.current
        attempt.gb_up += remote.down / 1e9
        attempt.gb_down += remote.up / 1e9
        remote.up = remote.down = 0
        self.ledger.save(self.record)

    def give_up(self, why: RentalError) -> None:
        """Ends the machine, if one came of the order, and avoids it if it was at fault."""
        attempt, self.phase = self.record.attempts[-1], "ending"
        self.say(f"gives up {f'instance {attempt.id}' if attempt.id else 'its order'}: {why}")
        if attempt.id is not None and not isinstance(why, Outbid):
            self.record.avoid.append(attempt.machine_id)
        self.provisioner.end(self.record, str(why))
        if self.remote is not None:
            self.remote.config.unlink(missing_ok=True)
        self.remote = None

    # --- the job ---

    def restore(self) -> None:
        """Puts the last verified state where the job resumes from it, unless the job runs."""
        remote = self.remote
        if self.results.state and not remote.ask("status")["running"]:
            self.phase = "restoring"
            remote.push_folder(self.results.verified, f"{REMOTE_DIR}/{self.job.output_dir}")

    def submit(self) -> None:
        """Starts the job there, unless it is there already."""
        where = f"/dev/shm/sparse_coding-{self.record.current.id}"
        if self.job.secrets:
            command = f"umask 077 && cat > {shlex.quote(where)}"
            self.remote.run(command, stdin=self.job.secrets)
        job = {
            "command": self.job.command,
            "output_dir": self.job.output_dir,
            "secrets": where,
            "env": self.job.env,
        }
        self.remote.ask("submit", stdin=json.dumps(job).encode())
        self.phase = "running"

    def follow(self) -> None:
        """Watches the job, fetching checkpoints, until its results are here. Raises JobFailed if
        it fails or its time is up, MachineLost."""
        self.pulled = self.answered = time.monotonic()
        self.restarts = 0
        while True:
            self.check_stop()
            with contextlib.suppress(Unavailable):  # the job does without the service
                instance = self.locate()
                if instance is not None:
                    self.connect(instance)
            try:
                if self.attend():
                    return
                self.answered = time.monotonic()
            except RemoteError as error:  # if that lasts, the machine is given up
                if error.kind in ("host_key", "disk"):
                    raise
                self.remote.other_endpoint()
            self.check_time()
            self.provisioner.stop.wait(self.provisioner.poll_seconds)

    def attend(self) -> bool:
        """One look at the job, with what it calls for; whether its results are here. Raises
        JobFailed if it fails, or is killed again and again."""
        status = self.remote.ask("status")
        self.line = status["line"]
        if status["exit"] is not None:
            self.finish(status)
            return True
        if not status["running"]:
            self.restarts += 1
            if self.restarts > RESTARTS:
                raise JobFailed(f"the job was killed {self.restarts} times:\n{_tail(status)}")
            self.submit()
        elif time.monotonic() - self.pulled > 60 * self.terms.pull_minutes:
            self.pull()
            self.pulled = time.monotonic()
        return False

    def check_time(self) -> None:
        """Raises JobFailed, with the last state fetched, shortly before the machine ends itself."""
        attempt = self.record.current
        margin = min(MARGIN, 0.1 * (attempt.expires - attempt.ordered))
        if time.time() > attempt.expires - margin:
            self.pull_once_more()
            raise JobFailed("its time is up: raise --max-hours; the same command then goes on")

    def finish(self, status: dict) -> None:
        """Fetches the results, and marks the shard as done. Raises JobFailed, with the results up
        to then fetched, if the job ended with an error."""
        self.phase = "fetching"
        self.pull()
        if status["exit"] != 0:
            raise JobFailed(f"the job ends with exit code {status['exit']}:\n{_tail(status)}")
        self.record.done = True
        self.ledger.save(self.record)
        with contextlib.suppress(RemoteError):  # so that it ends itself, should we be cut off now
            self.remote.run("touch .sae/done")
        self.say("results fetched, verified")

    def pull(self) -> None:
        """Fetches the present state."""
        try:
            self.results.pull(self.remote)
        finally:
            self.note_traffic()

    def pull_once_more(self) -> None:
        """One more pull, in a bounded time, although everything else has stopped."""
        if self.remote is None or self.phase not in ("running", "fetching"):
            return
        limit = threading.Event()
        timer = threading.Timer(LAST_PULL, limit.set)
        timer.start()
        self.remote = replace(self.remote, stop=limit)
        try:
            self.pull()
            self.say("its last state is fetched")
        except (RemoteError, Stopped, OSError) as error:  # OSError: no room; the end is nearer
            self.say(f"its last state could not be fetched ({str(error) or 'no time'})")
        finally:
            timer.cancel()
