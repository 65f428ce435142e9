"""Activations on disk: harvested once, read by every sweep on the same site.

    <folder>/manifest.json              what the rows depend on, then every chunk with its sha256
    <folder>/chunk-00000.safetensors    activations (rows, width), document_ids (those it has)
    <folder>/text/                      the tokens, see corpus.py

A killed harvest goes on with the chunks that are missing, and a store may grow. A chunk that turns
out to be damaged is harvested again.
"""

import errno
import hashlib
import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_coding.config import DISK_ERRORS, UserError, require
from sparse_coding.files import (
    Damaged,
    read_record,
    read_tensor_info,
    read_tensors,
    require_free_disk,
    tensors_checksum,
    write_record,
    write_tensors,
)
from sparse_coding.lm.activations.harvest import Harvester, harvest
from sparse_coding.lm.corpus import alone

EXTREME_NORM = 10.0  # x the median norm of the chunk: such a row is counted as extreme
MANIFEST, TEXT = "manifest.json", "text"  # in the folder of a store


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
        if missing := missing_chunks(folder, harvester):
            _harvest(folder, harvester, missing)
            _write_manifest(folder, metadata)
    return Store(folder, harvester)


def chunk_path(folder: Path, k: int) -> Path:
    """The file of chunk k."""
    return folder / f"chunk-{k:05d}.safetensors"


def missing_chunks(folder: Path, harvester: Harvester) -> list[int]:
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


def _harvest(folder: Path, harvester: Harvester, chunks: list[int]) -> None:
    """Computes and writes the chunks."""
    width = harvester.site.stored_width * harvester.store_dtype.itemsize
    require_free_disk(folder, sum(harvester.rows[k] for k in chunks) * width)
    write = partial(_write_chunk, folder, harvester)
    harvest(harvester, chunks, write, to=torch.device("cpu"), lent=True)


def _write_chunk(folder: Path, harvester: Harvester, k: int, rows: Tensor, norms: Tensor) -> None:
    """Writes chunk k, whose rows have these norms."""
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
                _write_chunk(self.folder, self.harvester, k, *self.harvester.computed(k))
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
