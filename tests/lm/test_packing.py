"""Rows are what a plain concatenation gives, and no document is on both sides of the split."""

from pathlib import Path

import numpy as np
import pytest

from sparse_coding.config import UserError
from sparse_coding.lm.corpus import Corpus
from sparse_coding.lm.packing import Packed, split

SEP = 99


def corpus_of(folder: Path, documents: list[list[int]], *, ids: list[int] | None = None) -> Corpus:
    """A corpus of these documents, with other tokens between them."""
    tokens, index = [], []
    for number, document in enumerate(documents):
        tokens += [7777]
        index.append((len(tokens), len(document), ids[number] if ids else number))
        tokens += document
    np.array(tokens, dtype=np.uint16).tofile(folder / "tokens.bin")
    mapped = np.memmap(folder / "tokens.bin", np.uint16, mode="r")
    return Corpus(mapped, np.array(index, dtype=np.int64), {})


def packed(corpus: Corpus, order: list[int], length: int, **options) -> Packed:
    options = dict(separator=SEP, packing="packed") | options
    return Packed(corpus, documents=np.array(order, dtype=int), context_length=length, **options)


@pytest.fixture
def three(tmp_path) -> Corpus:
    return corpus_of(tmp_path, [[1, 2, 3], [4], [5, 6, 7, 8, 9]], ids=[30, 10, 20])


def test_rows_are_cut_from_separator_document_separator_document(three):
    rows = packed(three, [2, 0, 1], 4)
    assert rows.n_rows == 3
    assert rows.rows(0, 3).tolist() == [[SEP, 5, 6, 7], [8, 9, SEP, 1], [2, 3, SEP, 4]]
    assert rows.rows(0, 3).dtype == np.int64
    assert packed(three, [2, 0, 1], 5).rows(0, 2).tolist() == [[SEP, 5, 6, 7, 8], [9, SEP, 1, 2, 3]]


def test_without_a_separator_documents_touch(three):
    rows = packed(three, [0, 1, 2], 4, separator=None)
    assert rows.rows(0, rows.n_rows).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_one_document_per_row_drops_and_counts_the_short_ones(three):
    rows = packed(three, [2, 1, 0], 4, packing="documents")
    assert rows.rows(0, 2).tolist() == [[SEP, 5, 6, 7], [SEP, 1, 2, 3]]
    assert (rows.n_rows, rows.n_short) == (2, 1)
    bare = packed(three, [2, 1, 0], 4, packing="documents", separator=None)
    assert bare.rows(0, 1).tolist() == [[5, 6, 7, 8]]
    assert (bare.n_rows, bare.n_short) == (1, 2)


def test_a_first_token_stands_before_the_same_endless_text(three):
    rows = packed(three, [2, 0, 1], 4, first=55)
    assert rows.rows(0, rows.n_rows).tolist() == [
        [55, SEP, 5, 6],
        [55, 7, 8, 9],
        [55, SEP, 1, 2],
        [55, 3, SEP, 4],
    ]
    assert not rows.keep(0, 4)[:, 0].any()
    assert rows.document_ids(1, 3).tolist() == [20, 30]
    starts = packed(three, [2, 1, 0], 4, first=55, packing="documents")
    assert starts.rows(0, 2).tolist() == [[55, 5, 6, 7], [55, 1, 2, 3]]


@pytest.mark.parametrize("separator", [None, SEP])
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_rows_equal_a_naive_concatenation_however_they_are_asked_for(tmp_path, separator, length):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 90, size=n).tolist() for n in rng.integers(1, 40, size=50)]
    order = rng.permutation(50)[:40].tolist()
    lead = [] if separator is None else [separator]
    text = [i for d in order for i in lead + documents[d]]
    origin = [d for d in order for _ in lead + documents[d]]
    n = len(text) // length
    rows = packed(corpus_of(tmp_path, documents), order, length, separator=separator)
    assert rows.n_rows == n
    expected = np.array(text[: n * length]).reshape(n, length)
    assert (rows.rows(0, n) == expected).all()
    for start in range(0, n, 3):
        stop = min(start + 3, n)
        assert (rows.rows(start, stop) == expected[start:stop]).all()
        touched = sorted(set(origin[start * length : stop * length]))
        assert rows.document_ids(start, stop).tolist() == touched


def test_document_ids_are_the_documents_own(three):
    rows = packed(three, [2, 0, 1], 4)
    assert rows.document_ids(0, 1).tolist() == [20]
    assert rows.document_ids(1, 2).tolist() == [20, 30]
    assert rows.document_ids(0, 3).tolist() == [10, 20, 30]


def test_position_0_and_special_ids_are_not_kept(three):
    rows = packed(three, [2, 0, 1], 4, special_ids=frozenset({SEP, 4}))
    expected = [[0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]]
    assert rows.keep(0, 3).astype(int).tolist() == expected
    assert rows.keep_of(rows.rows(1, 2)).astype(int).tolist() == expected[1:2]


def test_rows_beyond_the_last_are_an_error(three):
    with pytest.raises(IndexError):
        packed(three, [0, 1, 2], 4).rows(2, 4)
    with pytest.raises(IndexError):
        packed(three, [0, 1, 2], 4).document_ids(2, 4)


def test_no_rows_are_no_rows(three):
    rows = packed(three, [0, 1, 2], 4)
    assert rows.rows(1, 1).shape == rows.keep(1, 1).shape == (0, 4)
    assert rows.document_ids(1, 1).tolist() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"not one context of 13 tokens \(all have 12 tokens\)"),
        ({"packing": "documents"}, "every document is shorter"),
    ],
)
def test_a_text_smaller_than_one_context_is_refused(three, options, message):
    assert packed(three, [0, 1, 2], 12).n_rows == 1
    with pytest.raises(UserError, match=message):
        packed(three, [0, 1, 2], 13, **options)


def test_the_sides_are_disjoint_complete_and_of_the_share_asked_for(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**63, size=2000).tolist()
    corpus = corpus_of(tmp_path, [[1]] * 2000, ids=ids)
    train, held_out = split(corpus, held_out_share=0.1, seed=0)
    assert sorted([*train, *held_out]) == list(range(2000))
    assert 200 - 4 * 13.4 < len(held_out) < 200 + 4 * 13.4  # binomial, 4 standard deviations
    assert train.tolist() != sorted(train)
    assert held_out.tolist() != sorted(held_out)


def test_the_seed_orders_the_documents_and_moves_none_to_the_other_side(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**63, size=300).tolist()
    corpus = corpus_of(tmp_path, [[1]] * 300, ids=ids)
    (a, a_out), (b, b_out) = (split(corpus, held_out_share=0.2, seed=s) for s in (0, 1))
    assert a.tolist() != b.tolist()
    assert (set(a), set(a_out)) == (set(b), set(b_out))
    again, _ = split(corpus, held_out_share=0.2, seed=0)
    assert again.tolist() == a.tolist()


@pytest.mark.parametrize(("share", "side"), [(0.0, "evaluation"), (1.0, "training")])
def test_an_empty_side_is_an_error(three, share, side):
    with pytest.raises(UserError, match=f"of 3 documents, none is left for {side}"):
        split(three, held_out_share=share, seed=0)
