"""Metrics equal a few lines written independently; planted autoencoders score what they must."""

import io
import math
import sys
from dataclasses import replace

import pytest
import torch
from builders.lm import (
    CONTEXT,
    KINDS,
    SEPARATOR,
    codes_of,
    demo_target,
    held_out_of,
    massive_,
    metrics_by_hand,
    tiny_target,
)
from builders.models import CONFIGS, VOCAB, hooked, random_model

from sparse_coding.lm.evaluation import HeldOut, computed_once, evaluate
from sparse_coding.lm.model import SITES, find_site, load_language_model, logits
from sparse_coding.sae.saved import SparseAutoencoder

N_DICT, N_DEAD, N_TOKENS = 24, 5, 20 * CONTEXT
METRICS = ["fvu", "l0", "mse", "dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_mean",
           "ce_recovered"]  # fmt: skip


def random_sae(width: int, seed: int = 0) -> SparseAutoencoder:
    """With some features that never fire."""
    rng = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(s, generator=rng) for s in ((width, N_DICT), (N_DICT, width)))
    b_enc, b_dec = (torch.randn(n, generator=rng) for n in (N_DICT, width))
    b_enc[:N_DEAD] = -1e6
    return SparseAutoencoder(W_enc, b_enc - 3, 0.1 * W_dec, 0.3 * b_dec, metadata={})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_metrics_equal_an_independent_computation_for_two_batch_sizes(root, kind, site):
    target = tiny_target(root, kind=kind, layer=1, site=site)
    sae = random_sae(target.site.width)
    mean = torch.linspace(-1, 1, target.site.width)
    expected = metrics_by_hand(held_out_of(target, n_tokens=N_TOKENS), kind, sae, mean)
    density = expected.pop("density")
    assert N_DEAD / N_DICT <= expected["dead_fraction"] < 1  # the planted ones, not all
    for lm_batch_size in (3, 20):
        held_out = held_out_of(target, n_tokens=N_TOKENS, lm_batch_size=lm_batch_size)
        (ours,) = evaluate(held_out, [sae], mean=mean)
        assert list(ours.values) == METRICS
        assert ours.values == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
        assert torch.allclose(ours.density.double(), density, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_up_to_the_site_are_computed_once_to_the_same_bits(kind, tmp_path):
    random_model(kind).save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path), device=torch.device("cpu"))
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    ways = [None, torch.zeros_like, torch.clone, lambda x: 2 * x]
    for site in (find_site(lm, i, name) for i in range(lm.n_layers) for name in SITES):
        expected = [logits(lm, ids, site=site, replace=way) for way in ways]
        with computed_once(lm, site):
            got = [logits(lm, ids, site=site, replace=way) for way in ways]
            n_same = site.layer + (site.name == "resid_post")
            by_itself = ["forward" not in vars(layer) for layer in lm.layers]
            assert by_itself == [i >= n_same for i in range(lm.n_layers)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert torch.equal(logits(lm, ids), expected[0])  # nothing is left behind


def test_massive_activations_are_left_out_and_left_alone(root):
    target = massive_(tiny_target(root, site="resid_post"))
    held_out = held_out_of(target, n_tokens=N_TOKENS)
    ids = torch.from_numpy(held_out.text.rows(0, held_out.n_rows))
    norms = hooked(target.lm.model, "gpt2", 1, "resid_post", ids)[0].norm(dim=2)
    keep = torch.cat([keep for _, keep in held_out.batches()])
    max_norm = 10 * norms[keep].median().item()
    n_beyond = int((norms[keep] > max_norm).sum())
    assert 0 < n_beyond < 0.1 * held_out.n_kept
    sae, mean = random_sae(16), torch.linspace(-1, 1, 16)
    expected = metrics_by_hand(held_out, "gpt2", sae, mean, max_norm=max_norm)
    density = expected.pop("density")
    (ours,) = evaluate(held_out, [sae], mean=mean, max_norm=max_norm)
    assert ours.n_left_out == n_beyond
    assert ours.values == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    assert torch.allclose(ours.density.double(), density, atol=1e-6)
    (all_of_them,) = evaluate(held_out, [sae], mean=mean)
    assert all_of_them.n_left_out == 0
    assert all_of_them.values["ce_zero"] != pytest.approx(ours.values["ce_zero"], rel=1e-3)

    beyond = norms > max_norm
    _, counted, codes = codes_of(held_out, sae, max_norm=max_norm)
    assert torch.equal(counted, keep & ~beyond)
    assert not codes[beyond].any()


def test_an_autoencoders_values_do_not_depend_on_the_others(root):
    held_out = held_out_of(tiny_target(root), n_tokens=N_TOKENS)
    saes, mean = [random_sae(40, seed) for seed in (0, 1)], torch.ones(40)
    together = evaluate(held_out, saes, mean=mean)
    for sae, one in zip(saes, together, strict=True):
        (alone,) = evaluate(held_out, [sae], mean=mean)
        assert alone.values == pytest.approx(one.values, rel=1e-9, nan_ok=True)
        assert torch.equal(alone.density, one.density)
    assert together[0].values["fvu"] != pytest.approx(together[1].values["fvu"], rel=1e-3)


def test_tokens_are_rounded_up_to_rows_and_never_exceed_the_text(root):
    target = tiny_target(root)
    held_out = held_out_of(target, n_tokens=5 * CONTEXT + 1, lm_batch_size=4)
    assert held_out.n_rows == 6
    batches = list(held_out.batches())
    assert [len(ids) for ids, _ in batches] == [4, 2]
    ids, keep = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(ids, torch.from_numpy(target.held_out.rows(0, 6)))
    assert torch.equal(keep[:, 1:], ids[:, 1:] != SEPARATOR)
    assert not keep[:, 0].any()
    assert held_out.n_kept == int(keep.sum())
    assert held_out_of(target, n_tokens=10**9).n_rows == target.held_out.n_rows


def test_the_tokens_used_are_counted_and_a_text_that_has_fewer_is_said(root):
    target = tiny_target(root)
    enough = held_out_of(target, n_tokens=5 * CONTEXT + 1)
    assert (enough.n_read, enough.shortage()) == (6 * CONTEXT, "")
    available = target.held_out.n_rows * CONTEXT
    less = held_out_of(target, n_tokens=available + 1)
    assert less.n_read == available
    asked = f"{available + 1:,} held-out tokens requested, {available:,} available"
    assert less.shortage() == asked + "\n"


@pytest.mark.parametrize(("shown_after_s", "shown"), [(0.0, True), (60.0, False)])
def test_what_takes_long_shows_how_long_it_takes(root, shown_after_s, shown, monkeypatch):
    held_out = held_out_of(tiny_target(root), n_tokens=N_TOKENS, lm_batch_size=3)
    sae, screen = random_sae(40), io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("sparse_coding.config.PASSING_S", shown_after_s)
    evaluate(held_out, [sae], mean=torch.ones(40))
    assert ("evaluation:   0%" in screen.getvalue()) is shown
    for _ in held_out.codes([sae]):
        pass
    assert ("features:   0%" in screen.getvalue()) is shown
    assert screen.getvalue().count("0/7 [") == 2 * shown


def test_codes_are_those_of_the_activations_and_zero_on_dropped_tokens(root):
    held_out = held_out_of(tiny_target(root), n_tokens=N_TOKENS, lm_batch_size=6)
    sae = random_sae(40)
    ids, keep, codes = codes_of(held_out, sae)
    x, _ = hooked(held_out.lm.model, "gpt2", 1, "mlp_act", ids)
    by_hand = torch.clamp((x - sae.b_dec) @ sae.W_enc + sae.b_enc, min=0)
    assert by_hand[~keep].any()
    assert not codes[~keep].any()
    assert torch.allclose(codes[keep], by_hand[keep], atol=1e-3, rtol=1e-4)
    assert codes.shape == (20, CONTEXT, N_DICT)


def test_a_model_in_bfloat16_gives_nearly_the_same(root):
    sae, mean = random_sae(40), torch.ones(40)
    exact, rough = (
        evaluate(held_out_of(tiny_target(root, dtype=d), n_tokens=N_TOKENS), [sae], mean=mean)[0]
        for d in ("float32", "bfloat16")
    )
    for name in ("fvu", "l0", "mse", "ce_clean", "ce_spliced", "ce_zero", "ce_mean"):
        assert rough.values[name] == pytest.approx(exact.values[name], rel=0.05), name
        assert rough.values[name] != exact.values[name], name


# --- planted autoencoders, on a model that has learned something ---


@pytest.fixture(scope="module")
def learned(root) -> HeldOut:
    return held_out_of(demo_target(root), n_tokens=4000)


@pytest.fixture(scope="module")
def x(learned) -> torch.Tensor:
    """Activations of the kept tokens."""
    ids = torch.from_numpy(learned.text.rows(0, learned.n_rows))
    keep = torch.from_numpy(learned.text.keep(0, learned.n_rows))
    return hooked(learned.lm.model, "gpt2", 1, "mlp_act", ids)[0][keep]


def dead_sae(b_dec: torch.Tensor) -> SparseAutoencoder:
    """Predicts b_dec whatever comes in."""
    W_dec = torch.nn.functional.normalize(torch.ones(4, len(b_dec)), dim=1)
    return SparseAutoencoder(W_dec.T, torch.full((4,), -1e9), W_dec, b_dec, metadata={})


def test_the_identity_recovers_everything(learned, x):
    width = learned.site.width
    one = torch.eye(width)
    b_enc, b_dec = torch.zeros(2 * width), torch.zeros(width)
    identity = SparseAutoencoder(torch.cat([one, -one], 1), b_enc, torch.cat([one, -one]), b_dec,
                                 metadata={})  # fmt: skip
    values = evaluate(learned, [identity], mean=b_dec)[0].values
    assert values["ce_recovered"] == pytest.approx(1, abs=1e-6)
    assert values["fvu"] == pytest.approx(0, abs=1e-12)
    assert values["ce_spliced"] == pytest.approx(values["ce_clean"], abs=1e-6)
    assert values["l0"] == pytest.approx((x != 0).sum(dim=1).double().mean().item())
    assert values["ce_zero"] - values["ce_clean"] > 0.5  # there is something to recover


def test_the_mean_explains_nothing_and_costs_what_mean_ablation_costs(learned, x):
    mean = x.double().mean(dim=0).float()
    values = evaluate(learned, [dead_sae(mean)], mean=mean)[0].values
    assert values["fvu"] == pytest.approx(1, abs=1e-6)
    assert values["ce_spliced"] == pytest.approx(values["ce_mean"], abs=1e-9)
    assert (values["l0"], values["dead_fraction"]) == (0, 1)
    assert 0 < values["ce_recovered"] < 1
    assert values["ce_clean"] < values["ce_mean"] < values["ce_zero"]


def test_zero_recovers_nothing(learned, x):
    width = learned.site.width
    values = evaluate(learned, [dead_sae(torch.zeros(width))], mean=torch.ones(width))[0].values
    assert values["ce_recovered"] == pytest.approx(0, abs=1e-9)
    assert values["ce_spliced"] == values["ce_zero"] != values["ce_mean"]
    second_moment = x.double().square().sum().item()
    variance = (x - x.mean(dim=0)).double().square().sum().item()
    assert values["fvu"] == pytest.approx(second_moment / variance, rel=1e-4)


def test_where_ablation_costs_nothing_ce_recovered_has_no_value(root):
    target = tiny_target(root)
    with torch.no_grad():
        target.lm.model.transformer.h[1].mlp.c_proj.weight.zero_()
    held_out = replace(held_out_of(target), n_tokens=N_TOKENS)
    values = evaluate(held_out, [random_sae(40)], mean=torch.ones(40))[0].values
    assert math.isnan(values["ce_recovered"])
    assert values["ce_zero"] == values["ce_clean"]
