"""The grid of run.py: its l1_alpha follows the width unless it is given."""

import pytest

from sparse_coding.config import UserError
from sparse_coding.lm.recipe import Grid

PLAIN = dict(
    l1_exp_low=None,
    l1_exp_high=None,
    expansion_exp_low=0,
    expansion_exp_high=1,
    target_l0=(),
    seed=0,
    n_seeds=1,
)


def l1_exps(width: int, **flags) -> list[int]:
    return [cell.l1_exp for cell in Grid(**PLAIN | flags).cells(width)]


@pytest.mark.parametrize(
    ("width", "middle"),  # 10^(middle/4) x width is the same within a step: .178 x 256 = 45.5
    [(64, -13), (256, -15), (2048, -19), (3072, -19), (16384, -22)],
)
def test_the_default_l1_alpha_falls_as_the_width_grows(width, middle):
    assert l1_exps(width) == list(range(middle - 3, middle + 4))
    assert 10 ** (middle / 4) * width == pytest.approx(10 ** (-15 / 4) * 256, rel=0.34)


def test_a_given_range_is_taken_as_it_is():
    assert l1_exps(64, l1_exp_low=-8, l1_exp_high=-6) == [-8, -7]


def test_a_wished_l0_takes_the_middle_as_its_start():
    cells = Grid(**PLAIN | {"target_l0": (16, 32), "n_seeds": 2}).cells(64)
    assert [(c.seed, c.l1_exp, c.target_l0, c.n_dict) for c in cells] == [
        (0, -13, 16, 64),
        (0, -13, 32, 64),
        (1, -13, 16, 64),
        (1, -13, 32, 64),
    ]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"l1_exp_low": -8}, "--l1-exp-low -8 must be given together with --l1-exp-high"),
        ({"l1_exp_high": -8}, "--l1-exp-low None must be given together with --l1-exp-high"),
        ({"l1_exp_low": -8, "l1_exp_high": -8}, "--l1-exp-high -8 must be above the low end -8"),
        ({"expansion_exp_high": 0}, "--expansion-exp-high 0 must be above"),
        ({"target_l0": (0,)}, "must be at least 1 each, and all different"),
        ({"target_l0": (8, 8)}, "must be at least 1 each, and all different"),
        ({"n_seeds": 0}, "--n-seeds 0 must be between"),
    ],
)
def test_what_makes_no_grid_is_refused(flags, reason):
    with pytest.raises(UserError, match=reason):
        Grid(**PLAIN | flags)
