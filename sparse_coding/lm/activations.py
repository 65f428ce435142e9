"""Activations of a language model in chunks of rows: computed when asked for, or kept on disk.

A chunk is a fixed stretch of the packed text, so it can be computed alone. Its rows are shuffled.

On disk they are harvested once and read by every sweep on the same site:

    <folder>/manifest.json              what the rows depend on, then every chunk with its sha256
    <folder>/chunk-00000.safetensors    activations (rows, width), document_ids (those it has)
    <folder>/text/                      the tokens, see corpus.py

A killed harvest goes on with the chunks that are missing, and a store may grow. A chunk that turns
out to be damaged is harvested again.
"""

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import DISK_ERRORS, UserError, named_seed, progress_bar, require
from sparse_coding.files import (
    DISK_RESERVE,
    Damaged,
    existing,
    read_record,
    read_tensor_info,
    read_tensors,
    require_free_disk,
    tensors_checksum,
    write_record,
    write_tensors,
)
from sparse_coding.lm.corpus import alone
from sparse_coding.lm.model import LanguageModel, Site, activations
from sparse_coding.lm.packing import Packed
from sparse_coding.sae.engines.cpu_compile import one_thread_here

CHUNK_BYTES = 32 * 2**20  # of a chunk, about; ours: small enough to mix many of them in memory
STATISTICS_ROWS = 65_536  # rows behind the mean and the scale; ours, not tuned
EXTREME_NORM = 10.0  # x the median norm of the chunk: such a row is counted as extreme
MANIFEST, TEXT = "manifest.json", "text"  # in the folder of a store


class Chunks(Protocol):
    """Rows to train on, chunk by chunk; rows[k] is the number of rows of chunk k."""

    rows: list[int]

    def load(self, k: int) -> Tensor:
        """Chunk k, (rows[k], width) in float16 or bfloat16."""


@dataclass(frozen=True)
class Harvester:
    """Computes chunks with the language model.

    store_dtype: float16 or bfloat16, in which rows are kept
    lm_batch_size: rows of text per forward pass
    """

    lm: LanguageModel
    site: Site
    text: Packed
    store_dtype: torch.dtype
    lm_batch_size: int
    n_tokens: int  # asked for; there may be fewer

    @property
    def texts_per_chunk(self) -> int:
        """Rows of text behind a chunk."""
        row_bytes = self.text.context_length * self.site.width * self.store_dtype.itemsize
        return max(1, round(CHUNK_BYTES / row_bytes))

    def span(self, k: int) -> tuple[int, int]:
        """First and last (exclusive) row of text of chunk k."""
        n = self.texts_per_chunk
        return k * n, min((k + 1) * n, self.text.n_rows)

    @cached_property
    def rows(self) -> list[int]:
        """Activations of each chunk, as many chunks as hold n_tokens of them, or all there are."""
        rows: list[int] = []
        n_chunks = -(-self.text.n_rows // self.texts_per_chunk)
        while len(rows) < n_chunks and sum(rows) < self.n_tokens:
            rows.append(int(self.text.keep(*self.span(len(rows))).sum()))
        return rows

    @property
    def n_bytes(self) -> int:
        """Of all chunks."""
        return sum(self.rows) * self.site.width * self.store_dtype.itemsize

    def load(self, k: int) -> Tensor:
        """Chunk k, computed: `parts`, then `assembled`."""
        return self.assembled(k, list(self.parts(k)))[0]

    def parts(self, k: int) -> Iterator[Tensor]:
        """Activations of the kept tokens of chunk k, (kept, width), by forward pass."""
        for ids, keep in self.text.batches(*self.span(k), size=self.lm_batch_size):
            kept = torch.from_numpy(np.flatnonzero(keep))
            x = activations(self.lm, self.site, torch.from_numpy(ids)).flatten(0, 1)
            yield x.index_select(0, kept.to(x.device)).to(self.store_dtype).cpu()

    def assembled(self, k: int, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(rows of chunk k in a random order, (rows[k], width); their norms in float32).

        Raises:
            UserError: an activation is too large for the store's dtype, or not a number.
        """
        # "shard" is what chunks were called: another name would be another order
        rng = torch.Generator().manual_seed(named_seed("shard", k))
        order = torch.randperm(self.rows[k], generator=rng)
        rows = torch.empty(len(order), self.site.width, dtype=self.store_dtype)
        norms = torch.empty(len(order))
        for places, part in zip(order.split([len(p) for p in parts]), parts, strict=True):
            rows.index_copy_(0, places, part)
            norms[places] = part.float().norm(dim=1)
        require(
            bool(torch.isfinite(norms).all()),
            f"activations of layer {self.site.layer} {self.site.name} are beyond the range of "
            f"{self.store_dtype}: use --store-dtype bfloat16",
        )
        return rows, norms


@dataclass(frozen=True)
class Statistics:
    """Of the first rows, without those whose norm is beyond max_norm.

    mean: (width,)
    scale: with it the mean square norm of x is 1
    max_norm: beyond it, rows are left out of training and evaluation, as they are here
    n_rows, n_left_out: looked at, and left out of them
    """

    mean: Tensor
    scale: float
    max_norm: float
    n_rows: int
    n_left_out: int


def statistics(chunks: Chunks, *, max_norm_multiple: float = 0.0) -> Statistics:
    """Of the first STATISTICS_ROWS rows or so, whole chunks; in float64.

    max_norm_multiple: max_norm in units of the median norm of the first chunk; 0: infinite

    Raises:
        UserError: all activations are 0.
    """
    total, squares, n, n_kept, k, max_norm = 0.0, 0.0, 0, 0, 0, math.inf
    while n < STATISTICS_ROWS and k < len(chunks.rows):
        rows = chunks.load(k)
        if k == 0 and max_norm_multiple:
            max_norm = max_norm_multiple * _median_norm(rows)
        kept = rows[is_kept(rows, max_norm)].double()
        total, squares = total + kept.sum(dim=0), squares + float(kept.square().sum())
        n, n_kept, k = n + len(rows), n_kept + len(kept), k + 1
    require(squares > 0, "all activations are 0: is this the right layer and site?")
    mean, scale = (total / n_kept).float(), (n_kept / squares) ** 0.5
    return Statistics(mean, scale, max_norm, n, n - n_kept)


def is_kept(x: Tensor, max_norm: float) -> Tensor:
    """Which rows of x (..., width) are not beyond max_norm, (...) bool."""
    if max_norm == math.inf:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    return ~(_norms(x) > max_norm)  # of NaN: kept, so that it shows


def _norms(x: Tensor) -> Tensor:
    """Of rows of x (..., width) in float32, (...)."""
    # piece by piece: five times faster than with a copy in float32 that no cache holds
    return torch.cat([piece.float().norm(dim=-1) for piece in x.split(1024)])


def _median_norm(rows: Tensor) -> float:
    """Of the rows that are not 0; infinite if all are."""
    norms = _norms(rows)
    return float(norms[norms > 0].median()) if norms.any() else math.inf


# --- on disk ---


def open_activations(
    harvester: Harvester, folder: Path, metadata: dict, *, max_bytes: float, reserve: float = 0.0
) -> Chunks:
    """The harvester's chunks on disk, harvested now if need be; where they need more than
    max_bytes, or than is free beside `reserve`, the harvester itself, which computes each chunk as
    it is read."""
    n_rows, n_bytes = sum(harvester.rows), harvester.n_bytes
    if n_rows < harvester.n_tokens:
        asked, epochs = f"{harvester.n_tokens:,} tokens requested", harvester.n_tokens / n_rows
        print(f"{asked}, {n_rows:,} available = {epochs:.1f} epochs")
    have = sum(path.stat().st_size for path in folder.glob("chunk-*"))
    free = shutil.disk_usage(existing(folder)).free - DISK_RESERVE - reserve + have
    size = f"{n_rows:,} activations, {n_bytes / 1e6:,.0f} MB"
    if n_bytes > min(max_bytes, free) and _missing(folder, harvester):
        over = f"over --max-disk-gb {max_bytes / 1e9:g}"
        reason = over if n_bytes > max_bytes else f"{free / 1e9:.2f} GB free"
        print(f"{size}, {reason}: computed as they are read")
        return harvester
    print(f"{size} in {folder}", flush=True)
    return open_store(folder, harvester, metadata=metadata)


def open_store(folder: Path, harvester: Harvester, *, metadata: dict) -> "Store":
    """The store of the harvester's chunks: those that it lacks are harvested, with progress.

    Waits while another process harvests into the same folder.

    Args:
        metadata: what the rows depend on; a store of something else is refused
    Raises:
        UserError: the folder belongs to something else; the disk is too small.
    """
    waiting = f"waiting for another process that harvests into {folder}"
    with alone(folder, lock=".harvest.lock", when_busy=partial(print, waiting, flush=True)):
        check_manifest(folder, metadata)
        _write_manifest(folder, metadata)  # before the first chunk: see claim_folder
        if missing := _missing(folder, harvester):
            _harvest(folder, harvester, missing)
            _write_manifest(folder, metadata)
    return Store(folder, harvester)


def chunk_path(folder: Path, k: int) -> Path:
    """The file of chunk k."""
    return folder / f"chunk-{k:05d}.safetensors"


def _missing(folder: Path, harvester: Harvester) -> list[int]:
    """Those of the harvester's chunks that the folder lacks."""
    return [k for k in range(len(harvester.rows)) if not chunk_path(folder, k).exists()]


def claim_folder(folder: Path) -> None:
    """Makes the folder, for text and activations.

    Raises:
        UserError: it can't be written, or holds something that is not ours.
    """
    is_file = os.path.exists(folder) and not folder.is_dir()  # os.path: False if it can't be
    require(not is_file, f"--activations-dir {folder} is a file: choose another one")
    if os.path.isdir(folder):
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        require(
            not names or MANIFEST in names or names == {TEXT},
            f"--activations-dir {folder} holds other things ({', '.join(sorted(names)[:3])}) "
            f"and no {MANIFEST}: choose another one",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError
    except OSError as error:  # below a file, read-only, too long, ...
        if error.errno in DISK_ERRORS and error.errno != errno.EROFS:
            raise
        message = f"--activations-dir {folder} can't be written: choose another one"
        raise UserError(message) from None


def check_manifest(folder: Path, metadata: dict) -> None:
    """Raises UserError if the folder holds activations of something else."""
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        shown = differences(read_record(path)["metadata"], metadata)
    except Damaged as error:
        raise UserError(
            f"{error.what}: choose another --activations-dir, or delete {folder}"
        ) from None
    except (LookupError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not a manifest of ours, or that of an older version: choose another "
            f"--activations-dir, or delete {folder}"
        ) from None
    require(
        not shown,
        f"--activations-dir {folder} holds other activations ({shown}): choose another one, or "
        "delete it",
    )


def differences(there: dict, here: dict) -> str:
    """What activations depend on that differs, the first four of it; empty if nothing does."""
    differing = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    return ", ".join(f"{k} {there.get(k)} there, {here.get(k)} here" for k in differing[:4])


def _harvest(folder: Path, harvester: Harvester, missing: list[int]) -> None:
    """Computes and writes the chunks; one is written while the next is computed."""
    n_rows = sum(harvester.rows[k] for k in missing)
    size = harvester.site.width * harvester.store_dtype.itemsize
    require_free_disk(folder, n_rows * size)
    with (
        # with threads of its own it would take turns with those of the model
        ThreadPoolExecutor(1, initializer=one_thread_here) as writer,
        progress_bar(total=n_rows, unit="tok", unit_scale=True, desc="harvest") as bar,
    ):
        writing: Future | None = None
        for k in missing:
            parts = list(harvester.parts(k))
            if writing:
                writing.result()  # at most one chunk waits in memory
            writing = writer.submit(_write_chunk, folder, harvester, k, parts)
            bar.update(harvester.rows[k])
        writing.result()


def _write_chunk(folder: Path, harvester: Harvester, k: int, parts: list[Tensor]) -> None:
    """Assembles and writes chunk k, while the model works on the next."""
    rows, norms = harvester.assembled(k, parts)
    parts.clear()  # memory
    document_ids = torch.from_numpy(harvester.text.document_ids(*harvester.span(k)))
    info = {
        "chunk": k,
        "rows": len(rows),
        "n_extreme": int((norms > EXTREME_NORM * norms.median()).sum()),
        "n_documents": len(document_ids),
    }
    tensors = {"activations": rows, "document_ids": document_ids}
    write_tensors(chunk_path(folder, k), tensors, info=info)


def _write_manifest(folder: Path, metadata: dict) -> None:
    """The manifest with all chunks of the folder; their document ids are in their files. A chunk
    that cannot be read is deleted, and said."""
    chunks, totals = {}, {"n_rows": 0, "n_extreme": 0}
    for path in sorted(folder.glob("chunk-*")):
        try:
            info = read_tensor_info(path)
            _require_whole(path, info, info.get("rows"))
        except Damaged as error:
            _delete(error, path)
            continue
        chunks[path.name] = {"sha256": tensors_checksum(path)} | info
        totals["n_rows"] += info["rows"]
        totals["n_extreme"] += info["n_extreme"]
    write_record(folder / MANIFEST, {"metadata": metadata, **totals, "chunks": chunks})


class Store:
    """Chunks on disk. Each is checked when it is first read."""

    def __init__(self, folder: Path, harvester: Harvester):
        self.folder, self.harvester, self.rows = folder, harvester, harvester.rows
        self._checked: set[int] = set()

    def load(self, k: int) -> Tensor:
        """Chunk k, (rows[k], width); harvested again if its file is damaged."""
        path = chunk_path(self.folder, k)
        try:
            rows = self._read(k)
        except Damaged as error:
            with alone(self.folder, lock=".harvest.lock"):
                _delete(error, path)
                _write_chunk(self.folder, self.harvester, k, list(self.harvester.parts(k)))
            rows = self._read(k)
        self._checked.add(k)
        return rows

    def _read(self, k: int) -> Tensor:
        path = chunk_path(self.folder, k)
        tensors, info = read_tensors(path, check=k not in self._checked)
        _require_whole(path, info, self.rows[k])
        rows = tensors["activations"]
        of_rows = info.get("sha256")  # in the store of an older version
        if of_rows and k not in self._checked and of_rows != _sha256(rows):
            raise Damaged(path, "its sha256 differs")
        return rows


def _sha256(rows: Tensor) -> str:
    return hashlib.sha256(rows.view(torch.uint8).numpy()).hexdigest()


def _delete(error: Damaged, path: Path) -> None:
    """A chunk that is damaged, and says so."""
    error.warn("it is harvested again")
    path.unlink(missing_ok=True)


def _require_whole(path: Path, info: dict, n_rows: int | None) -> None:
    """Raises Damaged unless info is that of the chunk of the path, of so many rows."""
    k = int(path.stem.removeprefix("chunk-"))
    if info.get("chunk", k) != k:  # older versions did not say
        raise Damaged(path, f"it is chunk {info['chunk']}")
    counted = all(type(info.get(name)) is int for name in ("rows", "n_extreme", "n_documents"))
    if not counted or info["rows"] != n_rows:
        raise Damaged(path, f"{info.get('rows')} rows, not {n_rows}")
