"""What the features of an autoencoder respond to, collected from its codes.

    collector = FeatureCollector(n_dict, context_length)
    for tokens, codes in batches:
        collector.add(tokens, codes)
    data = replace(collector.result(), nearest=nearest_features(W_dec))

One pass over the text; memory does not grow with it. Nothing depends on how the rows were cut into
batches. page.py shows the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.config import require

N_BINS = 64  # of a histogram, linear from 0 to the power of two above the feature's maximum


class Ranked(NamedTuple):
    """For each feature the n best of something (features, tokens), best first."""

    index: np.ndarray  # (n_dict, n) integers
    value: np.ndarray  # (n_dict, n)


class Contexts(NamedTuple):
    """For each feature up to n places in the text, each with the codes around it."""

    n_filled: np.ndarray  # (n_dict,): places beyond it are zeros
    row: np.ndarray  # (n_dict, n) into FeatureData.tokens
    position: np.ndarray  # (n_dict, n) of the chosen token in its row
    codes: np.ndarray  # (n_dict, n, n_before + 1 + n_after), 0 where the row has no token


@dataclass(frozen=True)
class FeatureData:
    """What the page shows, as numpy arrays."""

    n_tokens: int  # that were looked at
    n_active: np.ndarray  # (n_dict,) tokens on which the feature's code is not 0
    max_activation: np.ndarray  # (n_dict,)
    histogram: np.ndarray  # (n_dict, N_BINS) counts of the codes that are not 0
    bin_width: np.ndarray  # (n_dict,) bin i is [i, i + 1) * bin_width
    tokens: np.ndarray  # (n_rows, context_length), the rows that a context lies in
    n_before: int  # tokens of a context before the chosen one
    top: Contexts  # strongest first
    sampled: Contexts  # strongest first
    nearest: Ranked | None = None  # features, by cosine similarity of decoder rows
    promoted: Ranked | None = None  # tokens and their logits
    suppressed: Ranked | None = None


class _Best:
    """The k places of each feature with the smallest rank, at most one in each row of tokens."""

    def __init__(self, n_dict: int, k: int, n_window: int):
        self.k = k
        self.limit = np.full(n_dict, np.inf)  # the rank that a newcomer must be below
        self.waiting: list[tuple[np.ndarray, ...]] = []  # newcomers that are not sorted in yet
        self.n_waiting = 0
        self.feature, self.token = np.zeros((2, 0), dtype=np.int64)  # token = row * length + pos
        self.rank = np.zeros(0)
        self.codes = np.zeros((0, n_window), dtype=np.float32)

    def newcomers(self, feature: np.ndarray, row: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Which of these places, given in the order of the text, may enter."""
        new = np.flatnonzero(rank < self.limit[feature])
        new = new[_first(feature[new] * (row.max(initial=0) + 1) + row[new], rank[new], 1)]
        return new[_first(feature[new], rank[new], self.k)]

    def add(self, feature: np.ndarray, token: np.ndarray, rank: np.ndarray, codes: np.ndarray):
        """Sorted in once they are a quarter of the places: each time costs as much as all of them.
        Until then the limit is that of before, and lets more in."""
        self.waiting.append((feature, token, rank, codes))
        self.n_waiting += len(feature)
        if self.n_waiting > len(self.feature) // 4:
            self.settle()

    def settle(self) -> None:
        """Old places come first, so that of equal ranks the earlier text stays."""
        of_now = self.feature, self.token, self.rank, self.codes
        features, tokens, ranks, codes = map(
            np.concatenate, zip(of_now, *self.waiting, strict=True)
        )
        self.waiting, self.n_waiting = [], 0
        keep = _first(features, ranks, self.k)
        self.feature, self.token, self.rank = features[keep], tokens[keep], ranks[keep]
        self.codes = codes[keep]
        full = _slots(self.feature) == self.k - 1
        self.limit[self.feature[full]] = self.rank[full]


class FeatureCollector:
    """Counts, maxima, histograms and contexts of all features, from batches of rows in order.

    Top contexts: the strongest token of a row, for the n_top rows where it is strongest. Sampled
    contexts: active tokens drawn uniformly (by a hash of token and feature, so the same ones each
    time), one in a row, none in the row of a top context.
    """

    def __init__(
        self,
        n_dict: int,
        context_length: int,
        *,
        n_top: int = 8,
        n_sampled: int = 8,
        n_before: int = 24,
        n_after: int = 8,
    ):
        self.n_dict, self.length = n_dict, context_length
        self.n_top, self.n_sampled, self.n_before = n_top, n_sampled, n_before
        self.offsets = np.arange(-n_before, n_after + 1)
        self.n_tokens = self.n_rows = 0
        self.n_active = np.zeros(n_dict, dtype=np.int64)
        self.max_activation = np.zeros(n_dict, dtype=np.float32)
        self.histogram = np.zeros((n_dict, N_BINS), dtype=np.int64)
        self.top = _Best(n_dict, n_top, len(self.offsets))
        # as many again as the top contexts may take away
        self.sampled = _Best(n_dict, n_sampled + n_top, len(self.offsets))
        self.rows: dict[int, np.ndarray] = {}  # the tokens of those rows that a context lies in
        self.prune_at = 1024

    def add(self, tokens: Tensor, codes: Tensor, counted: Tensor | None = None) -> None:
        """tokens (rows, context_length), codes (rows, context_length, n_dict) on any device.

        counted (rows, context_length) bool is False on tokens that don't count (position 0,
        padding); their codes must be 0.

        Raises:
            UserError: a code is negative, infinite or NaN.
        """
        flat = codes.reshape(-1).nonzero().squeeze(1)
        value = codes.reshape(-1)[flat].float().cpu().numpy()
        sound = bool(((value > 0) & (value < np.inf)).all())
        require(sound, "a feature's code is negative or not finite: the autoencoder is broken")
        place, feature = np.divmod(flat.cpu().numpy(), self.n_dict)
        self._count(feature, value)
        token = place + self.n_rows * self.length
        for best, rank in (
            (self.top, -value.astype(np.float64)),
            (self.sampled, _hash(token * self.n_dict + feature)),
        ):
            new = best.newcomers(feature, place // self.length, rank)
            around = self._around(codes, place[new], feature[new])
            best.add(feature[new], token[new], rank[new], around)
        rows = tokens.cpu().numpy().astype(np.int32)
        self.rows |= {self.n_rows + i: row for i, row in enumerate(rows)}
        self.n_rows += len(rows)
        self.n_tokens += tokens.numel() if counted is None else int(counted.sum())
        if len(self.rows) > self.prune_at:
            self._prune()

    def _count(self, feature: np.ndarray, value: np.ndarray) -> None:
        old = self.max_activation.copy()
        np.maximum.at(self.max_activation, feature, value)
        # A range that doubles merges neighbouring bins, so that the counts stay exact.
        shift = np.where(old > 0, _exponent(self.max_activation) - _exponent(old), 0)
        grown = np.flatnonzero(shift)
        moved = np.zeros((len(grown), N_BINS), dtype=np.int64)
        bins = np.arange(N_BINS) >> np.minimum(shift[grown], 31)[:, None]
        np.add.at(moved, (np.arange(len(grown))[:, None], bins), self.histogram[grown])
        self.histogram[grown] = moved
        place = feature * N_BINS + (value / self._bin_width()[feature]).astype(np.int64)
        counts = np.bincount(place, minlength=self.histogram.size)
        self.histogram += counts.reshape(self.histogram.shape)
        self.n_active += np.bincount(feature, minlength=self.n_dict)

    def _bin_width(self) -> np.ndarray:
        return np.ldexp(1.0, _exponent(self.max_activation)) / N_BINS

    def _around(self, codes: Tensor, place: np.ndarray, feature: np.ndarray) -> np.ndarray:
        """(n, window) codes of the feature on the tokens around the place, within its row."""
        position = place[:, None] % self.length + self.offsets
        inside = (position >= 0) & (position < self.length)
        index = np.where(inside, place[:, None] + self.offsets, 0) * self.n_dict + feature[:, None]
        around = codes.reshape(-1)[torch.from_numpy(index).to(codes.device)]
        return around.float().cpu().numpy() * inside

    def _prune(self) -> np.ndarray:
        """Forgets the rows without a context; returns the others' numbers, ascending."""
        self.top.settle()
        self.sampled.settle()
        needed = np.unique(np.append(self.top.token, self.sampled.token) // self.length)
        self.rows = {int(row): self.rows[int(row)] for row in needed}
        self.prune_at = 2 * len(self.rows) + 1024
        return needed

    def result(self) -> FeatureData:
        """Of all that was added. `nearest`, `promoted` and `suppressed` are left to the caller."""
        rows = self._prune()
        top, drawn = self.top, self.sampled
        pair = drawn.feature * max(self.n_rows, 1) + drawn.token // self.length
        taken = top.feature * max(self.n_rows, 1) + top.token // self.length
        fresh = np.flatnonzero(~np.isin(pair, taken))  # still in the order in which they were drawn
        fresh = fresh[_slots(drawn.feature[fresh]) < self.n_sampled]
        strength = -drawn.codes[fresh, self.n_before]
        fresh = fresh[np.lexsort((strength, drawn.feature[fresh]))]
        return FeatureData(
            n_tokens=self.n_tokens,
            n_active=self.n_active,
            max_activation=self.max_activation,
            histogram=self.histogram,
            bin_width=self._bin_width(),
            tokens=np.array(list(self.rows.values()), dtype=np.int32).reshape(-1, self.length),
            n_before=self.n_before,
            top=self._contexts(top, np.arange(len(top.feature)), self.n_top, rows),
            sampled=self._contexts(drawn, fresh, self.n_sampled, rows),
        )

    def _contexts(self, best: _Best, chosen: np.ndarray, n: int, rows: np.ndarray) -> Contexts:
        feature = best.feature[chosen]
        place = feature, _slots(feature)
        row, position = np.zeros((2, self.n_dict, n), dtype=np.int64)
        codes = np.zeros((self.n_dict, n, len(self.offsets)), dtype=np.float32)
        row[place] = np.searchsorted(rows, best.token[chosen] // self.length)
        position[place] = best.token[chosen] % self.length
        codes[place] = best.codes[chosen]
        return Contexts(np.bincount(feature, minlength=self.n_dict), row, position, codes)


def nearest_features(W_dec: Tensor, n: int = 5) -> Ranked:
    """For each row of W_dec (n_dict, activation_dim) the n rows of largest cosine similarity."""
    unit = normalize(W_dec.detach().float(), dim=1)
    best = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine.diagonal(offset=start).fill_(-2)  # itself
        best.append(cosine.topk(min(n, len(unit) - 1), dim=1))
    return _ranked(best)


def logit_effects(
    W_dec: Tensor, logits_of: Callable[[Tensor], Tensor | None], n: int = 8
) -> tuple[Ranked, Ranked] | None:
    """(promoted, suppressed): the tokens whose logits a feature raises and lowers most.

    Args:
        W_dec: (n_dict, activation_dim)
        logits_of: directions (k, activation_dim) -> what a code of 1 adds to the logits
            (k, vocabulary); None where the site doesn't permit, then so is the result
    """
    raised, lowered = [], []
    for directions in W_dec.split(256):  # 51 MB of logits for GPT-2's vocabulary
        logits = logits_of(directions)
        if logits is None:
            return None
        k = min(n, logits.shape[1])
        raised.append(logits.topk(k, dim=1))
        lowered.append(logits.topk(k, dim=1, largest=False))
    return _ranked(raised), _ranked(lowered)


def _ranked(parts: list[tuple[Tensor, Tensor]]) -> Ranked:
    """From the (values, indices) of torch.topk for consecutive features."""
    values, indices = (torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True))
    return Ranked(indices, values)


def _first(group: np.ndarray, rank: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k smallest ranks of each group, by group, then rank, then input order."""
    order = np.lexsort((rank, group))  # a stable sort
    return order[_slots(group[order]) < k]


def _slots(group: np.ndarray) -> np.ndarray:
    """
    >>> _slots(np.array([3, 3, 3, 7, 9, 9]))
    array([0, 1, 2, 0, 0, 1])
    """
    return np.arange(len(group)) - np.searchsorted(group, group)


def _exponent(value: np.ndarray) -> np.ndarray:
    """e such that 2^(e-1) <= value < 2^e; 0 for 0."""
    return np.frexp(value)[1]


def _hash(number: np.ndarray) -> np.ndarray:
    """Each integer's own uniform number in [0, 1): the finaliser of splitmix64 (Steele 2014)."""
    z = number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
