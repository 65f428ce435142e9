"""What the autoencoders of an ensemble are: sizes, starts, schedule, and the numbers of a step."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.sae.families import FAMILIES, K_FALL, K_START, PREFIXES, Rows

TIED = 0.5  # length of encoder rows at a tied start; ours, 0.2 does as well, 1 worse (LOG.md)
SHORT = 0.1  # length of free rows at a tied start, and of encoder rows; as in SAELens
BETAS = 0.9, 0.999  # of Adam
DORMANT = 64  # steps without firing, in the last of which a feature makes all moves left (cpu_adam)
REMAINING = 1 / (1 - BETAS[0] / BETAS[1] ** 0.5)  # these, in terms of the first of them
# Of the controller that finds l1 for a target l0, per step; ours, LOG.md
L0_GAIN = 0.016  # d log l1 / d log(l0 / target): its time constant is some sixty steps
L0_CLAMP = 2.0  # l0 further off than this factor counts as this: the start is no measurement
DEAD_STEPS = 1000  # without firing, after which a feature counts as dead; as in SAELens
DEAD_SHARE = 4  # of shorter runs than 4 000 steps it is a quarter
P_END = 0.2  # of p-annealing; Karvonen et al. 2024


@dataclass(frozen=True)
class SAESpec:
    """One autoencoder of an ensemble.

    l1: weight of the penalty in the loss, of relu mean Σ codes: l1_alpha times its normalisation
        (sweep/grid.py)
    seed: of its start
    tied: start with W_enc = W_decᵀ / 2 and b_enc = 0 instead of torch.nn.Linear's
    target_l0: k, where the family has it; else l1 is only where a controller starts that seeks this
        l0, and 0 means that l1 stays
    arch: its family, a name in FAMILIES
    prefixes: of nested ones, shares of n_dict, ascending to 1
    rows: of W_dec: unit: of length 1; free or raw: of any, see stack.py
    lr_factor: of the ensemble's learning rate; the same for all of one family
    x_scale: it trains on x times this, and so are its parameters; what it is asked for and what it
        gives are in units of x. The same for all of one family
    transcodes: it predicts another site's y from x, see stack.py; skip: with a skip connection
    """

    n_dict: int
    l1: float
    seed: int
    tied: bool = False
    target_l0: float = 0.0
    arch: str = "relu"
    prefixes: tuple[float, ...] = PREFIXES
    rows: Rows = "unit"
    lr_factor: float = 1.0
    x_scale: float = 1.0
    transcodes: bool = False
    skip: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what has no formulas in stack.py."""
        if self.transcodes and (FAMILIES[self.arch].refined or self.x_scale != 1):
            raise ValueError("a transcoder neither refines its codes nor scales its x")
        if self.skip and not self.transcodes:
            raise ValueError("a skip connection is a transcoder's")

    @property
    def seeks_l0(self) -> bool:
        """Whether a controller moves l1."""
        return self.target_l0 > 0 and not FAMILIES[self.arch].has_k


def dead_steps(n_steps: int) -> int:
    """Steps without firing after which a feature counts as dead, in a run of n_steps."""
    return min(DEAD_STEPS, max(1, n_steps // DEAD_SHARE))


class StepNumbers(NamedTuple):
    """What the kernels of all engines are told of one step, as an array in this order."""

    rate: float  # lr / (1 − β₁^t)
    root: float  # 1/√(1 − β₂^t)
    eps: float
    l1_factor: float
    seeks_l0: float  # 0 or 1
    project: float  # 0 or 1
    unit_rows: float  # 0 or 1
    p: float  # of p-annealing
    p_before: float  # that of the step before
    k_factor: float  # times k, of refined families


PLACE = StepNumbers(*range(len(StepNumbers._fields)))  # of each number in the array


class Factors(NamedTuple):
    """What a Schedule says of one step; share: of the steps, done before it."""

    lr: float = 1.0
    l1: float = 1.0
    seek_l0: bool = False
    p: float = 1.0
    p_before: float = 1.0
    share: float = 1.0

    @property
    def k(self) -> float:
        """Factor of the k of refined families, a float32, since kernels have it as one."""
        factor = K_START + (1 - K_START) * min(1.0, self.share / K_FALL)
        return float(np.float32(factor))


@dataclass(frozen=True)
class Schedule:
    """Factors of the learning rate and of l1 over the steps. The default is constant.

    lr_warmup, l1_warmup: steps of linear growth from 0
    eps: of Adam, throughout
    decay_start: step from which the learning rate falls linearly, to 0 at n_steps
    anneal: steps in which p of p-annealing falls from 1 to P_END, linearly
    dead_steps: without firing, after which a feature counts as dead
    """

    n_steps: int = 0
    lr_warmup: int = 0
    l1_warmup: int = 0
    decay_start: int | None = None
    eps: float = 1e-8
    anneal: range | None = None
    dead_steps: int = DEAD_STEPS

    def lr_factor(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / (self.lr_warmup + 1))
        if self.decay_start is None or step < self.decay_start:
            return rise
        return rise * (self.n_steps - step) / (self.n_steps - self.decay_start)

    def l1_factor(self, step: int) -> float:
        """Factor of l1 at a step, counted from 0."""
        return min(1.0, step / self.l1_warmup) if self.l1_warmup else 1.0

    def seeks_l0(self, step: int) -> bool:
        """Whether the controller of l1 is at work: not while l1 is still rising."""
        return step >= self.l1_warmup

    def p(self, step: int) -> float:
        """The power of p-annealing at a step, counted from 0."""
        if self.anneal is None or step < self.anneal.start:
            return 1.0
        share = min(1.0, (step - self.anneal.start) / max(len(self.anneal), 1))
        return 1 - (1 - P_END) * share

    def at(self, step: int) -> Factors:
        """All factors of a step."""
        rising = (self.lr_factor(step), self.l1_factor(step), self.seeks_l0(step))
        share = step / self.n_steps if self.n_steps else 1.0
        return Factors(*rising, self.p(step), self.p(step - 1), share)


def initial_autoencoder(
    activation_dim: int,
    n_dict: int,
    seed: int,
    *,
    tied: bool = False,
    unit_rows: bool = True,
    transcodes: bool = False,
) -> dict[str, Tensor]:
    """The start of June 2023: W_enc, b_enc as torch.nn.Linear, W_dec orthogonal, rows of length 1.
    With `tied`: rows of W_dec uniform on the sphere, W_enc half its transpose, b_enc 0; rows that
    are free start SHORT, and W_enc as the transpose. A transcoder's W_enc has rows of its own, as
    long: what it reads is elsewhere than what it writes.

    Drawn on the CPU in float32. Feature-major as in a Stack: W_enc is (n_dict, activation_dim),
    the transpose of what Ensemble.dictionary and the saved files have.
    """
    rng = torch.Generator().manual_seed(seed)
    if tied:
        W_dec = normalize(torch.randn(n_dict, activation_dim, generator=rng), dim=1)
        of_dec, of_enc = (1.0, TIED) if unit_rows else (SHORT, SHORT)
        b_enc = torch.zeros(n_dict)
        W_enc = W_dec
        if transcodes:
            W_enc = normalize(torch.randn(n_dict, activation_dim, generator=rng), dim=1)
        return {"W_enc": of_enc * W_enc, "b_enc": b_enc, "W_dec": of_dec * W_dec}
    bound = activation_dim**-0.5  # torch.nn.Linear: U(−1/√fan_in, 1/√fan_in) for weight and bias
    W_enc = torch.empty(n_dict, activation_dim).uniform_(-bound, bound, generator=rng)
    b_enc = torch.empty(n_dict).uniform_(-bound, bound, generator=rng)
    W_dec = torch.nn.init.orthogonal_(torch.empty(n_dict, activation_dim), generator=rng)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": normalize(W_dec, dim=1)}


def stacked_starts(
    specs: list[SAESpec], activation_dim: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Those of several of one kind: name -> (n_saes, ...)."""
    starts = [
        initial_autoencoder(
            activation_dim,
            spec.n_dict,
            spec.seed,
            tied=spec.tied,
            unit_rows=spec.rows == "unit",
            transcodes=spec.transcodes,
        )
        for spec in specs
    ]
    stacked = {
        name: torch.stack([start[name] for start in starts]).to(device, dtype) for name in starts[0]
    }
    if specs[0].skip:
        shape = len(specs), activation_dim, activation_dim
        stacked["W_skip"] = torch.zeros(shape, device=device, dtype=dtype)
    if dtype == torch.float64 and specs[0].rows == "unit":  # length 1 in the precision at hand
        stacked["W_dec"] = normalize(stacked["W_dec"], dim=2)
    return stacked
