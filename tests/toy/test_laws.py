"""The laws of toy data: their worlds, the cache of them, what they refuse."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparse_coding.config import UserError
from sparse_coding.files import Damaged, cache_folder
from sparse_coding.sweep.grid import Cell
from sparse_coding.toy import laws
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.laws import SynthData, data_of, require_used, worlds_of
from sparse_coding.toy.synth_world import digest, make_synth_world, read_world, write_world

CPU = torch.device("cpu")
SYNTH = SynthData("synth", 12, 100, batch_size=64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()


def forget() -> None:
    laws._drawn.cache_clear()
    laws._from_file.cache_clear()


def flags(**changes) -> SimpleNamespace:
    known = dict(
        data_law="synth", activation_dim=12, n_true_features=100, batch_size=64, world="42",
        n_worlds=1, n_active=3.0, feature_prob_decay=0.9, noise_std=0.0, seed=5,
        arch=("batchtopk",), decoder_rows="unit",
    )  # fmt: skip
    return SimpleNamespace(**known | changes)


def test_a_world_is_drawn_once_and_then_read_from_the_cache(monkeypatch):
    first = SYNTH.drawn(7)
    assert digest(first) == digest(make_synth_world(100, 12, 7))
    forget()
    monkeypatch.setattr(laws, "make_synth_world", lambda *_: pytest.fail("drawn again"))
    assert digest(SYNTH.drawn(7)) == digest(first)


@pytest.mark.parametrize("harm", [b"", b"no archive", None])
def test_a_damaged_cache_costs_time_and_no_more(harm):
    expected = digest(SYNTH.drawn(7))
    (kept,) = (cache_folder() / "worlds").iterdir()
    data = kept.read_bytes()
    kept.write_bytes(data[: len(data) // 2] if harm is None else harm)
    forget()
    assert digest(SYNTH.drawn(7)) == expected
    assert kept.read_bytes() == data


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert digest(SYNTH.drawn(7)) == digest(make_synth_world(100, 12, 7))
    assert "could not be kept" in capsys.readouterr().out


def test_worlds_of_other_seeds_sizes_and_laws_are_kept_apart():
    correlated = replace(SYNTH, law="correlated", n_true_features=12)
    drawn = [SYNTH.drawn(7), SYNTH.drawn(8), replace(SYNTH, activation_dim=13).drawn(7)]
    drawn += [replace(SYNTH, n_true_features=101).drawn(7), correlated.drawn(7)]
    assert len(set(map(digest, drawn))) == len(drawn)
    assert len(list((cache_folder() / "worlds").iterdir())) == len(drawn)


@pytest.mark.parametrize("law", ["synth", "correlated"])
def test_x_has_a_mean_square_norm_of_one_times_its_scale(law):
    data = replace(SYNTH, law=law, activation_dim=120)
    stream = data.stream(7, batch_size=4096, batch_seed=0, device=CPU)
    x = stream.batch(0) * data.scale(7)
    assert float(x.square().sum(dim=1).mean()) == pytest.approx(1, rel=0.05)


def test_the_truth_of_a_batch_is_what_x_is_the_sum_of():
    stream = SYNTH.stream(7, batch_size=64, batch_seed=0, device=CPU)
    x, on = stream.with_truth(3)
    same, active = stream.with_active(3)
    assert torch.equal(x, same)
    assert torch.equal(x, stream.batch(3))
    assert (on.dtype, on.shape) == (torch.bool, (64, 100))
    assert torch.equal(on, active.dense(100) > 0)
    assert 1 < on.sum(dim=1).float().mean() < 10


def test_v1_does_not_scale_children():
    """So what is on is the same, and x is not."""
    of = dict(batch_size=64, batch_seed=0, device=CPU)
    x, on = SYNTH.stream(7, **of).with_truth(0)
    x_v1, on_v1 = replace(SYNTH, law="synth_v1").stream(7, **of).with_truth(0)
    assert torch.equal(on, on_v1)
    assert not torch.allclose(x, x_v1)


def test_a_file_holds_the_world_of_all_cells(tmp_path):
    path = tmp_path / "w.npz"
    write_world(SYNTH.drawn(7), path)
    data = replace(SYNTH, world=str(path))
    cell = Cell(3, 0, 0, 8)
    assert data.world_of(cell) is None
    assert torch.equal(data.features(None), SYNTH.features(7))
    assert data.identity == {"world_digest": digest(SYNTH.drawn(7))}
    assert SYNTH.identity == {}
    assert data.flags(cell)["world"] == str(path)
    assert SYNTH.flags(replace(cell, world=9))["world"] == "9"


def test_files_of_worlds_are_written_and_checked(tmp_path):
    files = SYNTH.worlds([7, 8])
    assert list(files) == ["world7.npz", "world8.npz"]
    for name, file in files.items():
        file.write(tmp_path / name)
        file.check(tmp_path / name)
    assert digest(read_world(tmp_path / "world8.npz")) == digest(SYNTH.drawn(8))
    with pytest.raises(Damaged, match="another world"):
        files["world7.npz"].check(tmp_path / "world8.npz")
    (tmp_path / "world7.npz").write_bytes(b"PK")
    with pytest.raises(Damaged, match="is no world"):
        files["world7.npz"].check(tmp_path / "world7.npz")


def test_constants_name_their_law_and_its_worlds():
    post = flags(data_law="post")
    assert data_of(post) == ToyData("post", 12, 100, 3.0, 0.9, 0.0, 64)
    assert data_of(flags()) == SYNTH
    assert list(worlds_of(post)) == [None]
    assert list(worlds_of(flags(n_worlds=3))) == [42, 43, 44]
    assert list(worlds_of(flags(world="w.npz"))) == [None]


@pytest.mark.parametrize(
    ("changes", "argv", "reason"),
    [
        ({"data_law": "post"}, ["--world=3"], "--world is for --data-law synth"),
        ({"data_law": "june2023"}, ["--n-worlds", "2"], "--n-worlds is for"),
        ({}, ["--n-active", "3"], "--n-active is for --data-law post, june2023"),
        ({}, ["--noise-std=1"], "--noise-std is for"),
        ({"decoder_rows": "raw", "arch": ("topk", "relu")}, [], "raw with --arch relu: long"),
        ({"n_worlds": 0}, [], "--n-worlds 0 must be between"),
        ({"n_worlds": 2, "world": "w.npz"}, [], "a file has one world"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(changes, argv, reason):
    with pytest.raises(UserError, match=reason):
        require_used(flags(**changes), argv)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_true_features": 84}, "at least 85"),
        ({"activation_dim": 0}, "--activation-dim 0"),
        ({"law": "correlated"}, "at most --activation-dim 12"),
        ({"world": "nowhere.npz"}, "nowhere.npz is no world"),
    ],
)
def test_a_world_that_cannot_be_is_refused(changes, reason):
    with pytest.raises(UserError, match=reason):
        replace(SYNTH, **changes)


def test_a_file_of_other_sizes_is_refused_with_those_it_has(tmp_path):
    write_world(SYNTH.drawn(7), tmp_path / "w.npz")
    with pytest.raises(UserError, match="100 x 12"):
        replace(SYNTH, world=str(tmp_path / "w.npz"), n_true_features=101)
