"""Transcoders on a language model: two sites of one pass, spliced at the second, and refusals."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from builders.lm import CONTEXT, SEPARATOR, demo_target, held_out_of, recipe_of, tiny_target
from builders.models import hooked
from torch import Tensor

from sparse_coding.config import UserError
from sparse_coding.lm.activations.chunks import is_kept, scaled, statistics
from sparse_coding.lm.evaluation import HeldOut, evaluate
from sparse_coding.lm.features.collected import FeatureCollector
from sparse_coding.lm.features.run_pages import _with_decoder
from sparse_coding.lm.model import activations, find_site
from sparse_coding.lm.reader import Reader
from sparse_coding.lm.show import check_fit, evaluate_one
from sparse_coding.lm.transcoding import Transcoding, find_sites
from sparse_coding.sae.families import FAMILIES, TRAINED
from sparse_coding.sae.saved import SparseAutoencoder, load_sae
from sparse_coding.sweep.cells import sae_folder
from sparse_coding.sweep.grid import Cell

CPU = torch.device("cpu")
WIDTH, N_DICT = 16, 32
SITES = dict(site="mlp_in", target_site="mlp_out")
FAMILIES_OF = [name for name in TRAINED if not FAMILIES[name].refined]
FLAGS = dict(site="mlp_in", target_site="mlp_out", skip=False, arch=("relu",), export="none")


def target_of(root: Path, kind: str = "gpt2", **changes):
    return tiny_target(root, kind=kind, layer=1, **SITES, **changes)


def random_transcoder(skip: bool, **more) -> SparseAutoencoder:
    rng = torch.Generator().manual_seed(0)
    shapes = ((WIDTH, N_DICT), (N_DICT,), (N_DICT, WIDTH), (WIDTH,))
    tensors = [torch.randn(shape, generator=rng) for shape in shapes]
    W_skip = 0.3 * torch.randn(WIDTH, WIDTH, generator=rng) if skip else None
    return SparseAutoencoder(*tensors, metadata={}, W_skip=W_skip, transcodes=True, **more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(target_site="", skip=True), "--skip is for --target-site"),
        (dict(target_site="mlp_in"), "--target-site mlp_in must be a site that is computed after"),
        (dict(target_site="attn_concat"), "--site mlp_in: mlp_act, mlp_out, resid_post"),
        (dict(site="resid_post"), "must be a site that is computed after --site resid_post"),
        (dict(arch=("relu", "matryoshka_refined")), "--arch matryoshka_refined refines its codes"),
        (dict(export="dictionary_learning"), "it has no transcoders"),
        (dict(export="sparsify", arch=("topk", "relu")), "it has topk transcoders alone"),
        (dict(export="hub", arch=("topk",)), "sae_lens has no topk transcoders"),
        (dict(export="circuit_tracer", arch=("topk",)), "it has no topk transcoders"),
        (dict(export="circuit_tracer", target_site="resid_post"), "mlp_in to mlp_out alone"),
        (dict(export="circuit_tracer", target_site=""), "circuit_tracer is for transcoders"),
    ],
)
def test_flags_that_make_no_transcoder_are_refused(changes, message):
    Transcoding(**FLAGS)
    with pytest.raises(UserError, match=message):
        Transcoding(**FLAGS | changes)


def test_a_target_of_another_width_is_refused(root):
    lm = target_of(root).lm
    for site, target in (("mlp_in", "mlp_act"), ("mlp_act", "mlp_out")):
        with pytest.raises(UserError, match=f"--target-site {target} of .* has width .* one width"):
            find_sites(lm, 1, site, target)
    assert find_sites(lm, 1, "mlp_act", "") == find_site(lm, 1, "mlp_act")


def test_chunks_hold_both_sites_of_each_token_in_one_row(root):
    target = target_of(root)
    recipe = recipe_of(target)
    rows = recipe.chunks.load(0).float()
    start, stop = recipe.chunks.span(0)
    ids = torch.from_numpy(target.train.rows(start, stop))
    keep = torch.from_numpy(target.train.keep(start, stop))
    lm = target.lm
    x, y = (hooked(lm.model, "gpt2", 1, name, ids)[0][keep] for name in ("mlp_in", "mlp_out"))
    found = rows[rows[:, 0].argsort()]
    by_hand = torch.cat([x, y], dim=1).half().float()
    order = by_hand[:, 0].argsort()
    assert found.shape == (len(x), 2 * WIDTH)
    torch.testing.assert_close(found.sum(dim=0), by_hand.sum(dim=0), atol=1, rtol=1e-3)
    assert torch.equal(found[:, 0], by_hand[order, 0])
    unique = found[:, 0].unique(return_counts=True)[1].eq(1).all()
    assert not unique or torch.equal(found, by_hand[order])
    assert target.metadata["target_site"] == "mlp_out"
    assert "target_site" not in tiny_target(root).metadata  # as it was before there was one


def test_each_site_has_its_own_scale_mean_and_limit_and_a_row_beyond_either_is_left_out():
    rng = torch.Generator().manual_seed(0)
    rows = torch.cat(
        [torch.randn(300, 4, generator=rng), 50 * torch.randn(300, 4, generator=rng)], 1
    )
    rows[5, :4] *= 1000
    rows[9, 4:] *= 100
    mask = torch.ones(300, dtype=torch.bool)
    mask[[5, 9]] = False

    class One:
        rows = (300,)

        def load(self, k: int) -> Tensor:
            return self.chunk

    chunks = One()
    chunks.chunk = rows
    found = statistics(chunks, max_norm_multiple=10, n_sites=2)
    assert (found.n_left_out, found.target.n_left_out) == (2, 2)
    for part, of in ((rows[:, :4], found), (rows[:, 4:], found.target)):
        assert of.max_norm == pytest.approx(10 * part.norm(dim=1).median().item())
        assert torch.allclose(of.mean, part[mask].mean(dim=0), rtol=1e-4, atol=1e-5)
        assert of.scale == pytest.approx(part[mask].square().sum(dim=1).mean().item() ** -0.5)
    assert torch.equal(is_kept(rows, found.limits), mask)
    assert found.output is found.target
    alone = statistics(chunks, max_norm_multiple=10)
    assert alone.target is None
    assert alone.output is alone


def test_batches_are_x_and_y_each_times_its_scale():
    class Numbered:
        rows = (64,)

        def load(self, k: int) -> Tensor:
            n = torch.arange(64.0)
            return torch.stack([n, -n, 2 * n, 3 * n], dim=1).half()

    options = dict(batch_size=16, n_steps=100, seed=0, device=CPU, buffer_rows=100)
    reader = Reader(Numbered(), scale=(0.5, 0.25), **options)
    x, y = reader.batch(3)
    alone = Reader(Numbered(), scale=1.0, **options).batch(3)
    reader.close()
    assert torch.equal(x, alone[:, :2] * 0.5)
    assert torch.equal(y, alone[:, 2:] * 0.25)
    assert torch.equal(torch.stack([x, y]), scaled(alone, (0.5, 0.25)))


def by_hand(held_out: HeldOut, kind: str, sae: SparseAutoencoder, mean: Tensor) -> dict:
    """What evaluate gives of a transcoder, with hooks of the tests' own."""
    model, ids = held_out.lm.model, torch.from_numpy(held_out.text.rows(0, held_out.n_rows))
    keep = ids != SEPARATOR
    keep[:, 0] = False
    x, y = (hooked(model, kind, 1, name, ids)[0] for name in ("mlp_in", "mlp_out"))
    codes = (x @ sae.W_enc + sae.b_enc).relu()
    y_hat = codes @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if sae.W_skip is not None else 0)

    def loss(new: Tensor) -> float:
        changed = torch.where(keep[:, :, None], new, y)
        _, logits = hooked(model, kind, 1, "mlp_out", ids, new=lambda _: changed)
        log_p = torch.log_softmax(logits.double(), dim=2)
        return -log_p[:, :-1].gather(2, ids[:, 1:, None]).mean().item()

    error, spread = (y_hat - y)[keep].double(), (y[keep] - y[keep].mean(dim=0)).double()
    clean, zero, spliced = loss(y), loss(torch.zeros_like(y)), loss(y_hat)
    return {
        "fvu": ((error**2).sum() / (spread**2).sum()).item(),
        "l0": (codes[keep] > 0).sum(dim=1).double().mean().item(),
        "mse": (error**2).mean().item(),
        "dead_fraction": (codes[keep] == 0).all(dim=0).double().mean().item(),
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": loss(mean.expand_as(y)),
        "ce_recovered": (zero - spliced) / (zero - clean) if zero > clean else math.nan,
    }


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "opt", "gemma2"])
def test_metrics_equal_an_independent_computation(root, kind, skip):
    target, mean = target_of(root, kind), torch.linspace(-1, 1, WIDTH)
    sae = random_transcoder(skip)
    for lm_batch_size in (3, 20):
        held_out = held_out_of(target, n_tokens=20 * CONTEXT, lm_batch_size=lm_batch_size)
        (ours,) = evaluate(held_out, [sae], mean=mean)
        expected = by_hand(held_out, kind, sae, mean)
        assert ours.values == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)


class Planted(SparseAutoencoder):
    """Predicts what it is told."""

    def decode(self, codes: Tensor, x: Tensor | None = None) -> Tensor:
        return self.metadata["of_x"](x)


def test_the_mlp_itself_recovers_everything_and_zeros_nothing(root):
    target = demo_target(root, **SITES)
    held_out = held_out_of(target, n_tokens=4000)
    mlp, width = copy.deepcopy(target.lm.model.transformer.h[1].mlp), target.site.width
    nothing = (torch.zeros(width, 4), torch.full((4,), -1.0), torch.zeros(4, width))
    planted = [
        Planted(*nothing, torch.zeros(width), metadata={"of_x": of_x}, transcodes=True)
        for of_x in (mlp, torch.zeros_like)
    ]
    with torch.no_grad():
        exact, zero = (
            found.values for found in evaluate(held_out, planted, mean=torch.ones(width))
        )
    assert exact["ce_spliced"] == pytest.approx(exact["ce_clean"], abs=1e-6)
    assert exact["fvu"] == pytest.approx(0, abs=1e-10)
    assert exact["ce_recovered"] == pytest.approx(1, abs=1e-5)
    assert zero["ce_spliced"] == zero["ce_zero"]
    assert zero["ce_recovered"] == pytest.approx(0, abs=1e-9)
    assert exact["ce_zero"] - exact["ce_clean"] > 0.5  # there is something to recover


def cell(arch: str) -> Cell:
    return Cell(3, -8, 1, N_DICT, 0 if arch == "relu" else 4, arch)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("arch", FAMILIES_OF)
def test_saved_transcoders_do_on_raw_activations_what_training_did_on_scaled_ones(
    root, tmp_path, arch, skip
):
    target = target_of(root)
    recipe = recipe_of(target, skip=skip)
    task = recipe.prepare([cell(arch)])
    assert torch.allclose(
        task.ensemble.dictionary(0)["b_dec"],
        recipe.statistics.target.mean * recipe.statistics.target.scale,
    )
    for step in range(100):
        task.ensemble.step_(task.batch_at(step))
    ((row, tensors),) = task.evaluate()
    recipe.save(tmp_path, cell(arch), tensors, row | {"seconds": 1.0})
    sae = load_sae(sae_folder(tmp_path, cell(arch)))
    assert sae.transcodes
    assert (sae.W_skip is not None) == skip
    assert sae.metadata["target_site"] == "mlp_out"
    known, rows = recipe.statistics, recipe.chunks.load(0).float()[:200]
    scales = known.scale, known.target.scale
    assert abs(math.log(scales[0] / scales[1])) > 0.1  # else one for both would not show
    x, _ = scaled(rows, scales)
    codes, y_hat = (t[0].clone() for t in task.ensemble.stacks[0].forward(x))
    raw = rows[:, :WIDTH]
    if FAMILIES[arch].selection != "batchtopk":  # which are saved with a threshold
        assert torch.allclose(sae.encode(raw) * scales[1], codes.T, atol=1e-4)
        assert torch.allclose(sae.decode(sae.encode(raw), raw) * scales[1], y_hat, atol=1e-4)
    else:
        assert row["fvu_trained"] > 0
    for name, value in evaluate_one(sae, recipe).items():
        assert value == pytest.approx(row[name], rel=1e-5, abs=1e-6, nan_ok=True), name
    check_fit(sae, target)
    with pytest.raises(UserError, match="give that site as --target-site"):
        check_fit(sae, tiny_target(root, layer=1, site="mlp_in"))


def test_an_autoencoder_is_no_transcoder(root):
    sae = replace(random_transcoder(False), transcodes=False)
    with pytest.raises(UserError, match="is no transcoder: drop --target-site mlp_out"):
        check_fit(sae, target_of(root))


def test_logits_of_a_feature_are_those_of_its_row_at_the_target(root):
    target = target_of(root)
    collector = FeatureCollector(N_DICT, CONTEXT)
    data = partial(_with_decoder, collector.result())
    at_target = data(random_transcoder(True), target)
    as_autoencoder = data(random_transcoder(True), tiny_target(root, layer=1, site="mlp_out"))
    assert at_target.promoted is not None
    assert (at_target.promoted.index == as_autoencoder.promoted.index).all()
    assert data(random_transcoder(True), tiny_target(root, layer=1, site="mlp_in")).promoted is None


def test_codes_are_those_of_x_and_zero_on_dropped_tokens(root):
    target, sae = target_of(root), random_transcoder(True)
    held_out = held_out_of(target, n_tokens=20 * CONTEXT, lm_batch_size=6)
    limits = (math.inf, 3.0)
    for ids, keep, (codes,) in held_out.codes([sae], max_norm=limits):
        x, y = activations(target.lm, target.site, ids).chunk(2, dim=-1)
        assert torch.equal(keep, keep & (y.norm(dim=2) <= 3.0))
        assert torch.allclose(codes, sae.encode(x) * keep[:, :, None], atol=1e-5)
