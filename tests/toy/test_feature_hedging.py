"""Feature hedging (Chanin, Dulka, Garriga-Alonso 2025, https://arxiv.org/abs/2505.11756): an
autoencoder too narrow for all features mixes correlated ones into the rows that it has."""

import pytest
import torch

from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
from sparse_coding.toy.synth_stream import SynthStream
from sparse_coding.toy.synth_world import FARTHEST, SynthWorld

CPU, WIDTH = torch.device("cpu"), 50
P, OF_CHILD = 0.25, 0.2  # how often the first feature is on, and the second one, given that it may


def world(*, hierarchical: bool) -> SynthWorld:
    """Two orthogonal features of magnitude 1."""
    p = torch.tensor([P, OF_CHILD])
    threshold = -torch.special.ndtri(p)
    assert threshold.abs().max() < FARTHEST
    return SynthWorld(
        features=torch.eye(WIDTH)[:2],
        bias=torch.zeros(WIDTH),
        parent=torch.tensor([-1, 0 if hierarchical else -1], dtype=torch.int32),
        probability=p,
        threshold=threshold,
        loadings=torch.zeros(2, 1),
        diagonal=torch.ones(2),
        mean=torch.ones(2),
        std=torch.zeros(2),
    )


@pytest.mark.parametrize(("hierarchical", "mixed"), [(False, 0.0), (True, 0.236)])
def test_one_row_for_two_features_holds_the_child_only_where_there_is_a_hierarchy(
    hierarchical, mixed
):
    """Where the parent is on, second moments are (1, .2; .2, .2) of a child that needs it: their
    first eigenvector is parent + .236 · child. Of one that does not, b_dec takes the mean, and the
    first eigenvector of (1, 0; 0, .16) is the parent."""
    stream = SynthStream(world(hierarchical=hierarchical), batch_size=512, batch_seed=0, device=CPU)
    ensemble = Ensemble(
        [SAESpec(1, 1e-4, seed, tied=True) for seed in range(4)],
        WIDTH, lr=3e-3, device=CPU, b_dec=torch.zeros(WIDTH), project=True,
    )  # fmt: skip
    for step in range(2500):
        ensemble.step_(stream.batch(step))
    rows = [ensemble.dictionary(i)["W_dec"][0] for i in range(4)]
    found = [row for row in rows if row[0] > 0.9]  # others started on the child's side
    assert found
    for row in found:
        assert float(row[1] / row[0]) == pytest.approx(mixed, abs=0.03)
        assert float(row[2:].norm()) < 0.02
