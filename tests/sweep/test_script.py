"""From constants to a complete folder, with a recipe of the toy replication."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.files import read_record, write_record
from sparse_coding.sweep.cells import row_path
from sparse_coding.sweep.grid import Shard, make_grid
from sparse_coding.sweep.script import PlannedRun, RunOptions, plan_run, train_planned
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.recipe import COLUMNS, ToyRecipe

CONFIG = {"preset": "smoke", "output_dir": "", "lr": 0.1, "n_steps": 5, "log_every": 2}
OPTIONS = RunOptions(log_every=2, wandb_mode="disabled", max_memory_gb=1.0)
DATA = ToyData("post", 8, 16, n_active=2, feature_prob_decay=0.9, noise_std=0.0, batch_size=32)
RECIPE = ToyRecipe(DATA, "per_feature", 1e-3, 5, torch.device("cpu"))
CELLS = make_grid(16, seeds=range(1), l1_exps=range(2), size_exps=range(-1, 1))


def planned(*, more: dict | None = None, suffix: str = "", **changes) -> PlannedRun:
    return plan_run(
        "toy",
        CONFIG | changes,
        not_identity={"preset", "output_dir", "log_every"},
        more=more or {"device_type": "cpu"},
        device="a CPU",
        suffix=suffix,
    )


# --- the name of a run ---


def test_the_folder_is_named_after_script_preset_and_constants():
    folder = planned().folder
    assert folder.parent == Path("outputs")
    assert folder.name.startswith("toy-smoke-")
    assert len(folder.name) == len("toy-smoke-") + 8


def test_what_changes_numbers_changes_the_folder_and_the_rest_does_not():
    ours = planned()
    assert planned(log_every=50).folder == ours.folder
    assert planned(suffix="-shard-1-of-2").folder == ours.folder
    assert planned(lr=0.2).folder != ours.folder
    assert planned(more={"device_type": "cuda"}).folder != ours.folder
    assert planned(output_dir="here").folder == Path("here")
    assert planned(output_dir="here").constants == ours.constants
    assert ours.constants == {"lr": 0.1, "n_steps": 5, "device_type": "cpu"}


def test_a_flag_that_came_later_changes_no_name_while_it_is_not_given():
    """A folder of before is found by the same command."""
    ours, unset = planned(), planned(target_site="", skip=False)
    assert (unset.folder, unset.constants) == (ours.folder, ours.constants)
    given = planned(target_site="mlp_out", skip=True)
    assert given.folder != ours.folder
    assert given.constants == ours.constants | {"target_site": "mlp_out", "skip": True}


def test_the_name_of_the_run_says_which_shard_it_is_and_the_device_is_on_record():
    origin = planned(suffix="-shard-1-of-2").origin
    assert origin["run_name"] == f"{planned().folder.name}-shard-1-of-2"
    assert origin["device"] == "a CPU"


def test_a_run_is_done_when_its_folder_says_so(tmp_path):
    run = planned(output_dir=str(tmp_path / "out"))
    with run.opened(CELLS, Shard()):
        assert run.finished_rows() is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["constants"] == run.constants
    (tmp_path / "out" / "results.csv").write_text("a\n1\n")
    (tmp_path / "out" / "DONE").touch()
    assert run.finished_rows() == [{"a": 1}]
    other = planned(output_dir=str(tmp_path / "out"), lr=0.2)
    with pytest.raises(UserError, match=r"lr 0\.1 there, 0\.2 here"), other.opened([], Shard()):
        pass


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"log_every": 0}, "--log-every 0"), ({"max_memory_gb": -1.0}, "--max-memory-gb -1"),
     ({"max_memory_gb": math.inf}, "--max-memory-gb inf"),
     ({"max_memory_gb": math.nan}, "--max-memory-gb nan")],
)  # fmt: skip
def test_constants_out_of_range_are_refused_by_their_flag(change, flag):
    with pytest.raises(UserError, match=flag):
        replace(OPTIONS, **change)


# --- a run ---


def train(folder: Path, shard: Shard = Shard(), present=lambda rows: {}) -> list[dict]:  # noqa: B008
    run = planned(output_dir=str(folder), suffix=shard.suffix)
    with run.opened(CELLS, shard):
        return train_planned(
            RECIPE, CELLS, run, shard=shard, options=OPTIONS, config=CONFIG, present=present
        )


def table(folder: Path) -> list[dict]:
    """results.csv without times."""
    with open(folder / "results.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_a_run_trains_every_cell_and_presents_the_table_before_it_is_done(tmp_path):
    presented = []

    def present(rows: list[dict]) -> dict:
        presented.append((rows, table(tmp_path), (tmp_path / "DONE").exists()))
        return {}

    rows = train(tmp_path, present=present)
    assert [tuple(row) for row in rows] == [COLUMNS] * 4
    assert [(r["n_dict"], r["l1_alpha"]) for r in rows] == [(c.n_dict, c.l1_alpha) for c in CELLS]
    ((shown, written, done),) = presented
    assert shown == rows
    assert [float(row["mse"]) for row in written] == [row["mse"] for row in rows]
    assert not done
    assert (tmp_path / "DONE").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [2, 4, 5]


def test_shards_return_nothing_until_the_command_without_one_merges(tmp_path):
    train(whole := tmp_path / "whole")
    parts = tmp_path / "parts"
    for index in (0, 1):
        assert train(parts, Shard(index, 2)) == []
        assert not (parts / "results.csv").exists()
        assert len(list((parts / "cells").iterdir())) == 2 * (index + 1)
    assert len(train(parts)) == 4
    assert table(parts) == table(whole)
    assert {p.name for p in parts.glob("metrics*")} == {"metrics.jsonl"}  # joined
    assert len((parts / "metrics.jsonl").read_text().splitlines()) == 6


def test_if_presenting_fails_the_run_is_not_done_and_the_same_command_finishes(tmp_path):
    def fail(rows: list[dict]) -> dict:
        raise RuntimeError("no room for figures")

    with pytest.raises(RuntimeError):
        train(tmp_path, present=fail)
    assert not (tmp_path / "DONE").exists()
    first = table(tmp_path)
    assert len(train(tmp_path)) == 4
    assert (tmp_path / "DONE").exists()
    assert table(tmp_path) == first


def test_what_a_gpu_has_trained_is_merged_on_a_laptop_but_not_gone_on_with(tmp_path):
    train(tmp_path)
    config = read_record(tmp_path / "config.json")
    constants = config["constants"] | {"device_type": "cuda"}
    write_record(tmp_path / "config.json", config | {"constants": constants})
    here = planned(output_dir=str(tmp_path), more={"device_type": "cpu"})
    with here.opened(CELLS, Shard()):  # all cells are there
        pass
    other = planned(output_dir=str(tmp_path), lr=0.2)
    with pytest.raises(UserError, match=r"lr 0\.1 there, 0\.2 here"), other.opened(CELLS, Shard()):
        pass
    # one cell is damaged: to be trained, on the kind of machine that the others were
    (tmp_path / row_path(CELLS[0])).write_text("torn")
    for _ in range(2):
        refused = pytest.raises(UserError, match="device_type cuda there, cpu here")
        with refused, here.opened(CELLS, Shard()):
            pass
