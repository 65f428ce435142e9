"""The grid of a sweep on a language model, whose l1_alpha hangs on the width."""

import math
from dataclasses import dataclass, replace

from sparse_coding.config import require_flag
from sparse_coding.sweep.grid import Cell, check_grid, make_grid

# l1_alpha = 10^(-15/4) gave an l0 of 25 at width 256, on the demo (LOG.md). The mse is a mean over
# the width, so for equal l0 it falls as 1/width.
L1_EXP, L1_WIDTH = -15, 256
AROUND = 3  # steps of the default grid to either side


@dataclass(frozen=True)
class Grid:
    """The fields are flags of run.py, high ends exclusive.

    l1_exp_low, l1_exp_high: both None: around an l0 of some 25
    target_l0: if not empty, l1_alpha is found for each of these

    Raises:
        UserError: a flag out of its range.
    """

    l1_exp_low: int | None
    l1_exp_high: int | None
    expansion_exp_low: int
    expansion_exp_high: int
    target_l0: tuple[int, ...]
    seed: int
    n_seeds: int

    def __post_init__(self) -> None:
        given = self.l1_exp_low is not None
        both = given == (self.l1_exp_high is not None)
        require_flag(self, "l1_exp_low", both, "given together with --l1-exp-high")
        check_grid(self if given else replace(self, l1_exp_low=0, l1_exp_high=1), "expansion_exp")
        fine = len({t for t in self.target_l0 if t >= 1}) == len(self.target_l0)
        require_flag(self, "target_l0", fine, "at least 1 each, and all different")

    def cells(self, width: int) -> list[Cell]:
        """All cells of the run, on activations of this width."""
        middle = L1_EXP + round(4 * math.log10(L1_WIDTH / width))
        low, high = self.l1_exp_low, self.l1_exp_high
        if self.target_l0:  # the controller's start
            low, high = middle, middle + 1
        elif low is None:
            low, high = middle - AROUND, middle + AROUND + 1
        cells = make_grid(
            width,
            seeds=range(self.seed, self.seed + self.n_seeds),
            l1_exps=range(low, high),
            size_exps=range(self.expansion_exp_low, self.expansion_exp_high),
        )
        return [replace(cell, target_l0=t) for cell in cells for t in self.target_l0 or (0,)]
