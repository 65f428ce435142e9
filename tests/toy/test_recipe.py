"""Cells of the toy replication become specs, tasks and rows."""

from dataclasses import replace

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.sweep.grid import make_grid, specs_of
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.recipe import COLUMNS, ToyRecipe

CPU = torch.device("cpu")
DATA = ToyData("post", 8, 16, n_active=2, feature_prob_decay=0.9, noise_std=0.0, batch_size=32)


def cells():
    return make_grid(16, seeds=range(1), l1_exps=range(0, 5, 4), size_exps=range(-1, 1))


def recipe(data: ToyData = DATA, n_steps: int = 3) -> ToyRecipe:
    return ToyRecipe(data, "per_feature", 1e-3, n_steps, CPU)


def test_l1_is_divided_by_the_size_per_feature_and_is_not_as_sum():
    l1 = [(spec.n_dict, spec.l1) for spec in specs_of(cells(), "per_feature", tied=False)]
    assert l1 == [(8, 1 / 8), (8, 10 / 8), (16, 1 / 16), (16, 10 / 16)]
    assert [spec.l1 for spec in specs_of(cells(), "sum", tied=False)] == [1, 10, 1, 10]


def test_every_cell_has_a_start_of_its_own_that_does_not_depend_on_the_others():
    seeds = [spec.seed for spec in specs_of(cells(), "sum", tied=False)]
    assert len(set(seeds)) == len(seeds)
    assert specs_of(cells()[2:3], "sum", tied=False)[0].seed == seeds[2]


def test_rows_have_the_columns_of_the_table_in_order():
    task = recipe().prepare(cells())
    rows = [row for row, _ in task.evaluate()]
    assert [list(row) for row in rows] == [list(COLUMNS)] * 4
    assert [(row["n_dict"], row["l1_alpha"], row["dict_ratio"]) for row in rows] == [
        (8, 1, 0.5),
        (8, 10, 0.5),
        (16, 1, 1),
        (16, 10, 1),
    ]
    assert all(row["n_steps"] == 3 for row in rows)


def test_evaluation_is_on_the_same_fresh_samples_whatever_the_batch_size():
    untrained = [row for row, _ in recipe().prepare(cells()).evaluate()]
    other = recipe(replace(DATA, batch_size=7)).prepare(cells()).evaluate()
    other_batch = [row for row, _ in other]
    assert untrained == other_batch
    assert all(0 <= row["l0"] <= row["n_dict"] for row in untrained)


def test_evaluation_samples_are_not_those_of_training():
    task = recipe(replace(DATA, batch_size=256)).prepare(cells())
    x = torch.cat([task.batch_at(step) for step in range(10)])  # as many, of the same law
    of_training = (x - x.mean(dim=0)).square().mean().item()
    row, _ = task.evaluate()[0]
    of_evaluation = row["mse"] / row["fvu"]  # variance of x
    assert of_evaluation == pytest.approx(of_training, rel=0.05)
    assert of_evaluation != pytest.approx(of_training, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"n_active": 17}, "--n-active 17"),
        ({"n_active": float("nan")}, "--n-active nan"),
        ({"feature_prob_decay": 0.0}, "--feature-prob-decay 0"),
        ({"noise_std": float("inf")}, "--noise-std inf"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_constants_out_of_range_are_refused_by_their_flag(change, flag):
    with pytest.raises(UserError, match=flag):
        replace(DATA, **change)


def test_no_steps_and_no_learning_rate_are_refused():
    with pytest.raises(UserError, match="--n-steps 0"):
        recipe(n_steps=0)
    with pytest.raises(UserError, match="--lr -1"):
        ToyRecipe(DATA, "sum", -1.0, 5, CPU)


def test_the_memory_plan_counts_the_world_and_what_compares_with_it():
    worlds = (replace(DATA, n_true_features=n) for n in (16, 4000))
    small, large = (recipe(data).memory([("relu", 8)]) for data in worlds)
    similarities, on = 12 * 8, 5 * 256  # bytes for each true feature
    assert large - small == 24 * (4000**2 - 16**2) + (similarities + on) * (4000 - 16)
