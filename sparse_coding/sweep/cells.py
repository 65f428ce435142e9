"""Results of single cells on disk, and their merge into one table.

A cell is done when cells/<name>.json exists; its autoencoder is written before. Shards write into
the same folder, or into folders that are copied together: the merge reads files and changes none.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sparse_coding.config import fingerprint
from sparse_coding.sweep.distributed import Shard, wait_for_all_ranks
from sparse_coding.sweep.grid import Cell, plan_groups
from sparse_coding.sweep.run_folder import CheckpointStore

N_LARGER = 2  # mmcs_with_larger compares with the next two sizes (the post's rule)


def row_path(cell: Cell) -> str:
    return f"cells/{cell.name}.json"


def missing_cells(folder: Path, cells: list[Cell]) -> list[Cell]:
    """Cells that still have to be trained."""
    # os.path: False for a name that is too long
    return [cell for cell in cells if not os.path.exists(folder / row_path(cell))]


def checkpoints_of(folder: Path, group: list[Cell]) -> CheckpointStore:
    """Where a group of cells that train together keeps its checkpoints."""
    return CheckpointStore(folder / "checkpoints" / group_id(group))


def group_id(group: list[Cell]) -> str:
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
        if len(group) == len(names) and missing_cells(folder, group):
            groups.append(group)
            for name in names:  # a cell belongs to one group
                del by_name[name]
    return groups


def groups_to_train(
    folder: Path, cells: list[Cell], *, budget: float, memory_of: Callable[[list[int]], int]
) -> list[list[Cell]]:
    """Groups that cover the missing cells: those begun before, then new ones within the budget.

    Args:
        budget: bytes of memory; memory_of: bytes that an ensemble of these widths needs
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


def merged_rows(
    folder: Path,
    cells: list[Cell],
    *,
    decoder_of: Callable[[Path, Cell], Tensor],
    compare: dict[str, Callable[[Tensor, list[Tensor]], float | None]],
) -> list[dict]:
    """One row per cell in the order of the cells, columns that compare dictionaries filled in.

    Args:
        decoder_of: W_dec of a cell of the folder, (n_dict, activation_dim)
        compare: column -> its value from W_dec and those of the next N_LARGER sizes, ascending,
            of the same seed and l1_alpha
    """
    rows = {cell: json.loads((folder / row_path(cell)).read_text()) for cell in cells}
    columns: dict[tuple, list[Cell]] = {}
    for cell in cells:
        columns.setdefault((cell.seed, cell.l1_exp, cell.target_l0), []).append(cell)
    for column in columns.values():
        column.sort(key=lambda cell: cell.n_dict)
        W_dec = {cell: decoder_of(folder, cell) for cell in column}
        for i, cell in enumerate(column):
            larger = [W_dec[c] for c in column[i + 1 : i + 1 + N_LARGER]]
            rows[cell] |= {name: value(W_dec[cell], larger) for name, value in compare.items()}
    return [rows[cell] for cell in cells]
