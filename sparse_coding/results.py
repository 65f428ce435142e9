"""Run folders: one per set of constants, with checkpoints that fall back. Floor 1."""

import contextlib
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
from sparse_coding.files import (
    is_temporary,
    read_tensor_info,
    read_tensors,
    write_atomic,
    write_json,
    write_tensors,
)

PACKAGES = ("torch", "numpy", "safetensors", "matplotlib", "wandb", "tyro")  # named in config.json


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
    is_file = folder.exists() and not folder.is_dir()
    require(not is_file, f"--output-dir {folder} is a file: choose another one")
    config_path = folder / "config.json"
    # a process killed before it wrote config.json leaves a temporary file at most
    if folder.is_dir() and any(not is_temporary(path) for path in folder.iterdir()):
        _require_same_constants(folder, constants, fresh)
        if fresh:
            with locked(folder, "run"):
                shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except (PermissionError, NotADirectoryError, FileExistsError):
        raise UserError(f"--output-dir {folder} can't be written: choose another one") from None
    if not config_path.exists():
        write_json(config_path, {"constants": constants, **about})


def close_run_folder(folder: Path) -> None:
    """Removes what only a resume needs, and what killed processes left; writes DONE, the last."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in folder.rglob(".*"):
        if is_temporary(path):
            path.unlink()
    write_atomic(folder / "DONE", "")


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


def about_this_run(device: str, **more: object) -> dict:
    """Command, commit and versions for config.json. No host name, no path, no environment."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # wandb may be left out
            versions[name] = metadata.version(name)
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
