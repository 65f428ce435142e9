"""What a chunk of activations is to those who read it, and statistics of the first ones."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_coding.config import require

STATISTICS_ROWS = 65_536  # rows behind the mean and the scale; ours, not tuned
PIECE_ROWS = 1024  # whose copy in float32 stays in a CPU's cache; ours


class Chunks(Protocol):
    """Rows to train on, chunk by chunk; rows[k] is the number of rows of chunk k."""

    rows: list[int]

    def load(self, k: int) -> Tensor:
        """Chunk k, (rows[k], width) in float16 or bfloat16, on any device."""


@dataclass(frozen=True)
class Statistics:
    """Of the first rows, without those whose norm is beyond max_norm.

    mean: (width,)
    scale: with it the mean square norm of x is 1
    max_norm: beyond it, rows are left out of training and evaluation, as they are here
    n_rows, n_left_out: looked at, and left out of them
    """

    mean: Tensor
    scale: float
    max_norm: float
    n_rows: int
    n_left_out: int


def statistics(chunks: Chunks, *, max_norm_multiple: float = 0.0) -> Statistics:
    """Of the first STATISTICS_ROWS rows or so, whole chunks; in float64, on the CPU.

    max_norm_multiple: max_norm in units of the median norm of the first chunk; 0: infinite

    Raises:
        UserError: all activations are 0.
    """
    total, squares, n, n_kept, k, max_norm = 0.0, 0.0, 0, 0, 0, math.inf
    while n < STATISTICS_ROWS and k < len(chunks.rows):
        rows = chunks.load(k).cpu()  # the same bits wherever they are kept
        if k == 0 and max_norm_multiple:
            max_norm = max_norm_multiple * _median_norm(rows)
        kept = rows[is_kept(rows, max_norm)].double()
        total, squares = total + kept.sum(dim=0), squares + float(kept.square().sum())
        n, n_kept, k = n + len(rows), n_kept + len(kept), k + 1
    require(squares > 0, "all activations are 0: is this the right layer and site?")
    mean, scale = (total / n_kept).float(), (n_kept / squares) ** 0.5
    return Statistics(mean, scale, max_norm, n, n - n_kept)


def is_kept(x: Tensor, max_norm: float) -> Tensor:
    """Which rows of x (..., width) are not beyond max_norm, (...) bool."""
    if max_norm == math.inf:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    return ~(_norms(x) > max_norm)  # of NaN: kept, so that it shows


def _norms(x: Tensor) -> Tensor:
    """Of rows of x (..., width) in float32, (...)."""
    # piece by piece: five times faster than with a copy in float32 that no cache holds
    return torch.cat([piece.float().norm(dim=-1) for piece in x.split(PIECE_ROWS)])


def _median_norm(rows: Tensor) -> float:
    """Of the rows that are not 0; infinite if all are."""
    norms = _norms(rows)
    return float(norms[norms > 0].median()) if norms.any() else math.inf
