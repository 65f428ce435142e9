"""Run folders and checkpoints: refusal and fall-back."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders.sweeps import n_features

from sparse_coding.config import UserError
from sparse_coding.files import Damaged, read_record, write_record, write_tensors
from sparse_coding.sae.saved import save_sae
from sparse_coding.sweep.cells import (
    forget_damaged,
    mark_done,
    merged_rows,
    missing_cells,
    row_path,
    sae_folder,
)
from sparse_coding.sweep.grid import Shard, make_grid
from sparse_coding.sweep.metrics import mmcs, mmcs_with_larger
from sparse_coding.sweep.run_folder import (
    CheckpointStore,
    checkpoints_of,
    close_run_folder,
    finished_rows,
    groups_to_train,
    locked,
    opened_run_folder,
    provenance,
    run_folder_bytes,
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


@pytest.mark.parametrize("saved", [None, [], "x", 3])
def test_a_row_that_names_no_files_is_made_again(tmp_path, saved, capsys):
    (cell,) = make_grid(4, seeds=range(1), l1_exps=range(1), size_exps=range(1))
    write_record(tmp_path / row_path(cell), {"cell": cell.name, "saved": saved})
    assert forget_damaged(tmp_path, [cell])
    assert missing_cells(tmp_path, [cell]) == [cell]
    assert "what it says is saved is no object" in capsys.readouterr().err


@pytest.mark.parametrize("info", [
    {}, {"step": 20}, {"cells": ["c"]}, {"step": "20", "cells": ["c"]}, {"step": 20, "cells": 3},
    {"step": 20, "cells": [3]}, {"step": 20, "cells": ["c", "c"]}, {"step": 20, "cells": [["c"]]},
], ids=str)  # fmt: skip
def test_tensors_that_are_no_checkpoint_are_passed_over(tmp_path, info, capsys):
    store = store_with(tmp_path, 10)
    write_tensors(store.folder / "step-00000020.safetensors", {"w": torch.ones(1)}, info=info)
    assert store.info()["step"] == 10
    assert store.load()[1]["step"] == 10
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("in_header", [True, False])
def test_a_checkpoint_with_one_bit_flipped_falls_back_to_the_previous(tmp_path, capsys, in_header):
    store = store_with(tmp_path, 10, 20)
    newest = store.paths()[0]
    content = bytearray(newest.read_bytes())
    content[content.index(b"step") + 8 if in_header else -50] ^= 1
    newest.write_bytes(content)
    tensors, info = store.load()
    assert (info["step"], tensors["w"][0]) == (10, 10)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{newest} is damaged (its checksum differs): going back to the" in line


@pytest.mark.parametrize("of_another", ["step", "group"])
def test_a_checkpoint_that_took_the_place_of_another_is_not_gone_on_with(
    tmp_path, capsys, of_another
):
    store = store_with(tmp_path, 10, 20)
    newest, oldest = store.paths()
    wanted = {"cells": ["c"]}
    assert store.load(wanted)[1]["step"] == 20
    if of_another == "step":
        shutil.copy(oldest, newest)
    else:
        other = CheckpointStore(tmp_path / "other")
        other.save(20, {"w": torch.zeros(100)}, info={"cells": ["d"]})
        shutil.copy(other.paths()[0], newest)
    tensors, info = store.load(wanted)
    assert (info["step"], tensors["w"][0]) == (10, 10)
    damaged = f"{newest} is damaged (it is that of another {of_another})"
    assert damaged in capsys.readouterr().err


CONSTANTS = {"n_steps": 5, "law": "post"}


def opened(folder, constants=CONSTANTS, *, origin=None, fresh=False, cells=(), shard=None):
    """Opens the folder, and closes it again."""
    with opened_run_folder(
        folder,
        constants=constants,
        origin=origin or {},
        fresh=fresh,
        cells=list(cells),
        shard=shard or Shard(),
    ):
        pass


def files_in(folder) -> list[str]:
    """All but locks."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return sorted(str(p.relative_to(folder)) for p in paths)


def test_a_folder_opens_again_for_the_same_constants_and_keeps_its_files(tmp_path):
    folder = tmp_path / "run"
    opened(folder, origin={"command": "first"})
    (folder / "kept").write_text("x")
    opened(folder, dict(CONSTANTS), origin={"command": "second"})
    assert (folder / "kept").exists()
    assert json.loads((folder / "config.json").read_text())["command"] == "first"


def test_a_resume_by_other_code_is_warned_of_and_recorded(tmp_path, capsys):
    for commit in ("a", "a", "b", "b"):
        origin = {"git_commit": commit, "versions": {"torch": "2"}}
        opened(tmp_path / "run", origin=origin)
    assert capsys.readouterr().err.count("begun with other git_commit\n") == 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["git_commit"] == "a"
    assert [origin["git_commit"] for origin in config["resumed_by"]] == ["b"]


def test_a_finished_folder_is_opened_by_other_code_without_a_note(tmp_path, capsys):
    opened(tmp_path, origin={"git_commit": "a"})
    (tmp_path / "results.csv").write_text("a\n1\n")
    close_run_folder(tmp_path)
    before = (tmp_path / "config.json").read_text()
    opened(tmp_path, origin={"git_commit": "b"})
    assert (tmp_path / "config.json").read_text() == before
    assert capsys.readouterr().err == ""


def test_other_constants_are_refused_by_name_and_fresh_starts_again(tmp_path, cells):
    folder = tmp_path / "run"
    opened(folder)
    write(folder, cells[0])
    other = CONSTANTS | {"n_steps": 6}
    with pytest.raises(UserError, match="n_steps 5 there, 6 here"):
        opened(folder, other)
    assert (folder / row_path(cells[0])).exists()
    with locked(folder, "-shard-1-of-2"), pytest.raises(UserError, match="another process"):
        opened(folder, other, fresh=True)
    opened(folder, other, fresh=True)
    assert files_in(folder) == ["config.json"]
    assert read_record(folder / "config.json")["constants"] == other


def test_fresh_deletes_what_runs_wrote_and_leaves_and_names_all_else(tmp_path, cells, capsys):
    opened(tmp_path)
    write(tmp_path, cells[0])
    store_with(tmp_path / "checkpoints", 10)
    ours = ["results.csv", "DONE", "metrics.jsonl", "figures/mmcs.png", "figures/mmcs.csv",
            "wandb/offline-run-1/run.wandb", "saes/seed0_x/.cfg.json.0123abcd.tmp"]  # fmt: skip
    theirs = ["notes.txt", "saes/mine/cfg.json", "other run/config.json", "other run/results.csv"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    opened(tmp_path, fresh=True)
    assert files_in(tmp_path) == sorted(["config.json", *theirs])
    assert "since no run wrote it: notes.txt, other run/config.json" in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()


def test_fresh_never_opens_a_gap_through_which_another_process_comes_in(tmp_path, monkeypatch):
    """Deleting the folder deletes its lock, and the next one finds another lock to take."""
    opened(tmp_path)
    (tmp_path / "results.csv").write_text("a\n1\n")
    refused = []

    def write_while_another_tries(path, record, real=write_record):
        refused.append(is_refused(tmp_path))
        real(path, record)

    monkeypatch.setattr("sparse_coding.sweep.run_folder.write_record", write_while_another_tries)
    with opened_run_folder(tmp_path, constants=CONSTANTS, origin={}, fresh=True, cells=[],
                           shard=Shard()):  # fmt: skip
        assert refused == [True]
        assert is_refused(tmp_path)
    assert not is_refused(tmp_path)


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_fresh_that_is_cut_short_is_gone_on_with_by_the_same_command(
    tmp_path, cells, monkeypatch, fails_at, capsys
):
    old = CONSTANTS | {"n_steps": 1}
    opened(tmp_path, old)
    write(tmp_path, cells[0])
    (tmp_path / "results.csv").write_text("a\n1\n")
    close_run_folder(tmp_path)
    calls = []

    def unlink(path, missing_ok=False, real=Path.unlink):
        calls.append(path)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(Path, "unlink", unlink)
        opened(tmp_path, fresh=True)
    assert not (len(calls) > 1 and (tmp_path / "DONE").exists())
    with contextlib.suppress(UserError):  # config.json may be written already
        opened(tmp_path, old, cells=cells)
    assert "damaged" not in capsys.readouterr().err
    opened(tmp_path, fresh=True)
    assert files_in(tmp_path) == ["config.json"]
    assert read_record(tmp_path / "config.json")["constants"] == CONSTANTS


@pytest.mark.parametrize("name", ["config.json", "DONE", "results.csv"])
def test_a_damaged_record_of_a_run_is_never_believed(tmp_path, capsys, name):
    opened(tmp_path)
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    close_run_folder(tmp_path)
    assert finished_rows(tmp_path) == [{"a": 1, "b": 2}]
    content = bytearray((tmp_path / name).read_bytes())
    content[content.index(b": 5") + 2 if name == "config.json" else 4] ^= 1
    (tmp_path / name).write_bytes(content)
    if name == "config.json":
        with pytest.raises(UserError, match=r"config.json is damaged .* or --fresh to start again"):
            opened(tmp_path)
        opened(tmp_path, fresh=True)
    else:
        assert finished_rows(tmp_path) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert "results.csv is damaged" in line
        assert line.endswith("made again from cells/")


def test_a_table_of_before_checksums_is_read_if_it_is_one(tmp_path, capsys):
    (tmp_path / "DONE").touch()
    (tmp_path / "results.csv").write_text("a,b\n1,2.5\n")
    assert finished_rows(tmp_path) == [{"a": 1, "b": 2.5}]
    (tmp_path / "results.csv").write_text("a,b\n1,2.;\n")
    assert finished_rows(tmp_path) is None
    (tmp_path / "results.csv").unlink()
    assert finished_rows(tmp_path) is None
    assert capsys.readouterr().err.count("damaged") == 2


def test_a_process_killed_while_it_made_the_folder_does_not_block_the_next(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.123.tmp").write_text("{")
    (folder / ".run.lock").touch()
    opened(folder)
    assert json.loads((folder / "config.json").read_text())["constants"] == CONSTANTS


def test_closing_joins_the_series_and_leaves_no_checkpoint_and_no_temporary_file(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    (folder / "cells").mkdir()
    (folder / "results.csv").write_text("a\n1\n")
    (folder / "cells" / ".tmpk3dF0a").touch()  # of the safetensors library
    (folder / "cells" / ".a.json.123.tmp").write_text("torn")
    (folder / "cells" / "a.json").write_text("{}")
    store_with(folder / "checkpoints", 10)
    (folder / "metrics.jsonl").write_text("")
    (folder / "metrics-shard-1-of-2.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (folder / "metrics-shard-2-of-2.jsonl").write_text('{"step": 3}\n')
    close_run_folder(folder)
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    names = ["DONE", "cells/a.json", "config.json", "metrics.jsonl", "results.csv"]
    assert files_in(folder) == names


def test_closing_says_which_lines_of_the_series_are_damaged_and_leaves_them_out(tmp_path, capsys):
    opened(tmp_path)
    (tmp_path / "results.csv").write_text("a\n1\n")
    whole = b'{"step": 1, "x": 2}\n'
    damaged = (b'{"step": 1, "\xff": 2}\n', b"{}\n", b'{"step": "1"}\n', b"[" * 9999 + b"\n", b"\n")
    for line in damaged:
        (tmp_path / "metrics.jsonl").write_bytes(line + whole + b'{"step": 2, "to')
        close_run_folder(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        (said,) = capsys.readouterr().err.splitlines()
        assert "metrics.jsonl is damaged (1 of its lines" in said


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_not_ours_is_never_touched(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        opened(tmp_path, fresh=fresh)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_or_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="choose another one"):
            opened(path)


def test_a_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="run can't be written: choose another one"):
        opened(tmp_path / "run")


def test_the_disk_plan_is_four_bytes_for_each_number_once_saved_and_nine_times_in_checkpoints():
    numbers = (2 * 10 * 8 + 10 + 8) + (2 * 20 * 8 + 20 + 8)  # three checkpoints of Adam's three
    assert run_folder_bytes([10, 20], width=8) == 4 * numbers * 10


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


def test_config_names_the_torch_that_runs_with_its_build(monkeypatch):
    """Not the one that is pinned, nor what pip's metadata say of it."""
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    assert provenance("CPU")["versions"]["torch"] == "2.6.0+cu124"


# --- cells: what is missing, what was begun, the merge ---


@pytest.fixture
def cells():
    return make_grid(4, seeds=range(1), l1_exps=range(2), size_exps=range(4))  # 4 to 32 features


def dictionary(cell) -> torch.Tensor:
    rng = torch.Generator().manual_seed(cell.n_dict + cell.l1_exp)
    return torch.randn(cell.n_dict, 8, generator=rng)


def write(folder, cell) -> None:
    W_dec = dictionary(cell)
    biases = {"b_enc": torch.zeros(cell.n_dict), "b_dec": torch.zeros(8)}
    tensors = {"W_dec": W_dec, "W_enc": W_dec.T, **biases}
    save_sae(sae_folder(folder, cell), tensors, metadata={})
    write_record(folder / row_path(cell), {"name": cell.name, "l0": 3.0})


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
    groups = groups_to_train(tmp_path, cells, budget=1e9, memory_of=n_features)
    assert groups == [cells[2:5], [cells[1], *cells[5:]]]


def test_checkpoints_of_a_group_in_the_folder_of_another_begin_nothing(tmp_path, cells):
    begin(tmp_path, cells[:2])
    (folder,) = (tmp_path / "checkpoints").iterdir()
    folder.rename(checkpoints_of(tmp_path, cells[2:4]).folder)
    assert unfinished_groups(tmp_path, cells) == []


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
        columns=("name", "mmcs_with_larger"),
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


WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"


@pytest.mark.parametrize("name", ["cells", WEIGHTS, CFG, "sparsity.safetensors"])
@pytest.mark.parametrize("harm", ["one bit", "torn", "empty"])
def test_a_cell_with_a_damaged_file_is_missing_again_and_that_is_said(
    tmp_path, cells, capsys, name, harm
):
    opened(tmp_path)
    for cell in cells[:3]:
        write(tmp_path, cell)
        write_tensors(sae_folder(tmp_path, cell) / "sparsity.safetensors", {"s": torch.ones(4)})
    row, sae = tmp_path / row_path(cells[1]), sae_folder(tmp_path, cells[1])
    path = row if name == "cells" else sae / name
    content = bytearray(path.read_bytes())
    at = {"cells": b"3.0", CFG: b"d_in"}.get(name)
    content[content.index(at) if at else -3] ^= 1
    path.write_bytes({"one bit": content, "torn": content[:-9], "empty": b""}[harm])
    opened(tmp_path, cells=cells)
    assert missing_cells(tmp_path, cells) == [cells[1], *cells[3:]]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path} is damaged (")
    assert line.endswith(f": {cells[1].name} is trained again")


@pytest.mark.parametrize("name", ["cells", WEIGHTS, CFG, "sparsity.safetensors"])
def test_files_of_two_cells_that_changed_places_are_noticed(tmp_path, cells, capsys, name):
    """Each is whole, and what its checksum says."""
    opened(tmp_path)
    for i in (1, 3):
        write(tmp_path, cells[i])
        sparsity = {"sparsity": torch.full((4,), float(i))}
        write_tensors(sae_folder(tmp_path, cells[i]) / "sparsity.safetensors", sparsity)
        mark_done(tmp_path, cells[i], {"l0": i})
    rows, saes = tmp_path / "cells", [sae_folder(tmp_path, cells[i]) for i in (1, 3)]
    one, other = sorted(rows.iterdir()) if name == "cells" else [sae / name for sae in saes]
    opened(tmp_path, cells=cells)
    assert len(missing_cells(tmp_path, cells)) == len(cells) - 2
    one.rename(tmp_path / "mine")
    other.rename(one)
    (tmp_path / "mine").rename(other)
    opened(tmp_path, cells=cells)
    assert missing_cells(tmp_path, cells) == cells
    for path, line in zip((one, other), capsys.readouterr().err.splitlines(), strict=True):
        assert line.startswith(f"warning: {path} is damaged (it is ")
        assert line.endswith("is trained again")


def test_a_file_that_the_row_names_and_that_is_gone_is_said(tmp_path, cells, capsys):
    opened(tmp_path)
    write(tmp_path, cells[0])
    path = sae_folder(tmp_path, cells[0]) / "sparsity.safetensors"
    write_tensors(path, {"sparsity": torch.ones(4)})
    mark_done(tmp_path, cells[0], {"l0": 3.0})
    path.unlink()
    opened(tmp_path, cells=cells)
    assert missing_cells(tmp_path, cells) == cells
    assert f"{path} is damaged (it is missing)" in capsys.readouterr().err


def test_a_cell_without_its_autoencoder_is_missing(tmp_path, cells, capsys):
    write(tmp_path, cells[0])
    (sae_folder(tmp_path, cells[0]) / WEIGHTS).unlink()
    write_record(tmp_path / "config.json", {"constants": CONSTANTS})
    opened(tmp_path, cells=cells)
    assert missing_cells(tmp_path, cells) == cells
    assert "it is missing" in capsys.readouterr().err


def test_a_shard_looks_at_its_own_cells_only(tmp_path, cells, capsys):
    opened(tmp_path)
    write(tmp_path, cells[0])
    (tmp_path / row_path(cells[0])).write_text("torn")
    parts = [Shard(0, 2), Shard(1, 2)]
    for shard in parts:
        opened(tmp_path, cells=cells, shard=shard)
    assert capsys.readouterr().err.count("is trained again") == 1


def test_the_merge_refuses_what_was_damaged_meanwhile(tmp_path, cells):
    for cell in cells:
        write(tmp_path, cell)
    path = sae_folder(tmp_path, cells[5]) / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)
    columns = dict(columns=("name",), compare={"mmcs_with_larger": mmcs_with_larger})
    with pytest.raises(
        Damaged, match=f"{re.escape(str(path))} is damaged .* the same command makes it again"
    ):
        merged_rows(tmp_path, cells, **columns, device=torch.device("cpu"))
