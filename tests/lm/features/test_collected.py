"""What is collected about features: equal to a naive computation, whatever the batches."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_coding.config import UserError
from sparse_coding.lm.features.collected import (
    N_BINS,
    Contexts,
    FeatureCollector,
    FeatureData,
    logit_effects,
    nearest_features,
)

N_DICT, LENGTH, N_ROWS = 7, 12, 40
DEAD, DENSE = 5, 6
OPTIONS = dict(n_top=3, n_sampled=4, n_before=4, n_after=2)


def make_text() -> tuple[Tensor, Tensor]:
    """tokens (40, 12) and codes (40, 12, 7): one dead feature, one always on; position 0 is 0."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (N_ROWS, LENGTH), generator=rng)
    codes = torch.randn(N_ROWS, LENGTH, N_DICT, generator=rng).sub(1).relu() * 10
    codes[..., DEAD] = 0
    codes[..., DENSE] += 0.25
    codes[:, 0] = 0
    return tokens, codes


def collect(tokens: Tensor, codes: Tensor, *, cuts: tuple[int, ...] = (), **options) -> FeatureData:
    collector = FeatureCollector(codes.shape[2], codes.shape[1], **(OPTIONS | options))
    parts = zip(tokens.tensor_split(cuts), codes.tensor_split(cuts), strict=True)
    for some_tokens, some_codes in parts:
        collector.add(some_tokens, some_codes)
    return collector.result()


def arrays_of(data: FeatureData) -> dict[str, np.ndarray]:
    """Every array by a name, for comparisons."""
    arrays = {}
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if isinstance(value, Contexts):
            arrays |= {f"{field.name}.{name}": array for name, array in value._asdict().items()}
        elif value is not None:
            arrays[field.name] = np.asarray(value)
    return arrays


def places(contexts: Contexts, data: FeatureData, feature: int, tokens: Tensor) -> list[tuple]:
    """(row of the text, position) of each context of the feature."""
    n = contexts.n_filled[feature]
    rows = [data.tokens[row].tolist() for row in contexts.row[feature, :n]]
    text = tokens.tolist()
    return list(zip(map(text.index, rows), contexts.position[feature, :n].tolist(), strict=True))


def test_counts_and_maxima_equal_a_naive_computation():
    tokens, codes = make_text()
    data = collect(tokens, codes, cuts=(10, 25))
    assert data.n_tokens == N_ROWS * LENGTH
    assert data.n_active.tolist() == (codes > 0).sum(dim=(0, 1)).tolist()
    assert data.max_activation.tolist() == codes.amax(dim=(0, 1)).tolist()
    assert data.n_active[DENSE] / data.n_tokens == (LENGTH - 1) / LENGTH
    assert data.n_active[DEAD] == data.max_activation[DEAD] == 0


def test_tokens_that_do_not_count_are_left_out_of_the_density():
    tokens, codes = make_text()
    collector = FeatureCollector(N_DICT, LENGTH, **OPTIONS)
    collector.add(tokens, codes, torch.arange(LENGTH).expand(N_ROWS, -1) > 0)
    data = collector.result()
    assert data.n_active[DENSE] == data.n_tokens


def test_the_histogram_counts_every_code_in_its_bin():
    tokens, codes = make_text()
    data = collect(tokens, codes, cuts=(1, 2, 30))
    for feature in range(N_DICT):
        values = codes[..., feature][codes[..., feature] > 0].double().numpy()
        edges = np.arange(N_BINS + 1) * data.bin_width[feature]
        assert data.histogram[feature].tolist() == np.histogram(values, edges)[0].tolist()
        assert data.histogram[feature].sum() == data.n_active[feature]
        if feature != DEAD:
            assert edges[-1] / 2 <= values.max() < edges[-1]  # half of the bins or more in use


def test_the_top_contexts_are_the_strongest_token_of_each_of_the_strongest_rows():
    tokens, codes = make_text()
    data = collect(tokens, codes, cuts=(7, 8))
    for feature in range(N_DICT):
        strongest = [
            (-float(codes[row, :, feature].max()), row, int(codes[row, :, feature].argmax()))
            for row in range(N_ROWS)
            if codes[row, :, feature].any()
        ]
        expected = [(row, position) for _, row, position in sorted(strongest)[:3]]
        assert places(data.top, data, feature, tokens) == expected


def test_a_context_has_the_codes_around_its_token_and_zeros_outside_its_row():
    tokens, codes = make_text()
    data = collect(tokens, codes, cuts=(7, 8))
    for contexts in (data.top, data.sampled):
        for feature in range(N_DICT):
            for i, (row, position) in enumerate(places(contexts, data, feature, tokens)):
                expected = [
                    float(codes[row, p, feature]) if 0 <= p < LENGTH else 0
                    for p in range(position - 4, position + 3)
                ]
                assert contexts.codes[feature, i].tolist() == expected


def test_sampled_contexts_are_active_and_from_other_rows_than_the_top():
    tokens, codes = make_text()
    data = collect(tokens, codes)
    for feature in range(N_DICT):
        sampled = places(data.sampled, data, feature, tokens)
        top_rows = {row for row, _ in places(data.top, data, feature, tokens)}
        rows = [row for row, _ in sampled]
        assert len(rows) == (0 if feature == DEAD else 4)
        assert len(set(rows)) == len(rows)
        assert top_rows.isdisjoint(rows)
        strengths = [float(codes[row, position, feature]) for row, position in sampled]
        assert all(strength > 0 for strength in strengths)
        assert strengths == sorted(strengths, reverse=True)


def test_sampling_is_uniform_over_active_tokens():
    # 4000 features that are on in the same 60 of 600 one-token rows: each row is drawn by 8 / 60.
    codes = torch.zeros(600, 1, 4000)
    codes[::10] = 1
    tokens = torch.arange(600)[:, None]
    data = collect(tokens, codes, n_top=0, n_sampled=8, cuts=(100, 300))
    drawn = np.bincount(data.tokens[data.sampled.row.ravel(), 0], minlength=600)
    assert drawn.sum() == drawn[::10].sum() == 8 * 4000
    # binomial: mean 533, standard deviation 21.5; five of them
    assert abs(drawn[::10] - 4000 * 8 / 60).max() < 5 * 21.5


@pytest.mark.parametrize("cuts", [(1,), (20,), tuple(range(1, 40)), (0, 3, 3, 39)])
def test_the_result_does_not_depend_on_the_batches(cuts):
    whole, cut = (arrays_of(collect(*make_text(), cuts=c)) for c in ((), cuts))
    assert {name for name, array in whole.items() if not np.array_equal(array, cut[name])} == set()


def test_of_equal_activations_the_earlier_text_is_shown():
    codes = torch.ones(9, 5, 1)
    tokens = torch.arange(45).reshape(9, 5)
    for cuts in ((), (1, 5), (8,)):
        data = collect(tokens, codes, cuts=cuts)
        assert places(data.top, data, 0, tokens) == [(0, 0), (1, 0), (2, 0)]


def test_a_planted_feature_shows_the_contexts_of_its_token():
    tokens, codes = make_text()
    codes[..., 2] = (tokens == 17) * (1 + torch.arange(N_ROWS)[:, None] / 100)
    data = collect(tokens, codes, cuts=(20,))
    shown = data.tokens[data.top.row[2], data.top.position[2]]
    assert shown.tolist() == [17] * 3
    rows = (tokens == 17).any(dim=1).nonzero().squeeze(1).tolist()
    assert [row for row, _ in places(data.top, data, 2, tokens)] == rows[::-1][:3]


def test_only_rows_that_a_context_lies_in_are_kept():
    codes = torch.zeros(5000, 4, 2)
    codes[10, 2, 0], codes[4900, 1, 1] = 1, 2
    tokens = torch.arange(20000).reshape(5000, 4)
    data = collect(tokens, codes, cuts=tuple(range(100, 5000, 100)))
    assert data.tokens.tolist() == [[40, 41, 42, 43], [19600, 19601, 19602, 19603]]
    assert data.tokens[data.top.row[1, 0], data.top.position[1, 0]] == 19601


def test_no_text_and_a_dead_dictionary_are_no_errors():
    data = collect(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4))
    assert data.n_active.tolist() == [0] * 4
    assert data.tokens.shape == (0, 3)
    assert FeatureCollector(4, 3).result().n_tokens == 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_codes_that_cannot_be_are_refused(value):
    codes = torch.zeros(2, 3, 4)
    codes[1, 1, 1] = value
    with pytest.raises(UserError, match="negative or not finite"):
        FeatureCollector(4, 3).add(torch.zeros(2, 3, dtype=torch.int64), codes)


def test_half_precision_codes_are_taken_as_they_are():
    tokens, codes = make_text()
    half = arrays_of(collect(tokens, codes.bfloat16()))
    full = arrays_of(collect(tokens, codes.bfloat16().float()))
    assert all(np.array_equal(half[name], full[name]) for name in full)


def test_nearest_features_are_ranked_by_cosine_whatever_their_length():
    W_dec = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0], [-3.0, 0.0]])
    nearest = nearest_features(W_dec, n=2)
    assert nearest.index[0].tolist() == [1, 2]
    np.testing.assert_allclose(nearest.value[0], [0.5**0.5, 0], atol=1e-6)
    assert nearest.index[3].tolist() == [2, 1]
    np.testing.assert_allclose(nearest.value[3], [0, -(0.5**0.5)], atol=1e-6)


def test_nearest_features_of_many_equal_those_of_one_matrix_product():
    W_dec = torch.randn(2100, 8, generator=torch.Generator().manual_seed(1))  # three chunks
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T - 9 * torch.eye(2100)).topk(5).values
    np.testing.assert_allclose(nearest_features(W_dec).value, expected, atol=1e-6)
    assert nearest_features(W_dec[:1]).index.shape == (1, 0)


def test_logit_effects_are_ranked():
    unembedding = torch.tensor([[-2.0, -1], [-1, -1], [3, 2], [0, 0]])
    directions = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    promoted, suppressed = logit_effects(directions, lambda d: d @ unembedding.T, n=2)
    assert promoted.index[0].tolist() == [2, 3]
    assert promoted.value[0].tolist() == [3, 0]
    assert suppressed.index[0].tolist() == [0, 1]
    assert suppressed.value[0].tolist() == [-2, -1]
    assert set(promoted.index[1].tolist()) == {0, 1}
    assert suppressed.value[1].tolist() == [-4, 0]
    assert logit_effects(directions, lambda d: d @ unembedding.T, n=9)[0].index.shape == (2, 4)
    assert logit_effects(directions, lambda d: None) is None
