"""The machine that a shard is on: found, reached over ssh, set up, watched."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.rental.desk import Desk, Lost, Stopped
from sparse_coding.rental.records import Rental, ShardRecord
from sparse_coding.rental.remote import REMOTE_DIR, Remote, RemoteError
from sparse_coding.rental.terms import Instance

NEEDED_GB = 2.0  # free disk for a job's results and checkpoints, at least
JOB = f"cd {REMOTE_DIR} && sh sparse_coding/rental/remote.sh"
# vast.ai's ssh mode brings sshd, not always rsync; and tmux, which it starts in login shells
HAVE_RSYNC = (
    "touch .no_auto_tmux; command -v rsync || "
    "(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rsync)"
)
HOPELESS = ("no such", "manifest unknown", "not found", "access denied")  # in status_msg


@dataclass(frozen=True)
class Patience:
    """Minutes a machine may take before it is given up; the names are vastai_utils.py's flags."""

    provisioning_minutes: float  # until it is listed and loads its image
    loading_minutes: float
    ssh_minutes: float  # running, but not to be reached
    grace_minutes: float  # exited, offline, unknown
    outbid_minutes: float  # stopped: an interruptible machine that was outbid
    pull_minutes: float  # between two fetches of checkpoints
    attempts: int  # machines per shard that may fail

    def of(self, status: str) -> float:
        """Seconds for which a machine may be in this status."""
        minutes = {"created": self.provisioning_minutes, "loading": self.loading_minutes,
                   "running": self.ssh_minutes, "stopped": self.outbid_minutes}  # fmt: skip
        return 60 * minutes.get(status, self.grace_minutes)


class Watch:
    """Gives a machine up that stays too long in a status in which nothing gets done."""

    def __init__(self, patience: Patience):
        self.patience, self.status, self.since = patience, "", time.monotonic()

    def heard(self) -> None:
        """ssh answered."""
        self.since = time.monotonic()

    def note(self, instance: Instance | None) -> None:
        """Raises Lost if it has been in this status for longer than its patience."""
        status = instance.status if instance else "created"
        message = instance.message if instance else ""
        if status != self.status:
            self.status, self.since = status, time.monotonic()
        waited = time.monotonic() - self.since
        hopeless = status != "running" and any(text in message.lower() for text in HOPELESS)
        if waited > self.patience.of(status) / (5 if hopeless else 1):
            where = "running, but not to be reached," if status == "running" else status
            why = f"{where} for {waited / 60:.1f} min {f'({message})' if message else ''}".strip()
            raise Lost(why, avoid=status != "stopped")  # being outbid is nobody's fault


class Machine:
    """Of one shard.

    key: the private half of our ssh key; progress: is told the phase
    """

    def __init__(
        self,
        desk: Desk,
        record: ShardRecord,
        patience: Patience,
        *,
        key: Path,
        progress: Callable[[str], None],
    ):
        self.desk, self.record, self.patience = desk, record, patience
        self.key, self.progress = key, progress
        self.remote: Remote | None = None
        self.attached = False  # our key to it

    @property
    def rental(self) -> Rental:
        return self.record.current

    def rent(self) -> None:
        """A machine that answers over ssh.

        Raises:
            Lost: it did not come up. Stopped. What Desk.rent raises.
        """
        self.progress("renting")
        self.remote = None
        rental, watch = self.desk.rent(self.record), Watch(self.patience)
        while True:
            self.check_stop()
            instance = self.find(rental)
            watch.note(instance)
            self.progress(instance.status if instance else "ordered")
            up = instance and instance.status == "running" and instance.endpoints
            if up and self.reach(instance):
                return
            self.desk.stop.wait(self.desk.poll_seconds)

    def find(self, rental: Rental) -> Instance | None:
        """The machine as the service lists it; strays of the shard are ended.

        Raises:
            Lost: its price is above the caps.
        """
        listed = self.desk.of_shard(self.record.shard)
        instance = next((i for i in listed if i.id == rental.id), None)
        if len(listed) > (instance is not None):
            self.desk.end_strays(self.record)
        if instance:
            rental.seen(instance.status, time.time())
            self.desk.check_price(self.record, instance)
        return instance

    def reach(self, instance: Instance) -> bool:
        """Whether ssh works by now. Raises Lost if it never will."""
        self.meet(instance)
        try:
            self.remote.run(HAVE_RSYNC, timeout=300)
            return True
        except RemoteError as error:
            if error.kind == "stopped":
                raise Stopped from None
            if error.kind in ("host_key", "failed"):
                raise Lost(str(error), avoid=True) from None
            if error.kind == "denied" and not self.attached:
                public = self.key.with_name(self.key.name + ".pub").read_text().strip()
                self.desk.market.attach_key(instance.id, public)
                self.attached = True
            self.remote.other_endpoint()
            return False

    def meet(self, instance: Instance) -> None:
        """Points ssh to where the machine is now: it may come back elsewhere."""
        if self.remote is None or self.remote.instance != instance.id:
            folder, stop = self.desk.records.folder, self.desk.stop
            options = dict(key=self.key.resolve(), stop=stop, scale=self.desk.scale)
            self.remote = Remote(instance.id, instance.endpoints, folder.resolve(), **options)
            self.remote.write_config()
            self.attached = False
        elif instance.endpoints and instance.endpoints != self.remote.endpoints:
            self.remote.endpoints = instance.endpoints
            self.remote.write_config()

    def set_up(self, root: Path, files: list[str], *, need_gpu: bool) -> None:
        """The code, and what it needs; refuses a machine that can't do the work, in seconds.

        Raises:
            Lost: with the remedy.
        """
        if "busy" in self.remote.run("test -e .sae/job.json && echo busy || true"):
            return  # the job of an earlier command: its code stays
        self.progress("set-up")
        self.remote.push(root, files)
        need = f"{NEEDED_GB:g} {'gpu' if need_gpu else 'any'}"
        found = self.ask(f"check {need}")
        if not found["problems"] and found["missing"]:
            self.say(f"installs {', '.join(found['missing'])}")
            self.ask("install", timeout=1800)
            found = self.ask(f"check {need}")
        if found["problems"]:
            raise Lost("; ".join(found["problems"]), avoid=True)
        self.say(f"instance {self.rental.id} is set up: {found['gpu'] or 'no GPU'}, Python "
                 f"{found['python']}, {found['free_gb']:.0f} GB free")  # fmt: skip

    def ask(self, verb: str, *, stdin: bytes = b"", timeout: float = 120.0) -> dict:
        """The answer of remote_job.py there."""
        return json.loads(self.remote.run(f"{JOB} {verb}", stdin=stdin, timeout=timeout))

    def keep_alive(self, watch: Watch) -> None:
        """Looks after the machine while it works; bids more where it is outbid, within the cap.

        Raises:
            Lost: it vanished, or won't come back.
        """
        rental, instance = self.rental, self.find(self.rental)
        if instance is None:
            listed = self.desk.of_shard(self.record.shard, fresh=True)
            if not listed and not self.desk.market.exists(rental.id):
                raise Lost("it vanished from the list")
            return
        watch.note(instance)
        self.meet(instance)
        cap = self.desk.terms.max_dph - rental.rates.disk
        cap = min(cap, rental.bid + self.desk.budget.spare_rate(rental))
        if instance.status == "stopped" and 0 < rental.bid < cap - 1e-4:
            self.say(f"is outbid: bids ${cap:.3f}/h, all that the caps allow")
            rental.bid = cap
            self.desk.market.raise_bid(rental.id, cap)

    def note_traffic(self) -> None:
        """Moves the bytes counted over to the rental, from the machine's side."""
        traffic = self.remote.traffic
        self.rental.gb_up += traffic.down / 1e9
        self.rental.gb_down += traffic.up / 1e9
        traffic.up = traffic.down = 0
        self.desk.records.save(self.record)

    def give_up(self, lost: Lost) -> None:
        """Ends the machine, keeps its log, and avoids it if it was at fault."""
        rental = self.rental
        self.say(f"gives up instance {rental.id}: {lost}")
        if lost.avoid:
            self.record.avoid.append(rental.machine_id)
        log = self.desk.records.folder / "logs" / f"instance-{rental.id}.txt"
        log.parent.mkdir(exist_ok=True)
        log.write_text(f"{lost}\n{self.desk.market.log(rental.id)}")
        self.desk.end(self.record, str(lost))
        with contextlib.suppress(FileNotFoundError):
            (self.desk.records.folder / f"ssh_config-{rental.id}").unlink()
        self.remote = None

    def check_stop(self) -> None:
        if self.desk.stop.is_set():
            raise Stopped

    def say(self, text: str) -> None:
        self.desk.say(f"shard {self.record.shard}: {text}")
