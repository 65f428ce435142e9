"""Files that are written whole or not at all: text, json, csv, tensors. And the one lock.

Nothing is pickled. A file is written beside its place, synced and renamed, so a SIGKILL at any
moment leaves either the old file or the new one.

What is read back carries a checksum of its contents: tensors and records (a JSON object) hold their
own, under CHECKSUM; that of any other file stands in a record. Files that have none, of older
versions, are read as they are.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_coding.config import UserError, first_line, hash63, require

if TYPE_CHECKING:  # what runs on a rented machine has no torch yet
    from safetensors import safe_open
    from torch import Tensor

KEPT_FROM = 2**24  # bytes: a smaller file is hashed each time, which is as quick as to look it up
SETTLED_NS = 60 * 10**9  # a file that changed less than this before may change again unseen: clocks
# of file systems are coarse, those of servers differ, and a memory map writes when it likes
DISK_RESERVE = 64 * 2**20  # bytes left free on the disk by every large write; ours, not tuned
CHECKSUM = "checksum"  # key of a record, and of the info of tensors
SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
                     "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t")  # what a spreadsheet takes for the start of one

JSON_BYTES = 32 * 2**20  # of a JSON file at most: lists of lists take 30 times that in memory


class Damaged(UserError):
    """A file is not what was written: torn, or with other bytes than its checksum says.

    Args:
        why: in words
        remedy: for a caller that can do no better than to end
    """

    def __init__(self, path: Path, why: object, remedy: str = "the same command makes it again"):
        self.why, self.what = why, f"{path} is damaged ({why})"
        super().__init__(f"{self.what}: {remedy}")

    def warn(self, consequence: str) -> None:
        """One line on stderr: what is damaged, and what this command does about it."""
        from tqdm import tqdm  # a rented machine has none

        tqdm.write(f"warning: {self.what}: {consequence}", file=sys.stderr)  # above a bar


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on leaving it is synced and renamed to `path`.

    The parent folder is made if it is missing. After an exception `path` is as it was. What the
    system refuses is raised as OSError with `path` as its filename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: two shards, on any hosts, may write the same file (config.json)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from within names `path` where it names no file (write, fsync) or a temporary."""
    try:
        yield
    except OSError as error:
        if error.filename is None or is_temporary(Path(error.filename)):
            error.filename, error.filename2 = os.fspath(path), None
        raise


def is_temporary(path: Path) -> bool:
    """Whether the file is one that a killed process left behind half written: of written_whole, or
    of the safetensors library, with which older versions wrote."""
    return bool(re.fullmatch(r"\..+\.tmp|\.tmp[0-9A-Za-z]{6}", path.name))


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes the file whole or not at all. Of a name that is no UTF-8, text has \\udcNN."""
    if isinstance(data, str):
        data = data.encode("utf-8", "backslashreplace")
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


# --- tensors ---


def write_tensors(path: Path, tensors: dict, *, info: dict | None = None) -> None:
    """Writes a safetensors file atomically, `info` as JSON in its metadata, with a checksum.

    Not by the library: that leaves temporary files of its own behind, and what it raises for a full
    disk is no OSError.

    Raises:
        UserError: it would not fit on the disk.
    """
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    require_free_disk(path.parent, sum(t.nbytes for t in on_cpu.values()))
    info = info or {}
    info = json.dumps(info | {CHECKSUM: _tensors_checksum(on_cpu, info)}, sort_keys=True)
    header, end = {"__metadata__": {"info": info}}, 0
    names = sorted(on_cpu, key=lambda name: (-on_cpu[name].element_size(), name))  # aligned
    for name in names:
        tensor, start = on_cpu[name], end
        end += tensor.nbytes
        dtype = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        entry = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(on_cpu[name]))


def read_tensors(path: Path, *, check: bool = True) -> tuple[dict, dict]:
    """(tensors, info) of a file of write_tensors, or the tensors of any safetensors file.

    Args:
        check: against the checksum
    Raises:
        Damaged: torn, or not what was written.
    """
    from safetensors import SafetensorError

    try:
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Damaged(path, error) from None
    info = _tensor_info(path)
    checksum = info.pop(CHECKSUM, None)
    if check and checksum not in (None, _tensors_checksum(tensors, info)):
        raise Damaged(path, "its checksum differs")
    return tensors, info


def read_tensor_info(path: Path) -> dict:
    """The info of a file of write_tensors, unchecked, without its tensors. Raises Damaged if it is
    torn."""
    info = _tensor_info(path)
    info.pop(CHECKSUM, None)
    return info


def tensors_checksum(path: Path) -> str | None:
    """The checksum that a file of write_tensors holds; None in one of an older version."""
    return _tensor_info(path).get(CHECKSUM)


def _tensor_info(path: Path) -> dict:
    from safetensors import SafetensorError

    try:
        with _opened(path) as file:
            metadata = file.metadata() or {}
        info = json.loads(metadata.get("info", "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise Damaged(path, error) from None
    misnamed = "info" not in metadata and any(CHECKSUM in text for text in metadata.values())
    if misnamed or not isinstance(info, dict):
        raise Damaged(path, "its metadata are not ours")
    return info


@contextlib.contextmanager
def _opened(path: Path) -> "Iterator[safe_open]":
    """The safetensors file. The library takes no name that is not UTF-8: such a one gets another,
    for the time that it is open."""
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        open(path, "rb").close()  # what the library says of a directory names neither it nor why
        if "\\udc" in ascii(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            link = Path(folder, "link")
            link.symlink_to(path.resolve())
            path = link
        yield stack.enter_context(safe_open(path, framework="pt"))


def _tensors_checksum(tensors: dict, info: dict) -> str:
    """sha256 of the info, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: "Tensor") -> memoryview:
    """Of a tensor that lies in the CPU's memory without gaps."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
    """16 hex digits of the names and the whole contents of files: an edit anywhere gives others.

    Raises:
        UserError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(os.fsencode(path.name) + b"/" + kept_sha256(path).encode())
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def kept_sha256(path: Path) -> str:
    """sha256 of a file; that of a large one is kept in the user's cache folder while the file's
    path, inode, size and dates stay as they are, and taken anew when in doubt."""
    return _kept(path, sha256)


def verified_checksum(path: Path) -> str | None:
    """The checksum that a file of write_tensors holds, if the file is what was written; that of a
    large one is kept, as by kept_sha256.

    Raises:
        Damaged: torn, or not what was written.
    """

    def verified(path: Path) -> str:
        read_tensors(path)
        return tensors_checksum(path) or ""

    return _kept(path, verified, suffix="-verified") or None


def _kept(path: Path, find: Callable[[Path], str], *, suffix: str = "") -> str:
    """find(path); of a large file, as a note of that says while the file is the same."""
    if path.stat().st_size < KEPT_FROM:
        return find(path)
    before, looked_at = _identity(path), time.time_ns()
    note = hashes_folder() / f"{hash63(os.fsencode(path.resolve())):016x}{suffix}"
    with contextlib.suppress(OSError, ValueError):  # not there, can't be read, no text
        digest, _, seal = note.read_text().partition(" ")
        if seal == _seal(before, digest):  # else of another state of the file, or damaged
            return digest
    digest, stat = find(path), path.stat()
    settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < looked_at - SETTLED_NS
    if settled and _identity(path) == before:
        with contextlib.suppress(OSError):  # a cache that can't be written costs time, no more
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{digest} {_seal(before, digest)}")  # a torn one breaks its seal
    return digest


def hashes_folder() -> Path:
    """Where kept_sha256 keeps its notes: one small file each, any of which may be deleted."""
    return cache_folder() / "sha256"


def cache_folder() -> Path:
    """The user's, for what can be made again at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "sparse_coding")


def _identity(path: Path) -> str:
    """Of a file, without reading it. Its ctime, which nobody can set, changes with every write."""
    stat = path.stat()
    numbers = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return f"{path.resolve()} {numbers}"


def _seal(identity: str, digest: str) -> str:
    return hashlib.sha256(os.fsencode(f"{identity} {digest}")).hexdigest()


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


# --- json and csv ---


def write_json(path: Path, data: object) -> None:
    """Indented JSON, written whole."""
    write_atomic(path, json.dumps(data, indent=1) + "\n")


def write_record(path: Path, record: dict) -> None:
    """JSON with the record's checksum in it, written whole: for read_record."""
    write_json(path, record | {CHECKSUM: record_checksum(record)})


def read_record(path: Path) -> dict:
    """The JSON object of write_record, without its checksum.

    Raises:
        Damaged: torn, or not what was written.
    """
    try:
        record = json.loads(_start_of(path))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"not JSON: {error}") from None
    if not isinstance(record, dict) or not record:
        raise Damaged(path, "it holds no object, or an empty one")
    checksum = record.pop(CHECKSUM, None)
    if checksum not in (None, record_checksum(record)):
        raise Damaged(path, "its checksum differs")
    return record


def stored_checksum(path: Path) -> str | None:
    """The checksum that a file of write_tensors or write_record holds, unchecked; None without."""
    if path.suffix == ".safetensors":
        return tensors_checksum(path)
    return json.loads(path.read_bytes()).get(CHECKSUM)


def record_checksum(record: dict) -> str:
    """sha256 of the record, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, *, remedy: str) -> dict:
    """The object that a JSON file holds, whoever wrote it.

    remedy: what to do about a file that is none, the end of the error's line
    Raises:
        UserError: it can't be read, is larger than JSON_BYTES, no JSON, or no object.
    """
    try:
        data = _start_of(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): {remedy}") from None
    require(
        len(data) <= JSON_BYTES, f"{path} is larger than {JSON_BYTES >> 20} MB of JSON: {remedy}"
    )
    content = parse_json(data, path, remedy=remedy)
    is_object = isinstance(content, dict)
    require(is_object, f"{path} holds a {type(content).__name__}, not a JSON object: {remedy}")
    return content


def _start_of(path: Path) -> bytes:
    """The file, or one byte more than JSON has: not asked for its size, since it may be a device.
    Of a record that is cut so, the end is missing."""
    with open(path, "rb") as file:
        return file.read(JSON_BYTES + 1)


def parse_json(data: bytes | str, source: Path | str, *, remedy: str) -> object:
    """What the JSON holds.

    Raises:
        UserError: no JSON, no UTF-8, nested too deep, a number of thousands of digits.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON ({first_line(error)}): {remedy}") from None


def csv_text(rows: list[dict], columns: Sequence[str] = ()) -> str:
    """Rows as a csv, all digits; None is an empty field. Text that a spreadsheet would take for a
    formula has a ' before it.

    columns: of the table; default: the keys of the first row
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _plain(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def write_csv(path: Path, rows: list[dict]) -> None:
    """csv_text, written whole."""
    write_atomic(path, csv_text(rows))


def read_csv(path: Path, *, checksum: str | None = None, texts: Sequence[str] = ()) -> list[dict]:
    """Rows of write_csv with numbers as int or float and None for empty fields.

    Args:
        checksum: sha256 that the file must have
        texts: columns that are no numbers
    Raises:
        Damaged: it has another, or is no table of numbers.
    """
    data = path.read_bytes()
    if checksum not in (None, hashlib.sha256(data).hexdigest()):
        raise Damaged(path, "its checksum differs")
    try:
        rows = csv.DictReader(io.StringIO(data.decode(), newline=""), strict=True)
        return [{k: v if k in texts else _number(v) for k, v in row.items()} for row in rows]
    except (ValueError, TypeError, csv.Error) as error:
        raise Damaged(path, error) from None


def _number(text: str) -> int | float | None:
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
