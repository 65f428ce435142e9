"""What a chunk of activations is to those who read it, and statistics of the first ones."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparse_coding.config import require

STATISTICS_ROWS = 65_536  # rows behind the mean and the scale; ours, not tuned
PIECE_ROWS = 1024  # whose copy in float32 stays in a CPU's cache; ours
# A number of a site; two of a site and its target, whose rows lie side by side
PerSite = float | tuple[float, float]


class Chunks(Protocol):
    """Rows to train on, chunk by chunk; rows[k] is the number of rows of chunk k."""

    rows: list[int]

    def load(self, k: int) -> Tensor:
        """Chunk k, (rows[k], stored width) in float16 or bfloat16, on any device."""


@dataclass(frozen=True)
class Statistics:
    """Of the first rows, without those whose norm is beyond max_norm.

    mean: (width,)
    scale: with it the mean square norm of x is 1
    max_norm: beyond it, rows are left out of training and evaluation, as they are here
    n_rows, n_left_out: looked at, and left out of them
    target: the same of the target's rows, of transcoders; n_left_out are beyond either max_norm
    """

    mean: Tensor
    scale: float
    max_norm: float
    n_rows: int
    n_left_out: int
    target: "Statistics | None" = None

    @property
    def output(self) -> "Statistics":
        """Of what autoencoders reconstruct, transcoders predict."""
        return self.target or self

    @property
    def scales(self) -> PerSite:
        """For `scaled`."""
        return (self.scale, self.target.scale) if self.target else self.scale

    @property
    def limits(self) -> PerSite:
        """For `is_kept`."""
        return (self.max_norm, self.target.max_norm) if self.target else self.max_norm


def statistics(chunks: Chunks, *, max_norm_multiple: float = 0.0, n_sites: int = 1) -> Statistics:
    """Of the first STATISTICS_ROWS rows or so, whole chunks; in float64, on the CPU.

    max_norm_multiple: max_norm in units of the median norm of the first chunk; 0: infinite
    n_sites: 2 with a target, whose rows are beside those of the site

    Raises:
        UserError: all activations are 0.
    """
    total, squares, n, n_kept, k = 0.0, [0.0] * n_sites, 0, 0, 0
    limits = (math.inf,) * n_sites
    while n < STATISTICS_ROWS and k < len(chunks.rows):
        rows = chunks.load(k).cpu()  # the same bits wherever they are kept
        if k == 0 and max_norm_multiple:
            parts = rows.chunk(n_sites, dim=1)
            limits = tuple(max_norm_multiple * _median_norm(part) for part in parts)
        kept = rows[is_kept(rows, limits)].double()
        total = total + kept.sum(dim=0)
        for i, part in enumerate(kept.chunk(n_sites, dim=1)):
            squares[i] += float(part.square().sum())
        n, n_kept, k = n + len(rows), n_kept + len(kept), k + 1
    require(min(squares) > 0, "all activations are 0: is this the right layer and site?")
    means = (total / n_kept).float().chunk(n_sites)
    of_site, *of_target = (
        Statistics(mean, (n_kept / square) ** 0.5, limit, n, n - n_kept)
        for mean, square, limit in zip(means, squares, limits, strict=True)
    )
    return replace(of_site, target=of_target[0]) if of_target else of_site


def is_kept(x: Tensor, max_norm: PerSite) -> Tensor:
    """Which rows of x (..., stored width) are at none of its sites beyond max_norm, (...) bool."""
    limits = max_norm if isinstance(max_norm, tuple) else (max_norm,)
    kept = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    for part, limit in zip(x.chunk(len(limits), dim=-1), limits, strict=True):
        if limit != math.inf:
            kept &= ~(_norms(part) > limit)  # of NaN: kept, so that it shows
    return kept


def scaled(rows: Tensor, scale: PerSite) -> Tensor:
    """Rows (n, width) times the scale; of a site and its target (2, n, width), x and y, each times
    its own."""
    if not isinstance(scale, tuple):
        return rows * scale
    parts = zip(rows.chunk(2, dim=-1), scale, strict=True)
    return torch.stack([part * factor for part, factor in parts])


def in_words(max_norm: PerSite) -> str:
    """What rows that are left out are beyond."""
    if isinstance(max_norm, tuple):
        return f"{max_norm[0]:.4g} at the site or {max_norm[1]:.4g} at its target"
    return f"{max_norm:.4g}"


def _norms(x: Tensor) -> Tensor:
    """Of rows of x (..., width) in float32, (...)."""
    # piece by piece: five times faster than with a copy in float32 that no cache holds
    return torch.cat([piece.float().norm(dim=-1) for piece in x.split(PIECE_ROWS)])


def _median_norm(rows: Tensor) -> float:
    """Of the rows that are not 0; infinite if all are."""
    norms = _norms(rows)
    return float(norms[norms > 0].median()) if norms.any() else math.inf
