"""Activations of a language model as shards of rows, on disk or computed when asked for. Floor 2.

    <folder>/manifest.json              what the rows depend on, then every shard with its sha256
    <folder>/shard-00000.safetensors    activations (rows, width), document_ids (those it has)

A shard is a fixed stretch of the packed text, so it can be computed alone: a killed harvest goes on
with the shards that are missing, and a store may grow. Its rows are shuffled.
"""

import fcntl
import hashlib
import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_coding.config import UserError, named_seed, require
from sparse_coding.files import (
    DISK_RESERVE,
    existing,
    read_tensor_info,
    read_tensors,
    require_free_disk,
    write_json,
    write_tensors,
)
from sparse_coding.language_model import LanguageModel, Site, activations
from sparse_coding.packing import Packed

SHARD_BYTES = 32 * 2**20  # of a shard, about; ours: small enough to mix many of them in memory
STATISTICS_ROWS = 65_536  # rows behind the mean and the scale: standard error of a mean < 0.5 %
EXTREME_NORM = 10.0  # x the median norm of the shard: such a row is counted as extreme


class Shards(Protocol):
    """Rows to train on, shard by shard; rows[k] is the number of rows of shard k."""

    rows: list[int]

    def load(self, k: int) -> Tensor:
        """Shard k, (rows[k], width) in float16 or bfloat16."""


@dataclass(frozen=True)
class Harvester:
    """Computes shards with the language model.

    store_dtype: float16 or bfloat16, in which rows are kept
    lm_batch_size: rows of text per forward pass
    """

    lm: LanguageModel
    site: Site
    text: Packed
    store_dtype: torch.dtype
    lm_batch_size: int
    n_tokens: int  # wished; there may be fewer

    @property
    def texts_per_shard(self) -> int:
        """Rows of text behind a shard."""
        row_bytes = self.text.context_length * self.site.width * self.store_dtype.itemsize
        return max(1, round(SHARD_BYTES / row_bytes))

    def span(self, k: int) -> tuple[int, int]:
        """First and last (exclusive) row of text of shard k."""
        n = self.texts_per_shard
        return k * n, min((k + 1) * n, self.text.n_rows)

    @cached_property
    def rows(self) -> list[int]:
        """Activations of each shard, as many shards as hold n_tokens of them, or all there are."""
        rows: list[int] = []
        n_shards = -(-self.text.n_rows // self.texts_per_shard)
        while len(rows) < n_shards and sum(rows) < self.n_tokens:
            rows.append(int(self.text.keep(*self.span(len(rows))).sum()))
        return rows

    @property
    def n_bytes(self) -> int:
        return sum(self.rows) * self.site.width * self.store_dtype.itemsize

    def load(self, k: int) -> Tensor:
        """Shard k, computed.

        Raises:
            UserError: an activation is too large for the store's dtype, or not a number.
        """
        start, stop = self.span(k)
        parts = []
        for first in range(start, stop, self.lm_batch_size):
            last = min(first + self.lm_batch_size, stop)
            ids = self.text.rows(first, last)
            keep = torch.from_numpy(self.text.keep_of(ids)).to(self.lm.device)
            x = activations(self.lm, self.site, torch.from_numpy(ids))[keep]  # (kept, width)
            parts.append(x.to(self.store_dtype).cpu())
        rng = torch.Generator().manual_seed(named_seed("shard", k))
        rows = torch.cat(parts)
        require(
            bool(torch.isfinite(rows).all()),
            f"activations of layer {self.site.layer} {self.site.name} are beyond the range of "
            f"{self.store_dtype}: use --store-dtype bfloat16",
        )
        return rows[torch.randperm(len(rows), generator=rng)]


def open_activations(
    harvester: Harvester, folder: Path, about: dict, *, max_bytes: float
) -> Shards:
    """The harvester's shards on disk, harvested now if need be; where they need more than
    max_bytes or than is free, the harvester itself, which computes each shard as it is read."""
    n_rows, n_bytes = sum(harvester.rows), harvester.n_bytes
    if n_rows < harvester.n_tokens:
        epochs = harvester.n_tokens / n_rows
        print(
            f"{harvester.n_tokens:,} tokens requested, {n_rows:,} available = {epochs:.1f} epochs"
        )
    have = sum(path.stat().st_size for path in folder.glob("shard-*"))
    free = shutil.disk_usage(existing(folder)).free - DISK_RESERVE + have
    size = f"{n_rows:,} activations, {n_bytes / 1e9:.2f} GB"
    if n_bytes > max_bytes:
        print(f"{size}, over --max-disk-gb {max_bytes / 1e9:g}: computed as they are read")
        return harvester
    if n_bytes > free:
        print(f"{size}, {free / 1e9:.2f} GB free: computed as they are read")
        return harvester
    print(f"{size} in {folder}", flush=True)
    return open_store(folder, harvester, about=about)


class Store:
    """Shards on disk. Each is checked against its sha256 when it is first read."""

    def __init__(self, folder: Path, rows: list[int]):
        self.folder, self.rows = folder, rows
        self._checked: set[int] = set()

    def load(self, k: int) -> Tensor:
        path = shard_path(self.folder, k)
        tensors, info = read_tensors(path)
        if k not in self._checked:
            require(
                info["sha256"] == _sha256(tensors["activations"]),
                f"{path} is damaged: delete it, then the same command harvests it again",
            )
            self._checked.add(k)
        return tensors["activations"]


def shard_path(folder: Path, k: int) -> Path:
    return folder / f"shard-{k:05d}.safetensors"


def open_store(folder: Path, harvester: Harvester, *, about: dict) -> Store:
    """The store of the harvester's shards: those that it lacks are harvested, with progress.

    Waits while another process harvests into the same folder.

    Args:
        about: what the rows depend on; a store of something else is refused
    Raises:
        UserError: the folder belongs to something else; the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".harvest.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that harvests into {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        _check_manifest(folder, about)
        missing = [k for k in range(len(harvester.rows)) if not shard_path(folder, k).exists()]
        if missing:
            _harvest(folder, harvester, missing)
        _write_manifest(folder, about)
    return Store(folder, harvester.rows)


def _check_manifest(folder: Path, about: dict) -> None:
    """Refuses a folder of something else; writes the manifest of a new one."""
    path = folder / "manifest.json"
    if not path.exists():
        require(
            not list(folder.glob("shard-*")),
            f"--activations-dir {folder} has shards and no manifest.json: choose another one",
        )
        write_json(path, {"about": about, "shards": {}})
        return
    try:
        stored = json.loads(path.read_text())["about"]
        differing = [k for k in {**stored, **about} if stored.get(k) != about.get(k)]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is not a manifest of ours: choose another folder") from None
    shown = ", ".join(f"{k} {stored.get(k)} there, {about.get(k)} here" for k in differing[:4])
    require(
        not differing,
        f"--activations-dir {folder} holds other activations ({shown}): choose another one, or "
        "delete it",
    )


def _harvest(folder: Path, harvester: Harvester, missing: list[int]) -> None:
    """Computes and writes the shards; one is written while the next is computed."""
    rows = [harvester.rows[k] for k in missing]
    size = harvester.site.width * harvester.store_dtype.itemsize
    require_free_disk(folder, sum(rows) * size)
    interval = 0.1 if sys.stderr and sys.stderr.isatty() else 30.0
    with (
        ThreadPoolExecutor(1) as writer,
        tqdm(total=sum(rows), unit="tok", unit_scale=True, desc="harvest", mininterval=interval,
             disable=sys.stderr is None) as bar,
    ):  # fmt: skip
        writing: Future | None = None
        for k in missing:
            shard = harvester.load(k)
            document_ids = torch.from_numpy(harvester.text.document_ids(*harvester.span(k)))
            if writing:
                writing.result()  # at most one shard waits in memory
            writing = writer.submit(_write_shard, shard_path(folder, k), shard, document_ids)
            bar.update(len(shard))
        writing.result()


def _write_shard(path: Path, rows: Tensor, document_ids: Tensor) -> None:
    norms = rows.float().norm(dim=1)
    info = {
        "rows": len(rows),
        "sha256": _sha256(rows),
        "n_extreme": int((norms > EXTREME_NORM * norms.median()).sum()),
        "n_documents": len(document_ids),
    }
    write_tensors(path, {"activations": rows, "document_ids": document_ids}, info=info)


def _write_manifest(folder: Path, about: dict) -> None:
    """The manifest with all shards of the folder; their document ids are in their files."""
    shards = {path.name: read_tensor_info(path) for path in sorted(folder.glob("shard-*"))}
    n_rows = sum(info["rows"] for info in shards.values())
    n_extreme = sum(info["n_extreme"] for info in shards.values())
    totals = {"n_rows": n_rows, "n_extreme": n_extreme}
    write_json(folder / "manifest.json", {"about": about, **totals, "shards": shards})


def _sha256(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy()).hexdigest()


@dataclass(frozen=True)
class Statistics:
    """mean (width,) of the first rows, and scale: with it the mean square norm of x is 1."""

    mean: Tensor
    scale: float


def statistics(shards: Shards) -> Statistics:
    """Of the first STATISTICS_ROWS rows or so, whole shards; in float64.

    Raises:
        UserError: all activations are 0.
    """
    total, squares, n, k = 0.0, 0.0, 0, 0
    while n < STATISTICS_ROWS and k < len(shards.rows):
        rows = shards.load(k).double()
        total, squares = total + rows.sum(dim=0), squares + float(rows.square().sum())
        n, k = n + len(rows), k + 1
    require(squares > 0, "all activations are 0: is this the right layer and site?")
    return Statistics((total / n).float(), (n / squares) ** 0.5)
