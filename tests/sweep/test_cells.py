"""Results of cells on disk: what is missing, what was begun, the merge."""

import pytest
import torch

from sparse_coding.files import write_json
from sparse_coding.sweep.grid import make_grid
from sparse_coding.sweep.metrics import mmcs, mmcs_with_larger
from sparse_coding.sweep.run_folder import (
    checkpoints_of,
    groups_to_train,
    merged_rows,
    missing_cells,
    row_path,
    unfinished_groups,
)


@pytest.fixture
def cells():
    return make_grid(4, seeds=range(1), l1_exps=range(2), size_exps=range(4))  # 4 to 32 features


def dictionary(cell) -> torch.Tensor:
    rng = torch.Generator().manual_seed(cell.n_dict + cell.l1_exp)
    return torch.randn(cell.n_dict, 8, generator=rng)


def write(folder, cell) -> None:
    write_json(folder / row_path(cell), {"name": cell.name})


def test_a_cell_is_missing_until_its_row_is_written(tmp_path, cells):
    assert missing_cells(tmp_path, cells) == cells
    write(tmp_path, cells[3])
    assert missing_cells(tmp_path, cells) == cells[:3] + cells[4:]


def begin(folder, group) -> None:
    info = {"cells": [cell.name for cell in group]}
    checkpoints_of(folder, group).save(5, {"w": torch.zeros(1)}, info=info)


def test_groups_that_were_begun_come_first_and_keep_their_cells(tmp_path, cells):
    begin(tmp_path, cells[2:5])
    write(tmp_path, cells[2])  # killed while it wrote its results
    write(tmp_path, cells[0])
    groups = groups_to_train(tmp_path, cells, budget=1e9, memory_of=sum)
    assert groups == [cells[2:5], [cells[1], *cells[5:]]]


def test_a_group_of_another_shard_or_a_finished_one_is_not_gone_on_with(tmp_path, cells):
    begin(tmp_path, cells[:2])
    assert unfinished_groups(tmp_path, cells[1:]) == []
    assert unfinished_groups(tmp_path, cells) == [cells[:2]]
    for cell in cells[:2]:
        write(tmp_path, cell)
    assert unfinished_groups(tmp_path, cells) == []


def test_merge_compares_with_the_next_two_larger_of_the_same_l1_alpha(tmp_path, cells):
    for cell in reversed(cells):  # the order of writing does not matter
        write(tmp_path, cell)
    rows = merged_rows(
        tmp_path,
        cells,
        decoder_of=lambda folder, cell: dictionary(cell),
        compare={"mmcs_with_larger": mmcs_with_larger},
    )
    assert [row["name"] for row in rows] == [cell.name for cell in cells]
    column = [cell for cell in cells if cell.l1_exp == 1]
    W = [dictionary(cell) for cell in column]
    found = [row["mmcs_with_larger"] for row in rows if row["name"] in {c.name for c in column}]
    assert found[0] == pytest.approx((mmcs(W[0], W[1]) + mmcs(W[0], W[2])).item() / 2)
    assert found[2] == pytest.approx(mmcs(W[2], W[3]).item())
    assert found[3] is None
