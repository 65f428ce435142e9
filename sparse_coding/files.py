"""Files that are written whole or not at all: text, json, csv, tensors. And the one lock.

Nothing is pickled. A file is written beside its place, synced and renamed, so a SIGKILL at any
moment leaves either the old file or the new one.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sparse_coding.config import UserError, require

STAMPED = 2**20  # bytes read at either end for content_stamp
DISK_RESERVE = 64 * 2**20  # bytes left free on the disk by every large write; ours, not tuned


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on leaving it is synced and renamed to `path`.

    The parent folder is made if it is missing. After an exception `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: two shards, on any hosts, may write the same file (config.json)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether the file is one of written_whole that a killed process left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes the file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_tensors(path: Path, tensors: dict, *, info: dict | None = None) -> None:
    """Writes a safetensors file atomically, `info` as JSON in its metadata.

    Raises:
        UserError: it would not fit on the disk.
    """
    from safetensors.torch import save_file

    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    require_free_disk(path.parent, n_bytes)
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_whole(path) as temporary:
        save_file(on_cpu, temporary, metadata={"info": json.dumps(info or {}, sort_keys=True)})
        temporary.chmod(0o644)  # safetensors makes it 0600, which a group on a cluster can't read


def read_tensors(path: Path) -> tuple[dict, dict]:
    """(tensors, info) of a file of write_tensors. Raises SafetensorError if it is torn."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, read_tensor_info(path)


def read_tensor_info(path: Path) -> dict:
    """The info of a file of write_tensors, without its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("info", "{}"))


def require_free_disk(folder: Path, n_bytes: int) -> None:
    """Raises UserError unless n_bytes and a reserve fit on the disk of the folder."""
    free = shutil.disk_usage(existing(folder)).free
    require(
        free >= n_bytes + DISK_RESERVE,
        f"disk full: {n_bytes / 1e6:.0f} MB to write under {folder}, {free / 1e6:.0f} MB free: "
        "free some space or choose another --output-dir, then run it again",
    )


def require_private(path: Path) -> None:
    """Raises UserError if others may read the file."""
    mode = stat.S_IMODE(path.stat().st_mode)
    require(not mode & 0o077, f"{path} can be read by others (mode {mode:04o}): chmod 600 {path}")


def content_stamp(paths: list[Path]) -> str:
    """16 hex digits of each file's size and its first and last MB, to notice cheaply that a file
    was edited or written anew. (A change in the middle of the same size goes unseen.)

    Raises:
        UserError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{size} ".encode() + file.read(STAMPED))
                file.seek(max(0, size - STAMPED))
                digest.update(file.read(STAMPED))
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def sha256(path: Path) -> str:
    """Hex digits of the file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def held(path: Path, *, shared: bool = False, when_busy: Callable[[], None] = lambda: None):
    """Holds the lock file, made if it is missing, against other processes; a killed one holds none.

    Args:
        shared: together with others that share it
        when_busy: called before waiting for another process; it may raise instead
    """
    with open(path, "a+") as file:  # NFS: a shared lock reads
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            when_busy()
            fcntl.flock(file, kind)
        yield


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    while not os.path.exists(folder):  # also False for a name that is too long
        folder = folder.parent
    return folder


def write_json(path: Path, data: object) -> None:
    """Indented JSON, written whole."""
    write_atomic(path, json.dumps(data, indent=1) + "\n")


def csv_text(rows: list[dict], columns: Sequence[str] = ()) -> str:
    """Rows as a csv, all digits; None is an empty field.

    columns: of the table; default: the keys of the first row
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: list[dict]) -> None:
    """csv_text, written whole."""
    write_atomic(path, csv_text(rows))


def read_csv(path: Path) -> list[dict]:
    """Rows of write_csv with numbers as int or float and None for empty fields."""
    with open(path, newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float | None:
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
