"""What a run folder holds of each cell: its row, and its autoencoder.

A cell is done when cells/<name>.json, its row, exists; its autoencoder is written before. The row
says which cell it is of and the checksums of the autoencoder's files, so that no file stands for
another. The merge reads files and changes none.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_coding.config import UserError
from sparse_coding.files import (
    Damaged,
    read_record,
    read_tensors,
    stored_checksum,
    verified_checksum,
    write_record,
)
from sparse_coding.sweep.grid import Cell

if TYPE_CHECKING:  # what rents machines loads no torch
    import torch
    from torch import Tensor

N_LARGER = 2  # mmcs_with_larger compares with the next two sizes (the post's rule)
CFG = "cfg.json"  # of a saved autoencoder


def row_path(cell: Cell) -> str:
    """Where the row of a cell is, below the run folder: the cell is done when it is there."""
    return f"cells/{cell.name}.json"


def sae_folder(folder: Path, cell: Cell) -> Path:
    """Where the autoencoder of a cell is saved."""
    return folder / "saes" / cell.name


def saved_decoder(folder: Path, cell: Cell) -> "Tensor":
    """W_dec of a cell, (n_dict, activation_dim), also of one that diverged, which load_sae refuses.

    Raises Damaged.
    """
    return read_tensors(_decoder_path(folder, cell))[0]["W_dec"]


def _decoder_path(folder: Path, cell: Cell) -> Path:
    """Toy runs before November 2026 kept them in dictionaries/<cell>.safetensors."""
    older = folder / "dictionaries" / f"{cell.name}.safetensors"
    return older if older.exists() else sae_folder(folder, cell) / "sae_weights.safetensors"


def saved_width(folder: Path) -> int | None:
    """activation_dim of the folder's autoencoders, without their model; None if there is none that
    can be read."""
    from sparse_coding.sae.saelens import read_config

    for sae in sorted(folder.glob("saes/seed*")):
        with contextlib.suppress(UserError):  # forget_damaged says it
            return read_config(sae)["d_in"]
    return None


def missing_cells(folder: Path, cells: list[Cell]) -> list[Cell]:
    """Cells that still have to be trained."""
    # os.path: False for a name that is too long
    return [cell for cell in cells if not os.path.exists(folder / row_path(cell))]


def mark_done(folder: Path, cell: Cell, row: dict) -> None:
    """Writes the row of a cell whose autoencoder is saved; it is done then."""
    ours = sae_folder(folder, cell)
    files = sorted([*ours.glob("*.safetensors"), *ours.glob(CFG)])
    saved = {path.name: stored_checksum(path) for path in files}
    write_record(folder / row_path(cell), row | {"cell": cell.name, "saved": saved})


def forget_damaged(folder: Path, cells: list[Cell]) -> bool:
    """Makes cells of which a file is damaged missing ones, and says so: they are trained again.
    Whether there are any."""
    found = False
    for cell in cells:
        row = folder / row_path(cell)
        try:
            if os.path.exists(row):
                _check_saved(folder, cell, read_record(row))
        except Damaged as error:
            error.warn(f"{cell.name} is trained again")
            for path in (folder / "DONE", row):
                path.unlink(missing_ok=True)
            found = True
    return found


def _check_saved(folder: Path, cell: Cell, row: dict) -> None:
    """Raises Damaged if the row is of another cell, or a file of the cell's autoencoder is damaged,
    missing or that of another."""
    if row.get("cell", cell.name) != cell.name:  # older versions did not say
        raise Damaged(folder / row_path(cell), f"it is that of {row['cell']}")
    if not isinstance(row.get("saved", {}), dict):
        raise Damaged(folder / row_path(cell), "what it says is saved is no object")
    decoder, ours = _decoder_path(folder, cell), sae_folder(folder, cell)
    saved = {ours / name: checksum for name, checksum in row.get("saved", {}).items()}
    found = {}
    for path in sorted({decoder, *ours.glob("*.safetensors"), *saved} - {ours / CFG}):
        if not path.exists():
            raise Damaged(path, "it is missing")
        found[path] = verified_checksum(path)
    if decoder.parent == ours:
        found[ours / CFG] = _checksum_of_config(ours)
    for path, checksum in saved.items():
        if found.get(path) != checksum:
            raise Damaged(path, f"it is not what {row_path(cell)} names")


def _checksum_of_config(folder: Path) -> str | None:
    """That of cfg.json. Raises Damaged if it is damaged, missing or of something else."""
    from sparse_coding.sae.saelens import read_config

    with contextlib.suppress(FileNotFoundError):  # a directory can't be written again
        open(folder / CFG, "rb").close()
    try:
        read_config(folder)
    except Damaged:
        raise
    except UserError as error:
        raise Damaged(folder / CFG, error) from None
    return stored_checksum(folder / CFG)


def merged_rows(
    folder: Path,
    cells: list[Cell],
    *,
    columns: Sequence[str],
    compare: "dict[str, Callable[[Tensor, list[Tensor]], float | None]]",
    device: "torch.device",
) -> list[dict]:
    """One row per cell in the order of the cells, columns that compare dictionaries filled in.

    Args:
        columns: of the rows
        compare: column -> its value from W_dec and those of the next N_LARGER sizes, ascending,
            of the same seed, world, family and sparsity
        device: on which they are compared
    Raises:
        Damaged: the row or the autoencoder of a cell.
    """
    stored = {cell: read_record(folder / row_path(cell)) for cell in cells}
    rows = {
        cell: {name: row.get(name) for name in columns}
        | {"arch": cell.arch, "target_l0": cell.target_l0 or None}  # older versions did not say
        for cell, row in stored.items()
    }
    of_sparsity: dict[tuple, list[Cell]] = {}
    for cell in cells:
        of_sparsity.setdefault((*cell.data, cell.arch, *cell.sparsity), []).append(cell)
    for group in of_sparsity.values():
        group.sort(key=lambda cell: cell.n_dict)
        W_dec = {cell: saved_decoder(folder, cell).to(device) for cell in group}
        for i, cell in enumerate(group):
            larger = [W_dec[c] for c in group[i + 1 : i + 1 + N_LARGER]]
            rows[cell] |= {name: value(W_dec[cell], larger) for name, value in compare.items()}
    return [rows[cell] for cell in cells]
