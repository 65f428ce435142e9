"""The grid of run.py; cells become trained, evaluated, saved autoencoders of raw activations."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.lm import (
    DISK,
    all_rows,
    harvester_of,
    massive_,
    metrics_by_hand,
    recipe_of,
    tiny_target,
)
from builders.models import hooked
from builders.scripts import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_coding.config import UserError
from sparse_coding.files import write_json
from sparse_coding.lm.activations import chunks, harvest
from sparse_coding.lm.activations.chunks import statistics
from sparse_coding.lm.activations.harvest import Harvester
from sparse_coding.lm.activations.places import Place
from sparse_coding.lm.activations.store import Store
from sparse_coding.lm.evaluation import evaluate
from sparse_coding.lm.recipe import (
    COLUMNS,
    Grid,
    LanguageRecipe,
    asked_l0,
    feature_density,
    specs_of,
    with_activations,
)
from sparse_coding.lm.target import Target
from sparse_coding.sae.ensemble import ensemble_bytes
from sparse_coding.sae.families import FAMILIES, PREFIXES
from sparse_coding.sae.saved import SparseAutoencoder, load_sae, unscaled
from sparse_coding.sae.spec import Schedule
from sparse_coding.sweep.cells import row_path, sae_folder
from sparse_coding.sweep.grid import Cell, Families, make_grid
from sparse_coding.sweep.run_folder import run_folder_bytes
from sparse_coding.sweep.training import Task

WIDTH = 40


# --- the grid ---

GRID = dict(l1_exp_low=None, l1_exp_high=None, expansion_exp_low=0, expansion_exp_high=1,
            seed=0, n_seeds=1)  # fmt: skip


def grid(*arch: str, target_l0: tuple = (), **flags) -> Grid:
    return Grid(Families(arch or ("relu",), target_l0, PREFIXES), **GRID | flags)


def l1_exps(width: int, **flags) -> list[int]:
    return [cell.l1_exp for cell in grid(**flags).cells(width)]


@pytest.mark.parametrize(
    ("width", "middle"),  # 10^(middle/4) x width is the same within a step: .178 x 256 = 45.5
    [(64, -13), (256, -15), (2048, -19), (3072, -19), (16384, -22)],
)
def test_by_default_relu_seeks_l0s_from_an_l1_alpha_that_falls_as_the_width_grows(width, middle):
    cells = grid().cells(width)
    assert [(c.target_l0, c.l1_exp) for c in cells] == [(l0, middle) for l0 in (16, 32, 64)]
    assert 10 ** (middle / 4) * width == pytest.approx(10 ** (-15 / 4) * 256, rel=0.34)


def test_a_given_range_is_taken_as_it_is():
    assert l1_exps(64, l1_exp_low=-8, l1_exp_high=-6) == [-8, -7]


def test_a_target_l0_takes_the_middle_as_its_start():
    cells = grid(target_l0=(16, 32), n_seeds=2).cells(64)
    assert [(c.seed, c.l1_exp, c.target_l0, c.n_dict) for c in cells] == [
        (0, -13, 16, 64),
        (0, -13, 32, 64),
        (1, -13, 16, 64),
        (1, -13, 32, 64),
    ]


def test_beside_relus_grid_other_families_take_l0s():
    asked = grid("batchtopk", "relu", l1_exp_low=-16, l1_exp_high=-14)
    assert [(c.arch, *c.sparsity) for c in asked.cells(64)] == [
        *[("batchtopk", l0, 0) for l0 in (16, 32, 64)],
        *[("relu", 0, exp) for exp in (-16, -15)],
    ]


def test_only_of_runs_whose_default_was_a_grid_a_constant_has_changed():
    assert asked_l0(("batchtopk", "relu"), (), None) == (16, 32, 64)
    assert asked_l0(("relu",), (8,), None) == (8,)
    assert asked_l0(("relu",), (), -8) == ()
    assert asked_l0(("topk", "jumprelu"), (), None) == ()  # their default was these l0s before


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"l1_exp_low": -8}, "--l1-exp-low -8 must be given together with --l1-exp-high"),
        ({"l1_exp_high": -8}, "--l1-exp-low None must be given together with --l1-exp-high"),
        ({"l1_exp_low": -8, "l1_exp_high": -8}, "--l1-exp-high -8 must be above the low end -8"),
        ({"expansion_exp_high": 0}, "--expansion-exp-high 0 must be above"),
        ({"n_seeds": 0}, "--n-seeds 0 must be between"),
    ],
)
def test_what_makes_no_grid_is_refused(flags, reason):
    with pytest.raises(UserError, match=reason):
        grid(**flags)


# --- from cells to autoencoders ---


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(harvest, "CHUNK_BYTES", 100 * 16 * WIDTH * 2)


def on_disk(root: Path, **changes) -> LanguageRecipe:
    """On stored activations, all of them."""
    target = tiny_target(root)
    recipe = recipe_of(target, **changes)
    everything = replace(recipe, chunks=replace(recipe.chunks, n_tokens=10**9))
    return with_activations(everything, target, folder=root / "run", cells=cells(), place=DISK)


@pytest.fixture
def recipe(root) -> LanguageRecipe:
    return on_disk(root)


def cells(n_l1: int = 2, n_sizes: int = 2, **changes):
    grid = make_grid(
        WIDTH, seeds=range(3, 4), l1_exps=range(-8, -8 + n_l1), size_exps=range(-1, n_sizes - 1)
    )
    return [replace(cell, **changes) for cell in grid]  # 20 and 40 features


def trained(task: Task, steps=range(100)) -> Task:
    for step in steps:
        task.ensemble.step_(task.batch_at(step))
    return task


def test_saved_autoencoders_do_on_raw_activations_what_training_did_on_scaled_ones(recipe):
    task = trained(recipe.prepare(cells()))
    x, scale = recipe.chunks.load(0).float()[:200], recipe.statistics.scale
    assert not 0.7 < scale < 1.4  # else a forgotten scale would not show
    for i, (_, tensors) in enumerate(task.evaluate()):
        stack, k = task.ensemble.place[i]
        codes, x_hat = (t[k].clone() for t in task.ensemble.stacks[stack].forward(x * scale))
        for name in ("density", "n_left_out"):
            tensors.pop(name)
        sae = SparseAutoencoder(**tensors, metadata={})
        assert sae.b_dec.norm() > 0
        assert torch.allclose(sae.decode(sae.encode(x)) * scale, x_hat, atol=1e-5)
        assert torch.allclose(sae.encode(x) * scale, codes.T, atol=1e-5)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.n_dict))


def test_folding_a_power_of_two_is_exact():
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (6, 9), "b_enc": (9,), "W_dec": (9, 6), "b_dec": (6,)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    inside = SparseAutoencoder(**tensors, metadata={})
    raw = SparseAutoencoder(**unscaled(tensors, 0.25), metadata={})
    x = torch.randn(50, 6, generator=rng)
    assert torch.equal(raw.decode(raw.encode(x)), 4 * inside.decode(inside.encode(x / 4)))


def test_training_starts_at_the_scaled_mean_with_projection_and_the_schedule(recipe):
    task = recipe.prepare(cells())
    x = torch.cat([recipe.chunks.load(k) for k in range(len(recipe.chunks.rows))]).double()
    scale = (len(x) / x.square().sum()).sqrt()
    for i in range(4):
        start = task.ensemble.dictionary(i)["b_dec"].double()
        assert torch.allclose(start, x.mean(dim=0) * scale, atol=1e-5)
    assert all(stack.project for stack in task.ensemble.stacks)
    assert task.ensemble.schedule == Schedule(
        100, lr_warmup=10, l1_warmup=20, decay_start=70, anneal=range(20, 70), dead_steps=25
    )


def test_batches_are_scaled_activations_in_an_order_of_the_seed(recipe):
    task = recipe.prepare(cells())
    batch = torch.cat([task.batch_at(step) for step in range(60)])
    assert batch.shape == (60 * 64, WIDTH)
    assert batch.square().sum(dim=1).mean().item() == pytest.approx(1, rel=0.03)
    again = recipe.prepare(cells(n_l1=1))  # other cells of the seed: the same batches
    assert torch.equal(batch[:64], again.batch_at(0))
    other_seed = recipe.prepare(cells(seed=4))
    assert not torch.equal(batch[:64], other_seed.batch_at(0))
    known = {row.numpy().tobytes() for k in range(len(recipe.chunks.rows))
             for row in recipe.chunks.load(k).float()}  # fmt: skip
    raw = (batch / recipe.statistics.scale).half().float()  # undoes the rounding of x · scale
    assert {row.numpy().tobytes() for row in raw[:640]} <= known


def test_training_resumed_from_a_state_has_the_same_bits(recipe):
    straight = trained(recipe.prepare(cells()), range(40))
    state = {name: tensor.clone() for name, tensor in straight.ensemble.state().items()}
    trained(straight, range(40, 90))
    resumed = recipe.prepare(cells())
    resumed.ensemble.load_state_(state)
    trained(resumed, range(40, 90))
    for name, tensor in straight.ensemble.state().items():
        assert torch.equal(tensor, resumed.ensemble.state()[name]), name


def test_l1_is_divided_by_the_size_per_feature_and_is_not_as_sum():
    of_sum, per_feature = (specs_of(cells(), kind, tied=True) for kind in ("sum", "per_feature"))
    assert [m.l1 for m in of_sum] == pytest.approx([1e-2, 10**-1.75] * 2)
    assert [m.l1 * m.n_dict for m in per_feature] == pytest.approx([1e-2, 10**-1.75] * 2)
    assert [m.n_dict for m in of_sum] == [20, 20, 40, 40]
    assert all(m.tied for m in of_sum)


def test_a_weight_of_the_number_of_codes_starts_where_the_threshold_does():
    """A code of 0.03 saves an error of 0.03² / width, here of 40."""
    for arch, starts in (("jumprelu", 0.03**2 / 40), ("p_anneal", 1e-2), ("relu", 1e-2)):
        asked = [replace(cell, arch=arch, target_l0=4) for cell in cells()]
        assert specs_of(asked, "sum", tied=True)[0].l1 == pytest.approx(starts)


def test_every_cell_has_a_start_of_its_own_that_does_not_depend_on_the_others():
    targets = [replace(cell, target_l0=t) for cell in cells() for t in (0, 4, 8)]
    specs = specs_of(targets, "sum", tied=True)
    assert len({m.seed for m in specs}) == 12
    assert specs_of(targets[5:6], "sum", tied=True)[0].seed == specs[5].seed
    assert [m.target_l0 for m in specs[:3]] == [0, 4, 8]


# --- rows ---


def test_rows_have_the_columns_of_the_table_and_what_the_cells_are(recipe):
    rows = [row for row, _ in trained(recipe.prepare(cells()), range(3)).evaluate()]
    assert [tuple(row) for row in rows] == [COLUMNS] * 4
    known = [(r["seed"], r["n_dict"], r["expansion_factor"], r["n_tokens"]) for r in rows]
    assert known == [(3, 20, 0.5, 6400)] * 2 + [(3, 40, 1, 6400)] * 2
    assert [r["l1_alpha"] for r in rows] == pytest.approx([1e-2, 10**-1.75] * 2)
    filled_in_later = {"mmcs_with_larger", "n_matched_larger", "seconds"}
    no_meaning = {"target_l0", "fvu_trained", "l0_trained"}  # for relu on its grid
    empty = {k for row in rows for k, v in row.items() if v is None}
    assert empty == filled_in_later | no_meaning


def of_families(**changes) -> list[Cell]:
    """A cell of each family, of 40 features."""
    (one,) = cells(n_l1=1, n_sizes=2)[1:]
    return [replace(one, arch=arch, target_l0=4, **changes) for arch in FAMILIES]


def test_each_family_has_a_row_and_an_autoencoder_that_gives_what_the_row_says(root, tmp_path):
    recipe = on_disk(root, n_tokens=64 * 300)
    group = of_families()
    task = trained(recipe.prepare(group), range(300))
    for cell, (row, tensors) in zip(group, task.evaluate(), strict=True):
        assert (row["arch"], row["target_l0"]) == (cell.arch, 4)
        assert (row["l1_alpha"] is None) == FAMILIES[cell.arch].has_k, cell
        by_batch = FAMILIES[cell.arch].selection == "batchtopk"
        assert (row["l0_trained"] is not None) == by_batch, cell
        if by_batch:
            assert row["l0_trained"] == pytest.approx(4, abs=0.05)
            assert row["l0"] == pytest.approx(4, rel=0.25)
        if cell.arch == "topk":
            assert row["l0"] <= 4
        recipe.save(tmp_path, cell, tensors, row)
        saved = load_sae(sae_folder(tmp_path, cell))
        (again,) = evaluate(recipe.held_out, [saved], mean=recipe.statistics.mean)
        assert again.values["fvu"] == pytest.approx(row["fvu"], rel=1e-5)
        assert again.values["l0"] == pytest.approx(row["l0"], rel=1e-5)
        assert saved.metadata["arch"] == cell.arch


def test_tokens_count_whole_steps_only(root):
    recipe = on_disk(root, n_tokens=200)
    assert recipe.n_steps == 3
    (row, _), *_ = recipe.prepare(cells()).evaluate()
    assert row["n_tokens"] == 192


def test_the_numbers_are_those_of_the_saved_autoencoder_on_held_out_text(recipe, tmp_path):
    task = trained(recipe.prepare(cells()))
    for cell, (row, tensors) in zip(cells(), task.evaluate(), strict=True):
        recipe.save(tmp_path, cell, tensors, row)
        sae = load_sae(sae_folder(tmp_path, cell))
        expected = metrics_by_hand(recipe.held_out, "gpt2", sae, recipe.statistics.mean)
        density = expected.pop("density").numpy()
        ours = {name: row[name] for name in expected}
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
        assert np.allclose(feature_density(sae_folder(tmp_path, cell)), density, atol=1e-6)


def test_the_mean_of_mean_ablation_is_that_of_the_training_text(recipe):
    (row, _), *_ = recipe.prepare(cells()).evaluate()
    held_out = recipe.held_out
    ids = torch.from_numpy(held_out.text.rows(0, held_out.n_rows))
    keep = torch.from_numpy(held_out.text.keep(0, held_out.n_rows))
    x = torch.cat([recipe.chunks.load(k).float() for k in range(len(recipe.chunks.rows))])

    def ablated(activation: torch.Tensor) -> torch.Tensor:
        return torch.where(keep[:, :, None], x.mean(dim=0), activation)

    _, logits = hooked(held_out.lm.model, "gpt2", 1, "mlp_act", ids, new=ablated)
    log_p = torch.log_softmax(logits.double(), dim=2)[:, :-1]
    loss = -log_p.gather(2, ids[:, 1:, None]).mean().item()
    assert row["ce_mean"] == pytest.approx(loss, rel=1e-5)


def test_that_mean_is_of_the_first_chunks_with_as_many_rows_as_the_metrics_page_says(
    recipe, monkeypatch
):
    page = (ROOT / "docs/metrics.md").read_text()
    assert f"mean of the first {chunks.STATISTICS_ROWS:,}".replace(",", " ") in page
    monkeypatch.setattr(chunks, "STATISTICS_ROWS", recipe.chunks.rows[0] + 1)
    first_two = torch.cat([recipe.chunks.load(k).double() for k in (0, 1)])
    assert len(recipe.chunks.rows) > 2
    mean = statistics(recipe.chunks).mean
    torch.testing.assert_close(mean, first_two.mean(dim=0).float())


def test_the_held_out_tokens_recorded_are_those_used(root, tmp_path):
    target = tiny_target(root)
    for asked, used in ((33, 48), (10**9, target.held_out.n_rows * 16)):
        recipe = recipe_of(target, n_eval_tokens=asked)
        (cell, *_), (evaluated, *_) = cells(), recipe.prepare(cells()).evaluate()
        recipe.save(tmp_path, cell, evaluated[1], evaluated[0])
        assert load_sae(sae_folder(tmp_path, cell)).metadata["n_eval_tokens"] == used


@pytest.mark.parametrize("normalisation", ["sum", "per_feature"])
def test_with_a_target_l0_the_row_has_the_l1_alpha_that_was_found(root, normalisation):
    recipe = on_disk(root, l1_normalisation=normalisation, l1_warmup=0.0)
    group = cells(n_l1=1, target_l0=2)
    task = trained(recipe.prepare(group))
    for i, (row, _) in enumerate(task.evaluate()):
        stack, k = task.ensemble.place[i]
        weight = task.ensemble.stacks[stack].l1[k].item()  # of Σ codes in the loss
        per_feature = group[i].n_dict if normalisation == "per_feature" else 1
        assert row["l1_alpha"] == pytest.approx(weight * per_feature, rel=1e-6)
        assert row["l1_alpha"] != pytest.approx(group[i].l1_alpha, rel=1e-2)


def test_what_is_logged_is_measured_on_the_scaled_batch(recipe):
    task = trained(recipe.prepare(cells()), range(5))
    x = task.batch_at(5)
    measured = task.measure(x)
    assert set(measured) == {"train/mse", "train/fvu", "train/l0"}
    assert recipe.headline[0] in measured
    for i in range(4):
        sae = SparseAutoencoder(**task.ensemble.dictionary(i), metadata={})
        error = (sae.decode(sae.encode(x)) - x).square()
        variance = (x - x.mean(dim=0)).square().sum()
        assert measured["train/mse"][i] == pytest.approx(error.mean().item(), rel=1e-4)
        assert measured["train/fvu"][i] == pytest.approx((error.sum() / variance).item(), rel=1e-4)
        l0 = (sae.encode(x) > 0).sum(dim=1).float().mean().item()
        assert measured["train/l0"][i] == pytest.approx(l0, rel=1e-2)


# --- on disk ---


def saved(recipe: LanguageRecipe, folder: Path, group) -> list[dict]:
    task = trained(recipe.prepare(group), range(20))
    for cell, (row, tensors) in zip(group, task.evaluate(), strict=True):
        row["seconds"] = 1.0
        recipe.save(folder, cell, tensors, row)
        write_json(folder / row_path(cell), row)
    return [json.loads((folder / row_path(cell)).read_text()) for cell in group]


def test_a_saved_autoencoder_knows_where_it_comes_from_and_how_good_it_is(recipe, tmp_path):
    group = cells()
    rows = saved(recipe, tmp_path, group)
    known = load_sae(sae_folder(tmp_path, group[1])).metadata
    assert {k: known[k] for k in recipe.metadata} == recipe.metadata
    assert (known["layer"], known["site"], known["seed"]) == (1, "mlp_act", 3)
    for name in ("l1_alpha", "fvu", "l0"):
        assert known[name] == rows[1][name]
    names = {p.name for p in sae_folder(tmp_path, group[1]).iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}


def test_densities_come_back_and_what_never_fired_is_zero(recipe, tmp_path):
    density = torch.tensor([0.0, 1e-6, 0.25, 1.0])
    _, tensors = recipe.prepare(cells()).evaluate()[0]
    row = {"l1_alpha": 1.0, "fvu": 0.1, "l0": 2.0, "ce_recovered": 0.9}
    cell = cells()[0]
    recipe.save(tmp_path, cell, tensors | {"density": density}, row)
    read = feature_density(sae_folder(tmp_path, cell))
    assert read.tolist() == pytest.approx([0, 1e-6, 0.25, 1], rel=1e-3)
    assert read[0] == 0


def test_the_merge_compares_dictionaries_with_larger_ones(recipe, tmp_path):
    group = cells(n_l1=1, n_sizes=3)
    saved(recipe, tmp_path, group)
    rows = recipe.merged(tmp_path, group)
    W = [load_sae(sae_folder(tmp_path, cell)).W_dec.double() for cell in group]
    cosine = [[(a @ b.T).amax(dim=1) for b in W] for a in W]  # rows have length 1
    both = (cosine[0][1].mean() + cosine[0][2].mean()) / 2
    assert rows[0]["mmcs_with_larger"] == pytest.approx(both.item(), rel=1e-5)
    assert rows[1]["mmcs_with_larger"] == pytest.approx(cosine[1][2].mean().item(), rel=1e-5)
    assert rows[2]["mmcs_with_larger"] is None
    assert rows[0]["n_matched_larger"] == int((cosine[0][1] > 0.9).sum())
    assert [tuple(row) for row in rows] == [COLUMNS] * 3
    assert all(row["seconds"] == 1.0 for row in rows)


def test_a_diverged_cell_does_not_keep_the_others_from_the_table(recipe, tmp_path):
    group = cells()
    task = recipe.prepare(group)
    for cell, (row, tensors) in zip(group, task.evaluate(), strict=True):
        if cell is group[1]:
            tensors |= {name: t * float("nan") for name, t in tensors.items()}
            row |= {"fvu": float("nan"), "ce_spliced": float("nan")}
        recipe.save(tmp_path, cell, tensors, row)
        write_json(tmp_path / row_path(cell), row)
    rows = recipe.merged(tmp_path, group)
    assert [np.isnan(row["fvu"]) for row in rows] == [False, True, False, False]


class Busy:
    """Chunks computed by the model, which takes long when they are loaded ahead."""

    def __init__(self, harvester: Harvester):
        self.harvester, self.rows = harvester, harvester.rows

    def load(self, k: int) -> torch.Tensor:
        ahead = threading.current_thread() is not threading.main_thread()
        for _ in range(20 if ahead else 1):
            rows = self.harvester.load(k)
        return rows


def test_activations_computed_as_they_are_read_give_the_same_bits_as_stored_ones(root):
    target = tiny_target(root)
    streamed = recipe_of(target, shuffle_gb=0.0001)
    run = dict(folder=root / "run", cells=cells())
    stored = with_activations(streamed, target, **run, place=DISK)
    assert isinstance(stored.chunks, Store)
    manifest = json.loads((target.folder / "manifest.json").read_text())
    assert manifest["metadata"] == target.metadata
    # what is there is used, whatever the limit is now
    assert isinstance(
        with_activations(streamed, target, **run, place=Place("disk", 1e-9)).chunks, Store
    )
    streamed = replace(streamed, chunks=Busy(streamed.chunks))
    tasks = [trained(r.prepare(cells()), range(30)) for r in (streamed, stored)]
    for name, tensor in tasks[0].ensemble.state().items():
        assert torch.equal(tensor, tasks[1].ensemble.state()[name]), name
    rows = [[row for row, _ in task.evaluate()] for task in tasks]
    assert str(rows[0]) == str(rows[1])  # NaN included


@pytest.fixture
def massive(root) -> Target:
    return massive_(tiny_target(root, site="resid_post", held_out=0.3))


def test_massive_activations_are_left_out_of_training_and_the_same_when_streamed(massive, root):
    chunks = harvester_of(massive)
    norms = all_rows(chunks).float().norm(dim=1)
    max_norm = 10 * chunks.load(0).float().norm(dim=1).median().item()
    assert 0 < int((norms > max_norm).sum()) < 100
    streamed = recipe_of(massive, shuffle_gb=0.0001)
    known = streamed.statistics
    assert known.max_norm == pytest.approx(max_norm)
    assert known.n_left_out == int((norms[: known.n_rows] > max_norm).sum()) > 0
    run = dict(folder=root / "run", cells=cells())
    stored = with_activations(streamed, massive, **run, place=DISK)
    tasks = [r.prepare(cells()) for r in (streamed, stored)]
    for step in range(200):  # two epochs
        x, same = (task.batch_at(step) for task in tasks)
        assert torch.equal(x, same)
        assert x.shape == (64, 16)
        assert float(x.norm(dim=1).max()) <= 1.01 * max_norm * known.scale
    for task in tasks:
        task.close()
    unlimited = recipe_of(massive, max_norm_multiple=0.0)
    assert unlimited.statistics.n_left_out == 0
    assert unlimited.statistics.scale < 0.6 * known.scale


def test_what_was_left_out_is_said_and_saved(massive, root, tmp_path, capsys):
    recipe = recipe_of(massive)
    known, group = recipe.statistics, cells()[:1]
    recipe = with_activations(recipe, massive, folder=tmp_path, cells=group, place=DISK)
    line = (
        f"left out: {known.n_left_out:,} of the first {known.n_rows:,} activations, of norms above"
    )
    assert line in capsys.readouterr().out
    saved(recipe, tmp_path, group)
    metadata = load_sae(sae_folder(tmp_path, group[0])).metadata
    assert metadata["max_norm_multiple"] == 10
    assert metadata["max_norm"] == known.max_norm
    assert (metadata["n_left_out"], metadata["n_left_out_of"]) == (known.n_left_out, known.n_rows)
    assert metadata["n_eval_left_out"] > 0


def test_nothing_is_said_where_nothing_was_left_out(root, tmp_path, capsys):
    target = tiny_target(root)
    recipe = with_activations(recipe_of(target), target, folder=tmp_path, cells=cells(), place=DISK)
    assert recipe.statistics.n_left_out == 0
    assert "left out" not in capsys.readouterr().out


def test_other_activations_than_a_run_was_begun_on_are_refused_and_to_merge_only_its_model_counts(
    root, tmp_path
):
    target, group = tiny_target(root), cells()
    recipe, run = recipe_of(target), dict(folder=tmp_path, cells=group, place=DISK)

    def begin_on(**changes: str) -> None:
        activations = target.metadata | changes
        write_json(tmp_path / "config.json", {"constants": {}, "activations": activations})

    begin_on()
    with_activations(recipe, target, **run)
    for name in ("tokens_sha256", "weight_hash"):
        begin_on(**{name: "other"})
        message = f"was begun on other activations .{name} other there"
        with pytest.raises(UserError, match=message):
            with_activations(recipe, target, **run)
    for cell in group:
        write_json(tmp_path / row_path(cell), {})
    with pytest.raises(UserError, match="weight_hash other there"):
        with_activations(recipe, target, **run)
    begin_on(model_dtype="bfloat16", tokens_sha256="other")  # trained on a GPU, of another Python
    assert with_activations(recipe, target, **run) is recipe


def test_nothing_is_harvested_for_a_run_that_has_all_its_cells(root, tmp_path):
    target = tiny_target(root, held_out=0.25)
    recipe, group = recipe_of(target), cells()
    for cell in group:
        write_json(tmp_path / row_path(cell), {})
    run = dict(folder=tmp_path, place=DISK)
    assert with_activations(recipe, target, cells=group, **run) is recipe
    assert not list(target.folder.glob("chunk-*"))
    (tmp_path / row_path(group[2])).unlink()
    assert isinstance(with_activations(recipe, target, cells=group, **run).chunks, Store)


# --- plans ---


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes in tensors made inside, by this thread, and alive at once."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


def test_the_memory_plan_covers_training_and_evaluation(root):
    recipe = on_disk(root, batch_size=256, n_tokens=256 * 6)
    group = make_grid(WIDTH, seeds=range(1), l1_exps=range(-8, -4), size_exps=range(3, 5))
    kinds = [cell.kind for cell in group]  # 320 and 640
    _ = recipe.statistics  # of its own, before training
    o = recipe.optimisation
    buffer = 2 * WIDTH * min(o.buffer_rows(WIDTH), sum(recipe.chunks.rows))
    with PeakMemory() as training:
        task = trained(recipe.prepare(group), range(6))
    with PeakMemory() as evaluation:
        task.evaluate()
    planned = recipe.memory(kinds)
    # while it is evaluated
    held = ensemble_bytes(kinds, WIDTH, o.batch_size, recipe.device) + 2 * buffer
    assert training.peak + buffer <= planned  # one buffer is filled by the reader's thread
    assert held + evaluation.peak <= planned
    assert planned < 1.6 * (held + evaluation.peak)


def test_the_disk_plan_covers_autoencoders_and_three_checkpoints(recipe, tmp_path):
    group = cells(n_l1=3)
    saved(recipe, tmp_path, group)
    task = trained(recipe.prepare(group), range(1))
    checkpoint = sum(t.numel() * t.element_size() for t in task.ensemble.state().values())
    saes = sum(p.stat().st_size for p in tmp_path.rglob("sae_weights.safetensors"))
    headers = 1000 * len(group)
    planned = run_folder_bytes([cell.n_dict for cell in group], recipe.width)
    assert saes - headers + 3 * checkpoint <= planned * 1.01
    assert planned < 1.3 * (saes + 3 * checkpoint)


def test_shares_of_the_steps_become_steps(root):
    target = tiny_target(root)

    def schedule(**changes) -> Schedule:
        options = dict(n_tokens=64 * 200, warmup=0.0, l1_warmup=0.0, decay=0.0) | changes
        return recipe_of(target, **options).optimisation.schedule(256)

    assert schedule() == Schedule(200, 0, 0, None, anneal=range(200), dead_steps=50)
    at_gpt2s_width = recipe_of(target, n_tokens=64 * 200).optimisation.schedule(3072)
    assert at_gpt2s_width.eps == pytest.approx(1e-8 / 144)
    usual = schedule(warmup=0.02, l1_warmup=0.05, decay=0.2)
    assert usual == Schedule(200, 4, 10, 160, anneal=range(10, 160), dead_steps=50)
    assert [usual.p(step) for step in (0, 10, 85, 160, 199)] == pytest.approx([1, 1, 0.6, 0.2, 0.2])
    rising = schedule(warmup=1.0, l1_warmup=1.0, decay=1.0)
    assert (rising.lr_warmup, rising.l1_warmup, rising.decay_start) == (200, 200, 0)
    assert recipe_of(target, n_tokens=64 * 9000).optimisation.schedule(256).dead_steps == 1000
    decaying = schedule(decay=0.2)
    factors = [decaying.lr_factor(step) for step in (0, 159, 160, 180, 199)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.025])


def test_the_buffer_is_of_the_given_size(root):
    o = recipe_of(tiny_target(root), shuffle_gb=0.5).optimisation
    assert o.buffer_rows(3072) == 81380  # 5e8 / (2 · 3072) = 81380.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"n_tokens": 63}, "--n-tokens 63 .*--batch-size 64"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": 1.5}, "--lr 1.5"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"warmup": -0.1}, "--warmup -0.1"),
        ({"l1_warmup": 1.1}, "--l1-warmup 1.1"),
        ({"decay": float("nan")}, "--decay nan"),
        ({"shuffle_gb": 0.0}, "--shuffle-gb 0.0"),
        ({"shuffle_gb": float("inf")}, "--shuffle-gb inf"),
        ({"max_norm_multiple": 0.5}, "--max-norm-multiple 0.5"),
        ({"max_norm_multiple": -1.0}, "--max-norm-multiple -1.0"),
        ({"max_norm_multiple": float("nan")}, "--max-norm-multiple nan"),
    ],
)
def test_constants_out_of_range_are_refused_by_their_flag(root, change, message):
    with pytest.raises(UserError, match=message):
        recipe_of(tiny_target(root), **change)


def test_constants_at_the_ends_of_their_range_are_taken(root):
    ends = dict(lr=1.0, warmup=1.0, l1_warmup=1.0, decay=0.0, max_norm_multiple=1.0)
    o = recipe_of(tiny_target(root), n_tokens=1, batch_size=1, **ends).optimisation
    assert (o.n_steps, o.buffer_rows(WIDTH)) == (1, 6250)  # 5e5 bytes, 80 a row
