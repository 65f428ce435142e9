"""Run folders: one per set of constants, with checkpoints that fall back and files per cell.

Shards write into the same folder, or into folders that are copied together. What is damaged is made
again: a cell is trained (see cells.py), a table merged, a checkpoint does without.
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from sparse_coding.config import DISK_ERRORS, UserError, fingerprint, require
from sparse_coding.files import (
    Damaged,
    held,
    is_temporary,
    read_csv,
    read_record,
    read_tensor_info,
    read_tensors,
    sha256,
    write_atomic,
    write_record,
    write_tensors,
)
from sparse_coding.sae.families import PREFIXES, Kind
from sparse_coding.sweep.cells import forget_damaged, missing_cells
from sparse_coding.sweep.grid import Cell, Shard, plan_groups, split_by_cost, wait_for_all_ranks
from sparse_coding.sweep.tracking import read_series

# named in config.json
PACKAGES = ("torch", "triton", "numba", "numpy", "safetensors", "matplotlib", "wandb", "tyro",
            "transformers", "tokenizers", "datasets", "tiktoken")  # fmt: skip
CONFIG, TABLE = "config.json", "results.csv"
TEXTS = ("arch",)  # columns of it that are no numbers
# all that runs write below their folder, but for config.json, which tells that it is theirs, and
# the folder of W&B: what --fresh deletes
WRITTEN = (
    "DONE", TABLE, "report.html", "features.html", "shown.json", "world.safetensors", "world.npz",
    "world[0-9]*.npz", "features/seed*.html",
    "metrics.jsonl", "metrics-shard-*.jsonl", "wandb_run-*.json", "figures/*.png", "figures/*.csv",
    "cells/seed*.json", "saes/seed*/*.safetensors", "saes/seed*/cfg.json",
    "dictionaries/seed*.safetensors", "dictionary_learning/seed*/ae.pt",
    "dictionary_learning/seed*/config.json", "sparsify/seed*/sae.safetensors",
    "sparsify/seed*/cfg.json", "circuit_tracer/seed*/layer_*.safetensors",
    "circuit_tracer/seed*/config.yaml", "hub/README.md", "hub/results.csv", "hub/figures/*.png",
    "hub/*/seed*/README.md", "hub/*/seed*/*.safetensors", "hub/*/seed*/cfg.json",
    "checkpoints/*/step-*.safetensors",
)  # fmt: skip
# constants that matter while something is trained
MACHINE = {"device_type", "precision", "stdlib_files"}
RENAMED = {"learning_rate": "lr"}  # constants of older folders
ADDED = {"arch": ["relu"], "target_l0": [], "prefixes": list(PREFIXES),
         "baseline": "none", "world": "42", "n_worlds": 1,
         "n_eval_samples": 2560, "decoder_rows": "unit"}  # since, as they were  # fmt: skip
# since, too, and no part of a run's constants while they are these: it keeps its name
UNSET = {"target_site": "", "skip": False}
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
        for path in self.paths():
            with contextlib.suppress(Damaged, FileNotFoundError):  # load() will say so
                return _info_of_checkpoint(path, read_tensor_info(path))
        return None

    def load(self, wanted: dict | None = None) -> tuple[dict, dict] | None:
        """(tensors, info) of the newest undamaged checkpoint, None if there is none.

        A damaged one is named on stderr and removed: the previous one takes its place.

        wanted: what its info must say
        """
        for path in self.paths():
            try:
                tensors, info = read_tensors(path)
                info = _info_of_checkpoint(path, info)
                if info | (wanted or {}) != info:
                    raise Damaged(path, "it is that of another group")
                return tensors, info
            except Damaged as error:
                error.warn("going back to the checkpoint before it, or to the start")
                path.unlink()
        return None

    def remove(self) -> None:
        """Removes the folder: the group is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _info_of_checkpoint(path: Path, info: dict) -> dict:
    """The info. Raises Damaged if it is none of CheckpointStore.save."""
    cells, step = info.get("cells"), info.get("step")
    named = isinstance(cells, list) and all(isinstance(name, str) for name in cells)
    if not named or len(set(cells)) < len(cells) or type(step) is not int:
        raise Damaged(path, "its info is none of a checkpoint")
    if step != int(path.stem.removeprefix("step-")):
        raise Damaged(path, "it is that of another step")
    return info


@contextlib.contextmanager
def locked(folder: Path, shard_suffix: str = "") -> Iterator[None]:
    """Keeps other processes out of the folder; a killed process keeps out none.

    Shards share it, each number once. A run without shards has it alone: it would train their
    cells a second time.

    Raises:
        UserError: another process is there.
    """

    def refuse() -> None:
        raise UserError(f"another process is running in {folder}: wait for it or stop it")

    with contextlib.ExitStack() as locks:
        lock = held(folder / ".run.lock", shared=bool(shard_suffix), when_busy=refuse)
        locks.enter_context(lock)
        if shard_suffix:
            locks.enter_context(held(folder / f".run{shard_suffix}.lock", when_busy=refuse))
        yield


@contextlib.contextmanager
def opened_run_folder(
    folder: Path,
    *,
    constants: dict,
    origin: dict,
    fresh: bool,
    cells: list[Cell],
    shard: Shard,
) -> Iterator[None]:
    """The folder, made if need be, locked (see `locked`), with its config.json. Those of the
    shard's cells that are damaged are missing then, which is said.

    Args:
        constants: what the numbers depend on; a folder with other constants is refused
        origin: the rest of config.json: what provenance gives
        fresh: delete what runs wrote there, if it is one of ours; other files stay
        cells: of the run. If all are there the kind of machine does not matter: what GPUs have
            trained is merged and shown on a laptop
    Raises:
        UserError: it can't be written, or belongs to something else; another process is there.
    """

    def require_ours() -> None:
        complete = not fresh and not missing_cells(folder, cells)
        _require_same_constants(folder, constants, fresh, besides=MACHINE if complete else set())

    require_ours()  # before anything is written there
    _make(folder)
    with locked(folder, shard.suffix):
        require_ours()  # another process may have been there meanwhile
        if fresh:
            _forget_all(folder)
        if forget_damaged(folder, split_by_cost(cells, shard.count)[shard.index]):
            require_ours()  # of this kind of machine, too
        config_path = folder / CONFIG
        if fresh or not config_path.exists():
            write_record(config_path, {"constants": constants, **origin})
        elif not (folder / "DONE").exists():  # a finished run is not gone on with
            _note_other_code(config_path, origin)
        yield


def _make(folder: Path) -> None:
    """The folder. Raises UserError if it can't be written."""
    is_file = os.path.exists(folder) and not folder.is_dir()  # os.path: False if it can't be
    require(not is_file, f"--output-dir {folder} is a file: choose another one")
    try:
        folder.resolve().mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError as error:  # below a file, read-only, too long, a dangling link, ...
        if error.errno in DISK_ERRORS and error.errno != errno.EROFS:
            raise
        raise UserError(f"--output-dir {folder} can't be written: choose another one") from None


def _forget_all(folder: Path) -> None:
    """Deletes what runs wrote: DONE first, then the rows, lest a kill leave one without what it
    speaks of. The folder and its locks stay, so that no process can come in between, and
    config.json, without which the folder would not be ours. So do files of somebody else, which are
    named. A link stays, what it names goes.
    """
    (folder / "DONE").unlink(missing_ok=True)
    shutil.rmtree(folder / "wandb", ignore_errors=True)
    found = {path for pattern in WRITTEN for path in folder.glob(pattern)}
    files = [path for path in found if not path.is_dir() or path.is_symlink()]
    files.sort(key=lambda path: path.parent.name != "cells")
    for path in [*files, *_temporaries(folder)]:
        path.unlink()
    ours = {parent for path in files for parent in path.parents if folder in parent.parents}
    for path in sorted(ours, reverse=True):  # inner ones first
        with contextlib.suppress(OSError):  # somebody else's file is in it
            path.rmdir()
    left = [str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()]
    left = sorted(name for name in left if name != CONFIG and not _is_neutral(folder / name))
    if left:
        print(f"left in {folder}, since no run wrote it: {', '.join(left[:3])}")


def _temporaries(folder: Path) -> list[Path]:
    """Files of the folder that killed processes left half written."""
    return [path for path in folder.rglob(".*") if is_temporary(path)]


def _is_neutral(path: Path) -> bool:
    """Whether the file may stand in a folder that holds no run yet: a lock, or what a process left
    that was killed before it wrote config.json."""
    return is_temporary(path) or path.match(".run*.lock")


def _note_other_code(config_path: Path, origin: dict) -> None:
    """Warns, and keeps a record, if this process runs other code or packages than the one before:
    then the final numbers are those of no single version."""
    config = read_record(config_path)
    before = (config.get("resumed_by") or [config])[-1]
    differing = [k for k in ("git_commit", "versions") if before.get(k) != origin.get(k)]
    if differing:
        names = " and ".join(differing)
        print(f"warning: {config_path.parent} was begun with other {names}", file=sys.stderr)
        config["resumed_by"] = [*config.get("resumed_by", []), origin]
        write_record(config_path, config)


def close_run_folder(folder: Path) -> None:
    """Joins the shards' time series, removes what only a resume needs; writes DONE, the last, with
    the sha256 of results.csv."""
    series = [folder / "metrics.jsonl", *sorted(folder.glob("metrics-shard-*.jsonl"))]
    lines = [line for path in series if path.exists() for line in read_series(path)]
    write_atomic(series[0], b"".join(dict.fromkeys(lines)))  # each once, also if killed here before
    for path in series[1:]:
        path.unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for path in _temporaries(folder):
        path.unlink()
    # as `sha256sum -c DONE` takes it
    write_atomic(folder / "DONE", f"{sha256(folder / TABLE)}  {TABLE}\n")


def finished_rows(folder: Path) -> list[dict] | None:
    """Rows of results.csv where DONE says that nothing is left to do, else None. A table that is
    damaged is said, and None: it has to be merged again."""
    if not os.path.exists(folder / "DONE"):  # False for a name that is too long
        return None
    done = (folder / "DONE").read_bytes()
    try:
        if not done:  # of an older version
            return read_csv(folder / TABLE, texts=TEXTS)
        checksum, _, name = done.decode(errors="replace").partition("  ")
        if name != f"{TABLE}\n":
            raise Damaged(folder / "DONE", "it is no sha256 of a table")
        return read_csv(folder / TABLE, checksum=checksum, texts=TEXTS)
    except FileNotFoundError:
        Damaged(folder / TABLE, "it is missing").warn("made again from cells/")
    except Damaged as error:
        error.warn("made again from cells/")
    return None


def _require_same_constants(
    folder: Path, constants: dict, fresh: bool, *, besides: set[str]
) -> None:
    """Raises UserError if the folder holds something that is no run of ours, or, unless `fresh`,
    one of other constants."""
    if not os.path.isdir(folder):
        return
    names = sorted(path.name for path in folder.iterdir() if not _is_neutral(path))
    if not names:
        return
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        stored = {RENAMED.get(name, name): value for name, value in config["constants"].items()}
        stored = {k: v for k, v in ADDED.items() if k in constants} | stored
        if not fresh:
            read_record(folder / CONFIG)
    except Damaged as error:
        raise UserError(
            f"{error.what}: choose another --output-dir, or --fresh to start again there"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"--output-dir {folder} is not empty ({', '.join(names[:3])}) and has no config.json "
            "of ours: choose another one"
        ) from None
    as_stored = json.loads(json.dumps(constants))  # tuples become lists, as in the file
    keys = sorted(stored.keys() | constants.keys())
    differing = [k for k in keys if stored.get(k) != as_stored.get(k) and k not in besides]
    shown = ", ".join(f"{k} {stored.get(k)} there, {as_stored.get(k)} here" for k in differing[:6])
    require(
        not differing or fresh,
        f"--output-dir {folder} belongs to other constants ({shown}): "
        "choose another one, or --fresh to start again there",
    )


def provenance(device: str) -> dict:
    """Command, commit and versions for config.json. No host name, no path, no environment."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # wandb may be left out
            versions[name] = metadata.version(name)
    if "torch" in sys.modules:  # with its build, as 2.11.0+cu130, which metadata may leave out
        versions["torch"] = sys.modules["torch"].__version__
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


def run_folder_bytes(n_dicts: list[int], width: int) -> int:
    """Bytes of a run folder at its largest: autoencoders of these sizes and three checkpoints (one
    half written), each with Adam's two moments beside every parameter."""
    return sum(4 * (2 * n * width + n + width) * (1 + 3 * 3) for n in n_dicts)


def checkpoints_of(folder: Path, group: list[Cell]) -> CheckpointStore:
    """Where a group of cells that train together keeps its checkpoints."""
    return CheckpointStore(folder / "checkpoints" / group_id(group))


def group_id(group: list[Cell]) -> str:
    """8 hex digits of the group's cells."""
    return fingerprint({cell.name: None for cell in group})


def unfinished_groups(folder: Path, cells: list[Cell]) -> list[list[Cell]]:
    """Groups of these cells that have a checkpoint and a missing cell, as they were planned.

    So a resume keeps its progress even if memory, and with it the plan, has changed meanwhile.
    """
    by_name = {cell.name: cell for cell in cells}
    groups = []
    for path in sorted((folder / "checkpoints").glob("*")):
        names = (CheckpointStore(path).info() or {}).get("cells", [])
        group = [by_name[name] for name in names if name in by_name]
        whole = len(group) == len(names) and group_id(group) == path.name
        if whole and missing_cells(folder, group):
            groups.append(group)
            for name in names:  # a cell belongs to one group
                del by_name[name]
    return groups


def groups_to_train(
    folder: Path,
    cells: list[Cell],
    *,
    budget: float,
    memory_of: Callable[[list[Kind]], int],
) -> list[list[Cell]]:
    """Groups that cover the missing cells: those begun before, then new ones within the budget.

    Args:
        budget: bytes of memory; memory_of: bytes that an ensemble of these kinds needs
    """
    begun = unfinished_groups(folder, cells)
    in_them = {cell for group in begun for cell in group}
    new = [cell for cell in missing_cells(folder, cells) if cell not in in_them]
    return begun + plan_groups(new, budget, memory_of)


def may_merge(folder: Path, cells: list[Cell], shard: Shard) -> bool:
    """Whether this process merges: one without --shard, or rank 0 after all ranks. Says what else
    is to do where it does not, or where results are missing."""
    if shard.by_torchrun:
        wait_for_all_ranks()
        if shard.index > 0:
            return False
    n_missing = len(missing_cells(folder, cells))
    if n_missing or (shard.count > 1 and not shard.by_torchrun):
        print(
            f"shard done; {n_missing} of {len(cells)} cells are left to the others. When all their "
            f"files are in {folder}, the same command without --shard or torchrun merges them"
        )
        return False
    return True
