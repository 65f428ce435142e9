"""Rows are those of an independent hook, each token once; their mean and scale."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.lm import (
    CONTEXT,
    KINDS,
    SEPARATOR,
    all_rows,
    bits,
    harvester_of,
    hooked,
    tiny_target,
)

from sparse_coding.config import UserError
from sparse_coding.lm import activations
from sparse_coding.lm.activations import Harvester, statistics
from sparse_coding.lm.model import SITES

WIDTH = 40  # of mlp_act
TEXTS_PER_CHUNK = 100  # rows of text: 8 chunks


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(activations, "CHUNK_BYTES", TEXTS_PER_CHUNK * CONTEXT * WIDTH * 2)


@pytest.fixture
def harvester(root) -> Harvester:
    return harvester_of(tiny_target(root))


def by_hand(root: Path, kind: str, layer: int, site: str, *, batch: int) -> torch.Tensor:
    """Activations in float32 of all tokens that count, from whole forward passes."""
    target = tiny_target(root, kind=kind, layer=layer, site=site)
    rows = []
    for first in range(0, target.train.n_rows, batch):
        last = min(first + batch, target.train.n_rows)
        ids = torch.from_numpy(target.train.rows(first, last))
        x, _ = hooked(target.lm, kind, layer, site, ids)
        rows.append(x[:, 1:][ids[:, 1:] != SEPARATOR])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_rows_are_those_of_an_independent_hook_each_token_once(root, monkeypatch, kind, site):
    target = tiny_target(root, kind=kind, layer=2, site=site)
    row_bytes = CONTEXT * target.site.width * 2
    monkeypatch.setattr(activations, "CHUNK_BYTES", TEXTS_PER_CHUNK * row_bytes)
    harvester = harvester_of(target, lm_batch_size=20)
    expected = by_hand(root, kind, 2, site, batch=20)
    rows = all_rows(harvester)
    assert len(harvester.rows) == 8
    assert rows.dtype == torch.float16
    assert rows.shape == expected.shape
    assert bits(rows) == bits(expected.half())
    assert len(bits(rows)) > 0.8 * len(rows)  # so a row missed or taken twice does not hide


def test_a_chunk_has_the_rows_of_its_stretch_of_text_in_a_random_order(root, harvester):
    expected = by_hand(root, "gpt2", 1, "mlp_act", batch=8).half()
    first = 0
    for k, n_rows in enumerate(harvester.rows):
        chunk, stretch = harvester.load(k), expected[first : first + n_rows]
        assert chunk.shape == (n_rows, WIDTH)
        assert torch.equal(chunk, harvester.load(k))
        # compared by value, sorted: forward passes of another shape round differently
        assert torch.allclose(*(t.float().sort(dim=0).values for t in (chunk, stretch)), atol=1e-2)
        unmoved = (chunk.float() - stretch.float()).abs().amax(dim=1) < 1e-2
        assert unmoved.float().mean() < 0.1
        first += n_rows
    assert first == len(expected)


def test_the_forward_passes_batch_size_changes_rounding_only(root):
    one, many = (
        all_rows(harvester_of(tiny_target(root), lm_batch_size=n)).float() for n in (1, 64)
    )
    assert float((one - many).norm() / one.norm()) < 1e-3
    assert float((one - many).abs().max() / one.abs().max()) < 1e-3


def test_only_as_many_chunks_are_made_as_hold_the_wished_tokens(root, harvester):
    target, rows = tiny_target(root), harvester.rows
    ids = target.train.rows(0, target.train.n_rows)
    assert sum(rows) == int((ids[:, 1:] != SEPARATOR).sum())
    assert rows[0] == int((ids[:TEXTS_PER_CHUNK, 1:] != SEPARATOR).sum())
    assert [harvester.span(k) for k in (0, 7)] == [(0, 100), (700, target.train.n_rows)]
    assert harvester_of(target, n_tokens=1).rows == rows[:1]
    assert harvester_of(target, n_tokens=rows[0]).rows == rows[:1]
    assert harvester_of(target, n_tokens=rows[0] + 1).rows == rows[:2]
    assert harvester.n_bytes == sum(rows) * WIDTH * 2


def test_norms_are_those_of_the_stored_rows(harvester):
    rows, norms = harvester.assembled(2, list(harvester.parts(2)))
    assert torch.equal(rows, harvester.load(2))
    assert torch.allclose(norms.double(), rows.double().square().sum(dim=1).sqrt(), rtol=1e-5)


def test_rows_in_bfloat16(root, harvester):
    rows = all_rows(replace(harvester, store_dtype=torch.bfloat16))
    assert rows.dtype == torch.bfloat16
    assert torch.allclose(rows.float(), all_rows(harvester).float(), rtol=2**-7, atol=1e-3)


def test_what_float16_can_not_hold_is_refused_and_bfloat16_can(root):
    target = tiny_target(root, site="resid_post", layer=0)
    with torch.no_grad():
        target.lm.model.transformer.wpe.weight[3] *= 1e6
    with pytest.raises(UserError, match=r"layer 0 resid_post .*--store-dtype bfloat16"):
        harvester_of(target).load(0)
    assert harvester_of(target, store_dtype=torch.bfloat16).load(0).abs().max() > 1e5


# --- statistics ---


class InMemory:
    """Chunks of known rows."""

    def __init__(self, *chunks: torch.Tensor):
        self.chunks, self.rows = chunks, [len(chunk) for chunk in chunks]

    def load(self, k: int) -> torch.Tensor:
        return self.chunks[k]


def test_scaled_rows_have_mean_square_norm_one_and_the_mean_is_theirs(harvester):
    found = statistics(harvester)
    x = all_rows(harvester).numpy().astype(np.float64)
    assert np.allclose(found.mean.numpy(), x.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert ((x * found.scale) ** 2).sum(axis=1).mean() == pytest.approx(1, rel=1e-9)


def test_statistics_are_of_the_first_whole_chunks(monkeypatch):
    monkeypatch.setattr(activations, "STATISTICS_ROWS", 3)
    first, second = torch.tensor([[1.0, 0], [3, 0]]).half(), torch.tensor([[2.0, 6]]).half()
    found = statistics(InMemory(first, second, torch.full((9, 2), 100.0).half()))
    assert found.mean.tolist() == [2, 2]
    assert found.scale == pytest.approx((3 / (1 + 9 + 40)) ** 0.5)


def test_activations_that_are_all_zero_are_refused():
    with pytest.raises(UserError, match="all activations are 0"):
        statistics(InMemory(torch.zeros(5, 3).half()))
