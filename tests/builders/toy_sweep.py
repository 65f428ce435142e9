"""A tiny sweep of replicate_toy_models.py: its flags, and what must be the same bits in two runs.

Widths 8, 16, 32 at three l1_alphas and two seeds, 240 steps; MINIMAL makes it two cells, 40 steps.
"""

from pathlib import Path

from builders.scripts import EACH_STEP, NO_FIGURES, bytes_under, table

N_STEPS, SEEDS, WIDTHS, L1_EXPS = 240, (0, 1), (8, 16, 32), (-2, -1, 0)
TINY = (
    "--preset smoke --activation-dim 8 --n-true-features 16 --l1-exp-low -2 --l1-exp-high 1 "
    "--dict-ratio-exp-low -1 --dict-ratio-exp-high 2 --wandb-mode disabled --log-every 20 "
    f"--n-steps {N_STEPS} --n-seeds 2 --device cpu"
).split()
MINIMAL = ("--n-seeds", "1", "--n-steps", "40", "--l1-exp-low", "0", "--dict-ratio-exp-low", "0",
           "--dict-ratio-exp-high", "2", "--output-dir", "run")  # fmt: skip
# figures take most of a tiny run: smaller here, and left out by most runs
COARSE = {"sparse_coding.figures.heatmap.DPI": 20}
OFTEN = NO_FIGURES | EACH_STEP


def numbers_in(folder: Path) -> dict[str, bytes | list]:
    """What must be the same bits in two runs of the same constants."""
    kept = {
        name: data
        for name, data in bytes_under(folder).items()
        if name.startswith(("saes/", "figures/", "world."))
    }
    return kept | {"results.csv": [row | {"seconds": 0} for row in table(folder)]}


def assert_same_numbers(folder: Path, finished: Path, *, figures: bool = False) -> None:
    """Of two run folders."""
    ours, theirs = numbers_in(folder), numbers_in(finished)
    if not figures:
        theirs = {name: data for name, data in theirs.items() if not name.startswith("figures/")}
        ours = {name: ours[name] for name in ours if not name.startswith("figures/")}
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
