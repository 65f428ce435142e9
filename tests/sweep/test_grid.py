"""The grid, its split over shards and over memory."""

from types import SimpleNamespace

import pytest
from builders.sweeps import n_features

from sparse_coding.config import UserError
from sparse_coding.sae.families import PREFIXES
from sparse_coding.sweep.grid import (
    Families,
    Shard,
    check_grid,
    find_shard,
    make_grid,
    plan_groups,
    split_by_cost,
)


def full_grid(n_seeds: int = 1):
    return make_grid(512, seeds=range(n_seeds), l1_exps=range(-8, 9), size_exps=range(-3, 6))


def test_the_full_grid_is_the_posts_153_autoencoders():
    cells = full_grid()
    assert len(cells) == len({cell.name for cell in cells}) == 153
    assert sorted({cell.n_dict for cell in cells}) == [64 * 2**e for e in range(9)]
    alphas = sorted({cell.l1_alpha for cell in cells})
    assert alphas[0] == pytest.approx(0.01)
    assert alphas[-1] == pytest.approx(100)
    assert [cell.n_dict for cell in cells if cell.size_ratio == 1] == [512] * 17


def test_names_sort_by_seed_then_size():
    names = [cell.name for cell in full_grid(2) if cell.l1_exp == 0]
    assert names == sorted(names)


@pytest.mark.parametrize(("base", "low", "size"), [(12, -3, "1.5"), (1, -1, "0.5")])
def test_sizes_that_are_no_whole_number_of_features_are_refused(base, low, size):
    with pytest.raises(UserError, match=size):
        make_grid(base, seeds=range(1), l1_exps=range(1), size_exps=range(low, 1))


FLAGS = dict(seed=0, n_seeds=1, l1_exp_low=-8, l1_exp_high=9, size_low=-3, size_high=6)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_seeds": 1000},
        {"l1_exp_low": -40, "l1_exp_high": -39},
        {"size_low": 39, "size_high": 40},
    ],
    ids=str,
)
def test_flags_at_the_ends_of_their_range_are_taken(change):
    check_grid(SimpleNamespace(**FLAGS | change), "size")


@pytest.mark.parametrize(
    "change",
    [{"n_seeds": 0}, {"n_seeds": 1001}, {"seed": -1}, {"l1_exp_low": -41}, {"l1_exp_high": -8},
     {"l1_exp_high": 41}, {"size_low": -41}, {"size_high": -3}, {"size_high": 41}],
    ids=str,
)  # fmt: skip
def test_flags_out_of_their_range_are_refused_by_name(change):
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value} must be"):
        check_grid(SimpleNamespace(**FLAGS | change), "size")


@pytest.mark.parametrize("n_shards", [1, 2, 3, 7, 200])
def test_shards_are_disjoint_complete_and_balanced(n_shards):
    cells = full_grid(2)
    shards = split_by_cost(cells, n_shards)
    assert len(shards) == n_shards
    assert sorted(c.name for shard in shards for c in shard) == sorted(c.name for c in cells)
    loads = [sum(cell.n_dict for cell in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(cell.n_dict for cell in cells)
    assert shards == split_by_cost(cells, n_shards)


COSTS = {  # of a cell, by what it is trained with; and how unequal 2, 4 and 8 shards may end
    "dense": (lambda c: c.n_dict, (1.001, 1.001, 1.001)),
    # ns of a step on a GPU, by arithmetic (LOG.md): 4.2 a feature at the lowest l1_alpha, where
    # most features fire, 2.3 at the highest; and some for each autoencoder
    "GPU": (lambda c: c.n_dict * (4.2 - 1.9 * (c.l1_exp + 8) / 16) + 500, (1.02, 1.02, 1.06)),
    # us of a core, measured at n_dict 512 (LOG.md): 2 350 at e = -6, 1 300 at -4, 1 000 from 0 on
    "CPU": (
        lambda c: c.n_dict * max(2, 2 - c.l1_exp * (0.2 if c.l1_exp > -5 else 0.43)) + 50,
        (1.05, 1.05, 1.18),
    ),
}


@pytest.mark.parametrize("engine", COSTS)
def test_shards_of_the_full_grid_end_together_whatever_trains_them(engine):
    """The slowest to the mean is what several GPUs or hosts lose; cells are dealt by n_dict."""
    cost, most = COSTS[engine]
    for n_shards, limit in zip((2, 4, 8), most, strict=True):
        loads = [sum(map(cost, shard)) for shard in split_by_cost(full_grid(), n_shards)]
        assert max(loads) / (sum(loads) / n_shards) < limit, n_shards


def test_groups_hold_one_seed_and_fit_the_budget():
    cells = full_grid(2)
    groups = plan_groups(cells, budget=100_000, memory_of=n_features)
    assert [cell for group in groups for cell in group] == cells
    for group in groups:
        assert sum(cell.n_dict for cell in group) <= 100_000
        assert len({cell.seed for cell in group}) == 1
    assert len(plan_groups(cells, budget=1e9, memory_of=n_features)) == 2  # one per seed


def test_what_needs_the_budget_to_the_byte_fits():
    cells = make_grid(4, seeds=range(1), l1_exps=range(4), size_exps=range(1))
    for budget, sizes in ((8, [2, 2]), (7, [1] * 4), (4, [1] * 4)):
        groups = plan_groups(cells, budget=budget, memory_of=n_features)
        assert [len(group) for group in groups] == sizes
    with pytest.raises(UserError, match="n_dict 4 needs"):
        plan_groups(cells, budget=3, memory_of=n_features)


def test_a_cell_larger_than_the_budget_is_refused_with_both_sizes():
    with pytest.raises(UserError, match="n_dict 16384"):
        plan_groups(full_grid(), budget=16_000, memory_of=n_features)


# --- shards ---


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_flag_and_torchrun_the_process_is_the_whole():
    assert find_shard("") == Shard(0, 1)
    assert Shard().suffix == ""


def test_a_flag_counts_from_one():
    assert find_shard("2/3") == Shard(1, 3)
    assert find_shard("2/3").suffix == "-shard-2-of-3"


@pytest.mark.parametrize("flag", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_a_flag_that_is_no_part_is_refused_with_an_example(flag):
    with pytest.raises(UserError, match="for example 1/4"):
        find_shard(flag)


def test_a_rank_of_torchrun_is_a_shard_and_no_flag_may_contradict_it(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert find_shard("") == Shard(1, 4, by_torchrun=True)
    with pytest.raises(UserError, match="torchrun"):
        find_shard("1/2")


# --- families ---


def families(*arch: str, target_l0: tuple = (), prefixes: tuple = PREFIXES) -> Families:
    return Families(arch, target_l0, prefixes)


def asked(of: Families, **grid) -> list[tuple]:
    grid = dict(seeds=range(1), l1_exps=range(2), size_exps=range(1)) | grid
    cells = of.cells(make_grid(8, **grid), start=5, default_l0=(3,))
    return [(c.seed, c.n_dict, c.arch, c.l1_exp, c.target_l0) for c in cells]


def test_relu_alone_is_the_grid_as_it_was():
    grid = dict(seeds=range(2), l1_exps=range(-3, 2), size_exps=range(-1, 2))
    cells = make_grid(8, **grid)
    assert families("relu").cells(cells, start=0, default_l0=(3,)) == cells


def test_a_family_of_k_is_asked_for_the_default_l0_and_relu_for_its_grid():
    both = families("topk", "relu")
    assert asked(both) == [
        (0, 8, "topk", 5, 3),
        (0, 8, "relu", 0, 0),
        (0, 8, "relu", 1, 0),
    ]
    places = [(c[0], c[1]) for c in asked(both, seeds=range(2), size_exps=range(2))]
    assert places == [(0, 8)] * 3 + [(0, 16)] * 3 + [(1, 8)] * 3 + [(1, 16)] * 3


def test_a_target_l0_is_asked_of_every_family():
    assert asked(families("relu", "jumprelu", target_l0=(2, 4))) == [
        (0, 8, "relu", 5, 2),
        (0, 8, "relu", 5, 4),
        (0, 8, "jumprelu", 5, 2),
        (0, 8, "jumprelu", 5, 4),
    ]


def test_names_of_cells_tell_families_apart_and_relus_are_as_they_were():
    of = families("relu", "batchtopk").cells(full_grid()[:1], start=0, default_l0=(16,))
    names = ["seed0_dict000064_l1exp-08", "seed0_dict000064_batchtopk_l0-0016"]
    assert [cell.name for cell in of] == names


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: families(), "--arch \\(\\) must be at least one family"),
        (lambda: families("topk", "topk"), "must be at least one family, and all different"),
        (lambda: families("relu", target_l0=(0,)), "must be at least 1 each, and all different"),
        (lambda: families("relu", target_l0=(8, 8)), "must be at least 1 each, and all different"),
        (lambda: families("matryoshka", prefixes=(0.5, 0.25, 1)), "--prefixes .* ascend and end"),
        (lambda: families("matryoshka", prefixes=(0.5,)), "--prefixes .* ascend and end with 1"),
        (lambda: families("matryoshka", prefixes=(0, 1)), "--prefixes .* ascend and end with 1"),
        (lambda: families("matryoshka", prefixes=()), "--prefixes .* ascend and end with 1"),
        (
            lambda: families("matryoshka", prefixes=tuple(i / 9 for i in range(1, 10))),
            "--prefixes .* must be at most 8 of them",
        ),
        (
            lambda: asked(families("topk", target_l0=(4, 9))),
            "--target-l0 9 is more than the 8 features of the smallest topk: lower it, or raise",
        ),
        (
            lambda: families("topk").require_used(["--l1-exp-low", "-8"]),
            "--l1-exp-low is for --arch relu: drop it, or add relu",
        ),
        (
            lambda: families("jumprelu").require_used(["--l1-exp-high=-8"]),
            "--l1-exp-high is for --arch relu: drop it, or add relu",
        ),
        (
            lambda: families("batchtopk").require_used(["--prefixes", "0.5", "1"]),
            "--prefixes is for --arch matryoshka: drop it",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, reason):
    with pytest.raises(UserError, match=reason):
        make()


def test_what_makes_sense_is_not():
    families("relu", "topk").require_used(["--l1-exp-low", "-8", "--seed", "1"])
    families("relu", "matryoshka").require_used(["--prefixes", "0.5", "1"])
    assert asked(families("jumprelu", target_l0=(9,))) == [(0, 8, "jumprelu", 5, 9)]  # no k


def test_a_baseline_stands_beside_each_cell_after_those_of_its_seed():
    of = Families(("topk", "relu"), (), PREFIXES, "frozen-decoder")
    cells = of.cells(make_grid(8, seeds=range(2), l1_exps=range(1), size_exps=range(1)),
                     start=5, default_l0=(3,))  # fmt: skip
    names = ["topk", "relu", "topk_frozen", "relu_frozen"]
    assert [(c.seed, c.arch) for c in cells] == [(s, name) for s in range(2) for name in names]
    assert [c.sparsity for c in cells[:4]] == [(3, 0), (0, 0)] * 2
    assert cells[3].name == "seed0_dict000008_relu_frozen_l1exp+00"
