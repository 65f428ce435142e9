"""Activations of a language model in shards of rows, computed when asked for.

A shard is a fixed stretch of the packed text, so it can be computed alone. Its rows are shuffled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_coding.config import named_seed, require
from sparse_coding.lm.model import LanguageModel, Site, activations
from sparse_coding.lm.packing import Packed

SHARD_BYTES = 32 * 2**20  # of a shard, about; ours: small enough to mix many of them in memory
STATISTICS_ROWS = 65_536  # rows behind the mean and the scale; ours, not tuned


class Shards(Protocol):
    """Rows to train on, shard by shard; rows[k] is the number of rows of shard k."""

    rows: list[int]

    def load(self, k: int) -> Tensor:
        """Shard k, (rows[k], width) in float16 or bfloat16."""


@dataclass(frozen=True)
class Harvester:
    """Computes shards with the language model.

    store_dtype: float16 or bfloat16, in which rows are kept
    lm_batch_size: rows of text per forward pass
    """

    lm: LanguageModel
    site: Site
    text: Packed
    store_dtype: torch.dtype
    lm_batch_size: int
    n_tokens: int  # wished; there may be fewer

    @property
    def texts_per_shard(self) -> int:
        """Rows of text behind a shard."""
        row_bytes = self.text.context_length * self.site.width * self.store_dtype.itemsize
        return max(1, round(SHARD_BYTES / row_bytes))

    def span(self, k: int) -> tuple[int, int]:
        """First and last (exclusive) row of text of shard k."""
        n = self.texts_per_shard
        return k * n, min((k + 1) * n, self.text.n_rows)

    @cached_property
    def rows(self) -> list[int]:
        """Activations of each shard, as many shards as hold n_tokens of them, or all there are."""
        rows: list[int] = []
        n_shards = -(-self.text.n_rows // self.texts_per_shard)
        while len(rows) < n_shards and sum(rows) < self.n_tokens:
            rows.append(int(self.text.keep(*self.span(len(rows))).sum()))
        return rows

    @property
    def n_bytes(self) -> int:
        return sum(self.rows) * self.site.width * self.store_dtype.itemsize

    def load(self, k: int) -> Tensor:
        """Shard k, computed: `parts`, then `assembled`."""
        return self.assembled(k, list(self.parts(k)))[0]

    def parts(self, k: int) -> Iterator[Tensor]:
        """Activations of the kept tokens of shard k, (kept, width), by forward pass."""
        start, stop = self.span(k)
        for first in range(start, stop, self.lm_batch_size):
            ids = self.text.rows(first, min(first + self.lm_batch_size, stop))
            kept = torch.from_numpy(np.flatnonzero(self.text.keep_of(ids)))
            x = activations(self.lm, self.site, torch.from_numpy(ids)).flatten(0, 1)
            yield x.index_select(0, kept.to(x.device)).to(self.store_dtype).cpu()

    def assembled(self, k: int, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(rows of shard k in a random order, (rows[k], width); their norms in float32).

        Raises:
            UserError: an activation is too large for the store's dtype, or not a number.
        """
        rng = torch.Generator().manual_seed(named_seed("shard", k))
        order = torch.randperm(self.rows[k], generator=rng)
        rows = torch.empty(len(order), self.site.width, dtype=self.store_dtype)
        norms = torch.empty(len(order))
        for places, part in zip(order.split([len(p) for p in parts]), parts, strict=True):
            rows.index_copy_(0, places, part)
            norms[places] = part.float().norm(dim=1)
        require(
            bool(torch.isfinite(norms).all()),
            f"activations of layer {self.site.layer} {self.site.name} are beyond the range of "
            f"{self.store_dtype}: use --store-dtype bfloat16",
        )
        return rows, norms


@dataclass(frozen=True)
class Statistics:
    """mean (width,) of the first rows, and scale: with it the mean square norm of x is 1."""

    mean: Tensor
    scale: float


def statistics(shards: Shards) -> Statistics:
    """Of the first STATISTICS_ROWS rows or so, whole shards; in float64.

    Raises:
        UserError: all activations are 0.
    """
    total, squares, n, k = 0.0, 0.0, 0, 0
    while n < STATISTICS_ROWS and k < len(shards.rows):
        rows = shards.load(k).double()
        total, squares = total + rows.sum(dim=0), squares + float(rows.square().sum())
        n, k = n + len(rows), k + 1
    require(squares > 0, "all activations are 0: is this the right layer and site?")
    return Statistics((total / n).float(), (n / squares) ** 0.5)
