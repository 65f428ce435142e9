"""The split of a corpus by documents, and its packing into rows of one context each."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from sparse_coding.config import named_seed, require
from sparse_coding.lm.corpus import Corpus
from sparse_coding.lm.documents import is_held_out


def split(corpus: Corpus, *, held_out_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held out): indices of documents, each in an order of its own by the seed.

    On which side a document is depends on its content alone, not on the seed or other documents.

    Raises:
        UserError: a side is empty.
    """
    is_out = np.fromiter((is_held_out(int(i), held_out_share) for i in corpus.ids), dtype=bool)
    sides = np.flatnonzero(~is_out), np.flatnonzero(is_out)
    for side, name in zip(sides, ("training", "evaluation"), strict=True):
        require(
            len(side) > 0,
            f"of {len(is_out)} documents, none is left for {name} at a held-out share of "
            f"{held_out_share}: choose another share or a --dataset of more documents",
        )
    rng = np.random.default_rng(named_seed(seed, "order of documents"))
    return rng.permutation(sides[0]), rng.permutation(sides[1])


class Packed:
    """Documents of a corpus as rows of `context_length` ids.

    Packed: cut from the endless text separator, document, separator, document, ..., as GPT-2 was
    trained; the last, incomplete row is left out. Documents: each row is the start of one document,
    after a separator; shorter documents are left out. Either way a row depends on nothing but the
    arguments, and only the rows asked for are in memory.

    Args:
        documents: (n,) indices into the corpus, in the order to be packed
        separator: None: nothing is put before a document
        special_ids: tokens that `keep` leaves out
        first: put at position 0 of each row, in place of a token of text (packed) or of the
            separator (documents); None: nothing is
    Attributes:
        n_rows: number of rows
        n_short: documents left out
    Raises:
        UserError: not one row.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        documents: np.ndarray,
        context_length: int,
        separator: int | None,
        packing: Literal["packed", "documents"],
        special_ids: frozenset[int] = frozenset(),
        first: int | None = None,
    ):
        self.corpus, self.context_length, self.separator = corpus, context_length, separator
        self.special_ids = np.array(sorted(special_ids), dtype=np.int64)
        self.first = first
        self.stride = context_length - (first is not None)  # tokens of the endless text in a row
        by_first = packing == "documents" and first is not None
        self.lead = int(separator is not None and not by_first)  # tokens put before each document
        lengths = corpus.lengths[documents] + self.lead
        self.n_short = 0
        if packing == "documents":
            fits = lengths >= self.stride
            self.n_short = int((~fits).sum())
            documents, lengths = documents[fits], np.full(fits.sum(), self.stride)
        self.documents = documents
        self.ends = np.cumsum(lengths)  # in the endless text
        self.starts = self.ends - lengths
        available = int(self.ends[-1]) if len(documents) else 0
        self.n_rows = available // self.stride
        what = "every document is shorter" if self.n_short else f"all have {available} tokens"
        require(
            self.n_rows > 0,
            f"{len(documents) + self.n_short} documents give not one context of {context_length} "
            f"tokens ({what}): choose a --dataset of more text or a shorter --context-length",
        )

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, context_length) int64: the ids of these rows."""
        position = np.arange(start * self.stride, self._end(stop))  # in the endless text
        document = np.searchsorted(self.ends, position, side="right")
        within = position - self.starts[document] - self.lead  # -1: the separator
        ids = self.corpus[self.corpus.offsets[self.documents[document]] + np.maximum(within, 0)]
        ids = ids.astype(np.int64)
        ids[within < 0] = -1 if self.separator is None else self.separator
        rows = ids.reshape(-1, self.stride)
        return rows if self.first is None else np.insert(rows, 0, self.first, axis=1)

    def keep(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, context_length) bool: see keep_of."""
        return self.keep_of(self.rows(start, stop))

    def keep_of(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens of rows count: not position 0, whose activations are unlike all others, nor
        the special ids."""
        keep = ~np.isin(rows, self.special_ids)
        keep[:, 0] = False
        return keep

    def batches(
        self, start: int, stop: int, *, size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, keep) of these rows, `size` rows at a time: see rows and keep_of."""
        for first in range(start, stop, size):
            ids = self.rows(first, min(first + size, stop))
            yield ids, self.keep_of(ids)

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """Sorted ids of the documents of which these rows have a token or the separator before."""
        first, last = np.searchsorted(
            self.ends, (start * self.stride, self._end(stop) - 1), side="right"
        )
        return np.unique(self.corpus.ids[self.documents[first : last + 1]])

    def _end(self, stop: int) -> int:
        if stop > self.n_rows:
            raise IndexError(f"row {stop} of {self.n_rows}")
        return stop * self.stride
