"""Run folders: one per set of constants, with checkpoints that fall back."""

import contextlib
import errno
import fcntl
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

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "matplotlib",
    "wandb",
    "tyro",
    "transformers",
    "tokenizers",
    "datasets",
    "tiktoken",
)  # named in config.json
MACHINE = {"device_type", "precision"}  # constants that matter while something is trained
GIT_STATE = "SPARSE_CODING_GIT_STATE"  # set on rented machines, where the code is no checkout


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
            with contextlib.suppress(SafetensorError, FileNotFoundError):  # load() will say so
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
def locked(folder: Path, shard_suffix: str = "") -> Iterator[None]:
    """Keeps other processes out of the folder; a killed process keeps out none.

    Shards share it, each number once. A run without shards has it alone: it would train their
    cells a second time.

    Raises:
        UserError: another process is there.
    """
    locks = [(".run.lock", fcntl.LOCK_SH if shard_suffix else fcntl.LOCK_EX)]
    if shard_suffix:
        locks.append((f".run{shard_suffix}.lock", fcntl.LOCK_EX))
    with contextlib.ExitStack() as held:
        for name, kind in locks:
            file = held.enter_context(open(folder / name, "a+"))  # NFS: LOCK_SH reads
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"another process is running in {folder}: wait for it or stop it"
                raise UserError(message) from None
        yield


def open_run_folder(
    folder: Path, *, constants: dict, about: dict, fresh: bool, complete: bool = False
) -> None:
    """Makes the folder or checks that it belongs to the same constants; writes config.json.

    Args:
        constants: what the numbers depend on; a folder with other constants is refused
        about: the rest of config.json (command, versions, ...)
        fresh: forget what the folder holds, if it is one of ours
        complete: nothing is left to train there, so the kind of machine does not matter: what GPUs
            have trained is merged and shown on a laptop
    Raises:
        UserError: it is a file, can't be written, or belongs to something else.
    """
    is_file = os.path.exists(folder) and not folder.is_dir()  # os.path: False if it can't be
    require(not is_file, f"--output-dir {folder} is a file: choose another one")
    config_path = folder / "config.json"
    # a process killed before it wrote config.json leaves a temporary file at most
    if os.path.isdir(folder) and any(not is_temporary(path) for path in folder.iterdir()):
        _require_same_constants(folder, constants, fresh, besides=MACHINE if complete else set())
        if fresh:
            with locked(folder):
                shutil.rmtree(folder.resolve())  # resolved: a link stays, what it names goes
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError as error:  # below a file, read-only, too long, a dangling link, ...
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--output-dir {folder} can't be written: choose another one") from None
    if not config_path.exists():
        write_json(config_path, {"constants": constants, **about})
    elif not (folder / "DONE").exists():  # a finished run is not gone on with
        _note_other_code(config_path, about)


def _note_other_code(config_path: Path, about: dict) -> None:
    """Warns, and keeps a record, if this process runs other code or packages than the one before:
    then the final numbers are those of no single version."""
    config = json.loads(config_path.read_text())
    before = (config.get("resumed_by") or [config])[-1]
    differing = [k for k in ("git_commit", "versions") if before.get(k) != about.get(k)]
    if differing:
        names = " and ".join(differing)
        print(f"warning: {config_path.parent} was begun with other {names}", file=sys.stderr)
        config["resumed_by"] = [*config.get("resumed_by", []), about]
        write_json(config_path, config)


def close_run_folder(folder: Path) -> None:
    """Joins the shards' time series, removes what only a resume needs; writes DONE, the last."""
    series = [folder / "metrics.jsonl", *sorted(folder.glob("metrics-shard-*.jsonl"))]
    lines = [line for path in series if path.exists() for line in path.read_text().splitlines(True)]
    write_atomic(series[0], "".join(dict.fromkeys(lines)))  # each once, also if killed here before
    for path in series[1:]:
        path.unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in folder.rglob(".*"):
        if is_temporary(path):
            path.unlink()
    write_atomic(folder / "DONE", "")


def _require_same_constants(
    folder: Path, constants: dict, fresh: bool, *, besides: set[str]
) -> None:
    try:
        stored = json.loads((folder / "config.json").read_text())["constants"]
        keys = sorted(stored.keys() | constants.keys())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:3])
        raise UserError(
            f"--output-dir {folder} is not empty ({names}) and has no config.json of ours: "
            "choose another one"
        ) from None
    as_stored = json.loads(json.dumps(constants))  # tuples become lists, as in the file
    differing = [k for k in keys if stored.get(k) != as_stored.get(k) and k not in besides]
    shown = ", ".join(f"{k} {stored.get(k)} there, {as_stored.get(k)} here" for k in differing[:6])
    require(
        not differing or fresh,
        f"--output-dir {folder} belongs to other constants ({shown}): "
        "choose another one, or --fresh to start again there",
    )


def about_this_run(device: str) -> dict:
    """Command, commit and versions for config.json. No host name, no path, no environment."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # wandb may be left out
            versions[name] = metadata.version(name)
    command = " ".join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"command": command, **git_state(), "versions": versions, "device": device}


def git_state(root: Path = Path(__file__).parents[2]) -> dict:
    """Commit, and whether tracked files differ from it; nulls outside a git checkout."""
    if GIT_STATE in os.environ:
        return json.loads(os.environ[GIT_STATE])

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
