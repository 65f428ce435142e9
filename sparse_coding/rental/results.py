"""Results on their way home: pulled, verified, merged into one folder.

What comes from a rented machine counts only once every file matches the sums that were taken
there. The last such state is kept whole, beside the next one that is being fetched: from it a shard
goes on elsewhere when its machine is lost.
"""

import hashlib
import json
import shutil
from pathlib import Path

from sparse_coding.config import UserError
from sparse_coding.files import read_csv, written_whole
from sparse_coding.rental.machine import JOB
from sparse_coding.rental.remote import Remote, RemoteError
from sparse_coding.rental.remote_job import SUMS

REPULLS = 3  # of files whose sum is wrong, before the machine counts as broken
OF_ONE_SHARD = {"config.json", "metrics.jsonl"}  # written by every shard, with its own command


class Results:
    """What is home of one shard.

    folder: of the run; `verified` below it is the last whole state
    """

    def __init__(self, folder: Path, shard: int):
        self.verified = folder / f"results-{shard}"
        self.incoming = folder / f"incoming-{shard}"
        self.old = folder / f"old-{shard}"
        self.state = ""  # of `verified`: sha256 of its sums
        if self.old.exists() and not self.verified.exists():  # killed between two renames
            self.old.rename(self.verified)
        if (self.verified / SUMS).exists():
            self.state = _sha256(self.verified / SUMS)

    def pull(self, remote: Remote) -> bool:
        """Fetches the present state and verifies it; whether it is another one than before.

        Raises:
            RemoteError: it could not be fetched, or does not become what its sums say.
            OSError: our disk is full.
        """
        state = json.loads(remote.run(f"{JOB} snapshot", timeout=600))["state"]
        if state == self.state:
            return False
        for _ in range(REPULLS):
            remote.pull_folder(".sae/snapshot", self.incoming, known=self.verified)
            wrong = wrong_files(self.incoming)
            if not wrong and _sha256(self.incoming / SUMS) == state:
                self._accept(state)
                return True
            for path in [*wrong, self.incoming / SUMS]:
                path.unlink(missing_ok=True)
        names = ", ".join(path.name for path in wrong[:3])
        raise RemoteError("cut", f"fetched {REPULLS} times, and still not what it was: {names}")

    def _accept(self, state: str) -> None:
        shutil.rmtree(self.old, ignore_errors=True)
        if self.verified.exists():
            self.verified.rename(self.old)
        self.incoming.rename(self.verified)
        shutil.rmtree(self.old, ignore_errors=True)
        self.state = state


def wrong_files(folder: Path) -> list[Path]:
    """Files that are missing or not what SHA256SUMS says, and files that it does not name."""
    sums = folder / SUMS
    if not sums.exists():
        return [sums]
    lines = [line.split("  ", 1) for line in sums.read_text().splitlines()]
    named = {folder / name: digest for digest, name in lines}
    found = {path for path in folder.rglob("*") if path.is_file()} - {sums}
    wrong = [p for p, digest in named.items() if not p.is_file() or _sha256(p) != digest]
    return wrong + sorted(found - named.keys())


def merge(shards: list[Results], folder: Path) -> None:
    """Puts the shards' files into one folder, where the script then merges their cells.

    Raises:
        UserError: two shards have different results of one cell, or files are not what they were.
    """
    for results in shards:
        wrong = wrong_files(results.verified)
        if wrong:
            raise UserError(f"{wrong[0]} has changed since it was fetched: remove the folder "
                            f"{results.verified} and give the same command again")  # fmt: skip
        for source in sorted(p for p in results.verified.rglob("*") if p.is_file()):
            name = source.relative_to(results.verified)
            target = folder / name
            if str(name) == SUMS or (str(name) in OF_ONE_SHARD and target.exists()):
                continue
            if target.exists() and _sha256(target) != _sha256(source):
                # a cell twice with different numbers is a fault to look at, not to paper over
                raise UserError(f"{target} is there already with other contents than {source}")
            if not target.exists():
                with written_whole(target) as temporary:
                    shutil.copy2(source, temporary)


def summary(folder: Path) -> str:
    """How many cells the table has."""
    table = folder / "results.csv"
    rows = len(read_csv(table)) if table.exists() else 0
    return f"{rows} cells in {table}" if rows else f"no table yet in {folder}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
