"""Run folders and checkpoints: refusal and fall-back."""

import json
import os

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.files import write_json, write_tensors
from sparse_coding.sweep.grid import make_grid
from sparse_coding.sweep.metrics import mmcs, mmcs_with_larger
from sparse_coding.sweep.run_folder import (
    CheckpointStore,
    checkpoints_of,
    close_run_folder,
    groups_to_train,
    locked,
    merged_rows,
    missing_cells,
    open_run_folder,
    provenance,
    row_path,
    sae_folder,
    unfinished_groups,
)


def store_with(tmp_path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "group")
    for step in steps:
        store.save(step, {"w": torch.full((100,), float(step))}, info={"cells": ["c"]})
    return store


def test_the_last_two_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path):
    store = store_with(tmp_path, 10, 20, 30)
    assert [path.name for path in store.paths()] == [
        "step-00000030.safetensors",
        "step-00000020.safetensors",
    ]
    tensors, info = store.load()
    assert info == {"cells": ["c"], "step": 30}
    assert tensors["w"][0] == 30


def test_a_truncated_checkpoint_falls_back_to_the_previous_and_says_so(tmp_path, capsys):
    store = store_with(tmp_path, 10, 20)
    newest = store.paths()[0]
    newest.write_bytes(newest.read_bytes()[:-50])
    assert store.info()["step"] == 10
    tensors, info = store.load()
    assert (info["step"], tensors["w"][0]) == (10, 10)
    assert capsys.readouterr().err.count("\n") == 1
    assert len(store.paths()) == 1


def test_without_a_readable_checkpoint_there_is_none(tmp_path, capsys):
    store = store_with(tmp_path, 10)
    store.paths()[0].write_bytes(b"")
    assert store.info() is None
    assert store.load() is None
    assert "damaged" in capsys.readouterr().err


CONSTANTS = {"n_steps": 5, "law": "post"}


def test_a_folder_opens_again_for_the_same_constants_and_keeps_its_files(tmp_path):
    folder = tmp_path / "run"
    open_run_folder(folder, constants=CONSTANTS, origin={"command": "first"}, fresh=False)
    (folder / "kept").write_text("x")
    open_run_folder(folder, constants=dict(CONSTANTS), origin={"command": "second"}, fresh=False)
    assert (folder / "kept").exists()
    assert json.loads((folder / "config.json").read_text())["command"] == "first"


def test_a_resume_by_other_code_is_warned_of_and_recorded(tmp_path, capsys):
    for commit in ("a", "a", "b", "b"):
        origin = {"git_commit": commit, "versions": {"torch": "2"}}
        open_run_folder(tmp_path / "run", constants=CONSTANTS, origin=origin, fresh=False)
    assert capsys.readouterr().err.count("begun with other git_commit\n") == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["git_commit"] == "a"
    assert [origin["git_commit"] for origin in config["resumed_by"]] == ["b"]


def test_a_finished_folder_is_opened_by_other_code_without_a_note(tmp_path, capsys):
    open_run_folder(tmp_path, constants=CONSTANTS, origin={"git_commit": "a"}, fresh=False)
    close_run_folder(tmp_path)
    before = (tmp_path / "config.json").read_text()
    open_run_folder(tmp_path, constants=CONSTANTS, origin={"git_commit": "b"}, fresh=False)
    assert (tmp_path / "config.json").read_text() == before
    assert capsys.readouterr().err == ""


def test_other_constants_are_refused_by_name_and_fresh_starts_again(tmp_path):
    folder = tmp_path / "run"
    open_run_folder(folder, constants=CONSTANTS, origin={}, fresh=False)
    (folder / "old").write_text("x")
    other = CONSTANTS | {"n_steps": 6}
    with pytest.raises(UserError, match="n_steps 5 there, 6 here"):
        open_run_folder(folder, constants=other, origin={}, fresh=False)
    assert (folder / "old").exists()
    with locked(folder, "-shard-1-of-2"), pytest.raises(UserError, match="another process"):
        open_run_folder(folder, constants=other, origin={}, fresh=True)
    open_run_folder(folder, constants=other, origin={}, fresh=True)
    assert os.listdir(folder) == ["config.json"]


def test_a_process_killed_while_it_made_the_folder_does_not_block_the_next(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.123.tmp").write_text("{")
    open_run_folder(folder, constants=CONSTANTS, origin={}, fresh=False)
    assert json.loads((folder / "config.json").read_text())["constants"] == CONSTANTS


def test_closing_joins_the_series_and_leaves_no_checkpoint_and_no_temporary_file(tmp_path):
    open_run_folder(tmp_path / "run", constants=CONSTANTS, origin={}, fresh=False)
    folder = tmp_path / "run"
    (folder / "cells").mkdir()
    (folder / "cells" / ".a.json.123.tmp").write_text("torn")
    (folder / "cells" / "a.json").write_text("{}")
    store_with(folder / "checkpoints", 10)
    (folder / "metrics.jsonl").write_text("")
    (folder / "metrics-shard-1-of-2.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (folder / "metrics-shard-2-of-2.jsonl").write_text('{"step": 3}\n')
    close_run_folder(folder)
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert left == ["DONE", "cells/a.json", "config.json", "metrics.jsonl"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        open_run_folder(tmp_path, constants=CONSTANTS, origin={}, fresh=fresh)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_or_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="choose another one"):
            open_run_folder(path, constants=CONSTANTS, origin={}, fresh=False)


def is_refused(folder, shard_suffix: str = "") -> bool:
    try:
        with locked(folder, shard_suffix):
            return False
    except UserError:
        return True


def test_a_run_has_its_folder_alone_and_shards_share_it(tmp_path):
    with locked(tmp_path):
        assert is_refused(tmp_path)
        assert is_refused(tmp_path, "-shard-1-of-2")
    with locked(tmp_path, "-shard-1-of-2"):
        assert is_refused(tmp_path)
        assert is_refused(tmp_path, "-shard-1-of-2")
        assert not is_refused(tmp_path, "-shard-2-of-2")
    assert not is_refused(tmp_path)


def test_config_names_versions_and_commit_but_no_machine_path(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/secret/place/run.py", "--n-steps", "5"])
    origin = provenance("CPU")
    assert origin["command"] == "python run.py --n-steps 5"
    assert origin["versions"]["torch"] == torch.__version__
    assert {"git_commit", "git_dirty", "device"} <= origin.keys()
    assert "secret" not in json.dumps(origin)


# --- cells: what is missing, what was begun, the merge ---


@pytest.fixture
def cells():
    return make_grid(4, seeds=range(1), l1_exps=range(2), size_exps=range(4))  # 4 to 32 features


def dictionary(cell) -> torch.Tensor:
    rng = torch.Generator().manual_seed(cell.n_dict + cell.l1_exp)
    return torch.randn(cell.n_dict, 8, generator=rng)


def write(folder, cell) -> None:
    weights = sae_folder(folder, cell) / "sae_weights.safetensors"
    write_tensors(weights, {"W_dec": dictionary(cell)})
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
        compare={"mmcs_with_larger": mmcs_with_larger},
        device=torch.device("cpu"),
    )
    assert [row["name"] for row in rows] == [cell.name for cell in cells]
    column = [cell for cell in cells if cell.l1_exp == 1]
    W = [dictionary(cell) for cell in column]
    found = [row["mmcs_with_larger"] for row in rows if row["name"] in {c.name for c in column}]
    assert found[0] == pytest.approx((mmcs(W[0], W[1]) + mmcs(W[0], W[2])).item() / 2)
    assert found[2] == pytest.approx(mmcs(W[2], W[3]).item())
    assert found[3] is None
