"""Run folders: atomic files, checkpoints that fall back, refusal of other constants. Floor 1.

Nothing here is pickled. Every file is written whole (temporary file, fsync, rename), so a SIGKILL
at any moment leaves either the old file or the new one.
"""

import contextlib
import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sparse_coding.config import UserError, require

PACKAGES = ("torch", "numpy", "safetensors", "matplotlib", "wandb", "tyro")  # named in config.json
DISK_RESERVE = 64 * 2**20  # bytes left free on the disk by every large write; ours, not tuned


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on leaving it is synced and renamed to `path`.

    The parent folder is made if it is missing. After an exception `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # pid: two shards on one host may write the same file (config.json), each its own temporary
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_tensors(path: Path) -> tuple[dict, dict]:
    """(tensors, info) of a file of write_tensors. Raises SafetensorError if it is torn."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        info = json.loads((file.metadata() or {}).get("info", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118


def read_tensor_info(path: Path) -> dict:
    """The info of a file of write_tensors, without its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("info", "{}"))


def require_free_disk(folder: Path, n_bytes: int) -> None:
    """Raises UserError unless n_bytes and a reserve fit on the disk of the folder."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    require(
        free >= n_bytes + DISK_RESERVE,
        f"disk full: {n_bytes / 1e6:.0f} MB to write under {folder}, {free / 1e6:.0f} MB free: "
        "free some space or choose another --output-dir, then run it again",
    )


class CheckpointStore:
    """The last two checkpoints of one group of cells, as <folder>/step-<8 digits>.safetensors."""

    def __init__(self, folder: Path):
        self.folder = folder

    def paths(self) -> list[Path]:
        """Checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def save(self, step: int, tensors: dict, *, info: dict) -> None:
        """Writes one more and drops all but the last two."""
        path = self.folder / f"step-{step:08d}.safetensors"
        write_tensors(path, tensors, info={**info, "step": step})
        for old in self.paths()[2:]:
            old.unlink(missing_ok=True)

    def info(self) -> dict | None:
        """The info of the newest readable checkpoint, None if there is none."""
        from safetensors import SafetensorError

        for path in self.paths():
            with contextlib.suppress(SafetensorError):  # load() will say so
                return read_tensor_info(path)
        return None

    def load(self) -> tuple[dict, dict] | None:
        """(tensors, info) of the newest readable checkpoint, None if there is none.

        An unreadable one is named on stderr and removed: the previous one takes its place.
        """
        from safetensors import SafetensorError

        for path in self.paths():
            try:
                return read_tensors(path)
            except SafetensorError as error:
                print(
                    f"warning: checkpoint {path} is damaged ({error}): going back to the previous",
                    file=sys.stderr,
                )
                path.unlink()
        return None

    def remove(self) -> None:
        """Removes the folder: the group is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock of this name in the folder; a killed process holds none.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / f".{name}.lock", blocking=False):
            yield
    except Timeout:
        raise UserError(f"another process is running in {folder}: wait for it or stop it") from None


def open_run_folder(folder: Path, *, constants: dict, about: dict, fresh: bool) -> None:
    """Makes the folder or checks that it belongs to the same constants; writes config.json.

    Args:
        constants: what the numbers depend on; a folder with other constants is refused
        about: the rest of config.json (command, versions, ...)
        fresh: forget what the folder holds, if it is one of ours
    Raises:
        UserError: it is a file, can't be written, or belongs to something else.
    """
    require(
        not folder.exists() or folder.is_dir(), f"--output-dir {folder} is a file, not a folder"
    )
    config_path = folder / "config.json"
    if folder.is_dir() and any(folder.iterdir()):
        _require_same_constants(folder, constants, fresh)
        if fresh:
            shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except (PermissionError, NotADirectoryError, FileExistsError):
        raise UserError(f"--output-dir {folder} can't be written: choose another one") from None
    if not config_path.exists():
        write_json(config_path, {"constants": constants, **about})


def _require_same_constants(folder: Path, constants: dict, fresh: bool) -> None:
    try:
        stored = json.loads((folder / "config.json").read_text())["constants"]
    except (OSError, ValueError, KeyError):
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:3])
        raise UserError(
            f"--output-dir {folder} is not empty ({names}) and has no config.json of ours: "
            "choose another one"
        ) from None
    as_stored = json.loads(json.dumps(constants))  # tuples become lists, as in the file
    keys = sorted(stored.keys() | as_stored.keys())
    differing = [k for k in keys if stored.get(k) != as_stored.get(k)]
    shown = ", ".join(f"{k} {stored.get(k)} there, {as_stored.get(k)} here" for k in differing[:6])
    require(
        not differing or fresh,
        f"--output-dir {folder} belongs to other constants ({shown}): "
        "choose another one, or --fresh to start again there",
    )


def write_json(path: Path, data: object) -> None:
    write_atomic(path, json.dumps(data, indent=1) + "\n")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows (of one set of keys) as a csv, written whole; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


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


def about_this_run(device: str, **more: object) -> dict:
    """Command, commit and versions for config.json. No host name, no path, no environment."""
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    command = " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"command": command, **_git_state(), "versions": versions, "device": device, **more}


def _git_state() -> dict:
    """Commit and whether tracked files differ from it; nulls outside a git checkout."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }
