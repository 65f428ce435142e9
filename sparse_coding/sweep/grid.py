"""The grid of cells, and its split over shards and over memory."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING

from sparse_coding.config import UserError, given_flags, named_seed, require, require_flag
from sparse_coding.sae.families import FAMILIES, FROZEN, MOST_PREFIXES, Kind

if TYPE_CHECKING:
    from sparse_coding.sae.ensemble import Ensemble
    from sparse_coding.sae.spec import SAESpec


# --l1-normalisation -> the L1 term of the loss, as axis labels say it
L1_TERMS = {
    "per_feature": "l1_alpha · mean Σ codes / n_dict",  # the post's
    "sum": "l1_alpha · mean Σ codes",
}


@dataclass(frozen=True)
class Cell:
    """One autoencoder of a sweep. Keyed by integers, never by float equality.

    l1_exp: l1_alpha = 10^(l1_exp/4)
    size_exp: size relative to the base size is 2^size_exp (dict_ratio, expansion_factor)
    target_l0: k, where the family has it; else l1_alpha is only where a controller starts that
        seeks this l0, and 0 means that it stays. What was given, whole or not
    arch: the family of autoencoders, see sae/families.py
    world: seed of its world, where that is not the cell's own
    """

    seed: int
    l1_exp: int
    size_exp: int
    n_dict: int
    target_l0: float = 0
    arch: str = "relu"
    world: int | None = None

    @property
    def data(self) -> tuple[int, int | None]:
        """What its batches depend on: cells of the same are trained together."""
        return self.seed, self.world

    @property
    def kind(self) -> Kind:
        """(family, n_dict): on which its memory and time depend."""
        return self.arch, self.n_dict

    @property
    def sparsity(self) -> tuple[float, int]:
        """What was asked of it: (target_l0, 0), or (0, l1_exp) where no l0 was."""
        return (self.target_l0, 0) if self.target_l0 else (0, self.l1_exp)

    @property
    def l1_alpha(self) -> float:
        """10^(l1_exp/4)."""
        return 10 ** (self.l1_exp / 4)

    @property
    def top_k(self) -> int | None:
        """Codes of each sample, where the family has that."""
        return int(self.target_l0) if FAMILIES[self.arch].selection == "topk" else None

    @property
    def size_ratio(self) -> float:
        """n_dict relative to the base size: dict_ratio or expansion_factor."""
        return 2.0**self.size_exp

    @property
    def name(self) -> str:
        """File name: sorts by seed, world, size, l1_alpha."""
        of_sparsity = f"l0-{self.target_l0:04g}" if self.target_l0 else f"l1exp{self.l1_exp:+03d}"
        of_family = "" if self.arch == "relu" else f"_{self.arch}"
        of_world = "" if self.world is None else f"_world{self.world}"
        return f"seed{self.seed}{of_world}_dict{self.n_dict:06d}{of_family}_{of_sparsity}"


def l1_divisor(l1_normalisation: str, n_dict: int) -> int:
    """What divides l1_alpha in the L1 term of the loss, by L1_TERMS."""
    return n_dict if l1_normalisation == "per_feature" else 1


@dataclass(frozen=True)
class Families:
    """Which families are trained, and how sparse; the fields are flags of both scripts."""

    arch: tuple[str, ...]
    target_l0: tuple[float, ...]
    prefixes: tuple[float, ...]
    baseline: str = "none"

    def __post_init__(self) -> None:
        """Raises UserError for a flag out of its range."""
        unique = 0 < len(self.arch) == len(set(self.arch))
        require_flag(self, "arch", unique, "at least one family, and all different")
        fine = len({t for t in self.target_l0 if 1 <= t < math.inf}) == len(self.target_l0)
        require_flag(self, "target_l0", fine, "at least 1 each, and all different")
        whole = "topk" not in self.arch or all(t == int(t) for t in self.target_l0)
        require_flag(self, "target_l0", whole, "whole numbers with --arch topk")
        ends = (0.0, *self.prefixes)
        ascend = all(a < b for a, b in pairwise(ends)) and ends[-1] == 1
        require_flag(self, "prefixes", ascend, "shares of n_dict that ascend and end with 1")
        few = len(self.prefixes) <= MOST_PREFIXES
        require_flag(self, "prefixes", few, f"at most {MOST_PREFIXES} of them")

    def require_used(self, argv: list[str]) -> None:
        """Raises UserError for a flag of the command line that would change nothing."""
        given = given_flags(argv)
        nested = any(FAMILIES[name].nested for name in self.arch)
        for name in sorted(given & {"l1_exp_low", "l1_exp_high"}):
            flag = f"--{name.replace('_', '-')}"
            require("relu" in self.arch, f"{flag} is for --arch relu: drop it, or add relu")
        require(nested or "prefixes" not in given, "--prefixes is for --arch matryoshka: drop it")

    def cells(
        self, of_size: list[Cell], *, start: int, default_l0: tuple[float, ...]
    ) -> list[Cell]:
        """What is asked of each family, for every seed and size of the cells.

        Args:
            of_size: relu's, of every seed, size and l1_alpha
            start: l1_exp where the controller of a penalty's weight starts
            default_l0: of families other than relu, if no target_l0 is given
        Raises:
            UserError: a k above n_dict.
        """
        on_grid = [cell for cell in of_size if "relu" in self.arch and not self.target_l0]
        places = dict.fromkeys(replace(cell, l1_exp=start) for cell in of_size)
        sought = [name for name in self.arch if name != "relu" or self.target_l0]
        asked = [
            replace(cell, arch=arch, target_l0=target_l0)
            for cell in places
            for arch in sought
            for target_l0 in self.target_l0 or default_l0
        ]
        for cell in asked:
            require(
                cell.target_l0 <= cell.n_dict or not FAMILIES[cell.arch].has_k,
                f"--target-l0 {cell.target_l0} is more than the {cell.n_dict} features of the "
                f"smallest {cell.arch}: lower it, or raise the low end of the sizes",
            )
        order = {name: i for i, name in enumerate(self.arch)}
        cells = on_grid + asked
        cells.sort(key=lambda c: (c.world or 0, c.seed, c.size_exp, order[c.arch], c.sparsity))
        if self.baseline == "none":
            return cells
        frozen = [replace(cell, arch=f"{cell.arch}{FROZEN}") for cell in cells]
        return sorted(cells + frozen, key=lambda cell: (cell.world or 0, cell.seed))  # stable


def asked_and_found(cell: Cell, ensemble: "Ensemble", i: int, l1_normalisation: str) -> dict:
    """Columns of results.csv: what the cell is, and what training found; i: its place in the
    ensemble. target_l0 and l1_alpha are None where they have no meaning."""
    family, l1_alpha = FAMILIES[cell.arch], cell.l1_alpha
    if cell.target_l0:  # what the controller found
        l1_alpha = ensemble.l1(i) * l1_divisor(l1_normalisation, cell.n_dict)
    return {
        "seed": cell.seed,
        "arch": cell.arch,
        "target_l0": cell.target_l0 or None,
        "l1_alpha": None if family.has_k else l1_alpha,
        "n_dict": cell.n_dict,
        "n_revived": ensemble.n_revived(i),
    }


def asked_of(row: dict) -> str:
    """What was asked of the cell of a row, in words: its family and sparsity."""
    wanted = f"l0 {row['target_l0']}" if row["target_l0"] else f"l1_alpha {row['l1_alpha']:.3g}"
    return f"{row['arch']}, {wanted}"


def on_grid(row: dict) -> bool:
    """Whether the cell of a row is on relu's grid of l1_alpha, as heat-maps show it."""
    return row["arch"] == "relu" and row["target_l0"] is None


def gap(rows: list[dict]) -> str:
    """How far saved autoencoders, which choose codes by a threshold, are from the trained ones,
    which chose them by batch: the farthest one, in words, baselines aside; "" where none is of
    that kind."""
    by_batch = [
        row
        for row in rows
        if row.get("fvu_trained") and math.isfinite(row["fvu"]) and not FAMILIES[row["arch"]].frozen
    ]
    if not by_batch:
        return ""
    row = max(by_batch, key=lambda r: abs(r["fvu"] - r["fvu_trained"]))
    return (
        f"Saved with a threshold in place of a choice by batch: at most as far apart as fvu "
        f"{row['fvu']:.4f} at l0 {row['l0']:.1f} saved, {row['fvu_trained']:.4f} at "
        f"{row['l0_trained']:.1f} trained ({asked_of(row)}, n_dict {row['n_dict']})."
    )


def specs_of(
    cells: list[Cell],
    l1_normalisation: str,
    *,
    tied: bool,
    prefixes: tuple[float, ...] = (1.0,),
    own_lr: bool = True,
    x_scale: float = 1.0,
    rows: str = "unit",
) -> list["SAESpec"]:
    """The cells as autoencoders of an ensemble (see SAESpec); its name determines a cell's start.

    own_lr: whether each family has the learning rate that suits it, times the ensemble's
    x_scale: that gives x a mean square norm of 1, for families that need it
    """
    from sparse_coding.sae.spec import SAESpec  # loads torch

    def start(cell: Cell) -> int:
        of_sparsity = (cell.l1_exp, cell.target_l0) if tied else (cell.l1_exp,)
        return named_seed(cell.seed, "start", cell.n_dict, *of_sparsity)

    def weight(cell: Cell) -> float:  # of the penalty, at first
        given = cell.l1_alpha / l1_divisor(l1_normalisation, cell.n_dict)
        return FAMILIES[cell.arch].first_weight(round(cell.n_dict / 2.0**cell.size_exp)) or given

    return [
        SAESpec(
            n_dict=cell.n_dict,
            l1=weight(cell),
            seed=start(cell),
            tied=tied,
            target_l0=cell.target_l0,
            arch=cell.arch,
            prefixes=prefixes,
            lr_factor=FAMILIES[cell.arch].lr if own_lr else 1.0,
            rows=rows,
            x_scale=x_scale if FAMILIES[cell.arch].in_units else 1.0,
        )
        for cell in cells
    ]


def make_grid(base_size: int, *, seeds: range, l1_exps: range, size_exps: range) -> list[Cell]:
    """All cells, by seed, then size, then l1_alpha.

    Args:
        base_size: number of features at size_exp 0
    Raises:
        UserError: a size is no whole number of features.
    """
    smallest = base_size * 2.0**size_exps.start
    require(
        smallest == int(smallest) >= 1,
        f"smallest dictionary: {base_size} x 2^{size_exps.start} = {smallest:g} features, "
        "which is no whole number: raise the low end of the sizes",
    )
    return [
        Cell(seed, l1_exp, size_exp, int(base_size * 2.0**size_exp))
        for seed in seeds
        for size_exp in size_exps
        for l1_exp in l1_exps
    ]


def check_grid(config: object, size_axis: str) -> None:
    """Raises UserError for a flag of the grid out of its range.

    Args:
        config: with the fields seed, n_seeds, l1_exp_low, l1_exp_high, <size_axis>_low and _high
        size_axis: dict_ratio_exp, expansion_exp
    """
    require_flag(config, "n_seeds", 1 <= config.n_seeds <= 1000, "between 1 and 1000")
    require_flag(config, "seed", config.seed >= 0, "at least 0")
    for axis in ("l1_exp", size_axis):
        low, high = getattr(config, f"{axis}_low"), getattr(config, f"{axis}_high")
        require_flag(config, f"{axis}_low", low >= -40, "at least -40")
        require_flag(
            config, f"{axis}_high", low < high <= 40, f"above the low end {low}, at most 40"
        )


def split_by_cost(cells: list[Cell], n_shards: int) -> list[list[Cell]]:
    """Cells dealt to shards, largest first to the lightest one; each keeps the grid's order.

    Cost of a cell is its n_dict: all GEMMs are linear in it.
    """
    shards: list[list[Cell]] = [[] for _ in range(n_shards)]
    load = [0] * n_shards
    for cell in sorted(cells, key=lambda c: (-c.n_dict, c.seed, c.arch, c.l1_exp)):
        lightest = min(range(n_shards), key=lambda i: (load[i], i))
        shards[lightest].append(cell)
        load[lightest] += cell.n_dict
    order = {cell: i for i, cell in enumerate(cells)}
    return [sorted(shard, key=order.__getitem__) for shard in shards]


def plan_groups(
    cells: list[Cell], budget: float, memory_of: Callable[[list[Kind]], int]
) -> list[list[Cell]]:
    """Groups to train one after the other: of one seed and world each, none larger than the
    budget.

    Args:
        budget: bytes of memory
        memory_of: bytes that an ensemble of these kinds of cells needs
    Raises:
        UserError: a single cell exceeds the budget.
    """
    groups: list[list[Cell]] = []
    for cell in cells:
        alone = memory_of([cell.kind])
        require(
            alone <= budget,
            f"n_dict {cell.n_dict} needs {alone / 1e9:.2f} GB, {budget / 1e9:.2f} GB are free: "
            "lower the high end of the sizes, or raise --max-memory-gb if it is set",
        )
        group = groups[-1] if groups and groups[-1][0].data == cell.data else []
        if group and memory_of([c.kind for c in [*group, cell]]) <= budget:
            group.append(cell)
        else:
            groups.append([cell])
    return groups


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`. `by_torchrun`: the other parts are ranks that we can wait for."""

    index: int = 0
    count: int = 1
    by_torchrun: bool = False

    @property
    def suffix(self) -> str:
        """For names of files that each shard writes for itself: "" if there is one shard only."""
        return "" if self.count == 1 else f"-shard-{self.index + 1}-of-{self.count}"


def find_shard(flag: str) -> Shard:
    """The shard of --shard i/N (i from 1), else of torchrun's environment, else the whole.

    Raises:
        UserError: not i/N with 1 <= i <= N, or both.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not flag:
        rank = int(os.environ.get("RANK", 0))
        return Shard(rank, world_size, by_torchrun=True) if world_size > 1 else Shard()
    require(world_size == 1, f"--shard {flag} under torchrun, which shards by itself: use one")
    try:
        index, count = (int(part) for part in flag.split("/"))
    except ValueError:
        raise UserError(f"--shard {flag} must be i/N, for example 1/4") from None
    require(1 <= index <= count, f"--shard {flag} must be i/N with 1 <= i <= N, for example 1/4")
    return Shard(index - 1, count)


def wait_for_all_ranks() -> None:
    """Returns when every rank of torchrun has called it."""
    import torch.distributed as dist

    # a rank waits for the slowest one: days, not the default half hour
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    dist.barrier()
    dist.destroy_process_group()
