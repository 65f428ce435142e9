"""Synthetic data with known features: a world, and a stream of batches drawn from it.

Source: Sharkey, Braun, Millidge (2022), "Taking features out of superposition with sparse
autoencoders", section on the toy data. The law `june2023` is what the replication code of June 2023
drew instead; published figures were made with it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_coding.config import named_seed, require_flag
from sparse_coding.files import Damaged, read_tensors, write_tensors
from sparse_coding.sweep.grid import Cell

LAWS = ("post", "june2023")
TINY = 1e-30  # below it v < p holds for v = 0 only


@dataclass(frozen=True)
class ToyData:
    """The law of the data and its constants (defaults and meaning: replicate_toy_models.py).

    n_active: k, features active on average in a sample
    feature_prob_decay: λ, feature g is active in proportion to λ^g
    noise_std: standard deviation of the normal noise added to every dimension of x
    """

    law: str
    activation_dim: int
    n_true_features: int
    n_active: float
    feature_prob_decay: float
    noise_std: float
    batch_size: int
    n_projection = None  # of the metric s_dec, which is not taken
    eval_batch_size = 256  # as in 2023; the samples are the same whatever batch_size is

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range; their names are those of the flags."""
        for name in ("activation_dim", "n_true_features", "batch_size"):
            require_flag(self, name, getattr(self, name) >= 1, "at least 1")
        most = self.n_true_features
        rule = f"above 0 and at most --n-true-features {most}"
        require_flag(self, "n_active", 0 < self.n_active <= most, rule)
        require_flag(self, "feature_prob_decay", 0 < self.feature_prob_decay <= 1, "in (0, 1]")
        require_flag(self, "noise_std", 0 <= self.noise_std < float("inf"), "at least 0 and finite")

    @property
    def identity(self) -> dict[str, str]:
        """What the numbers depend on beside the flags: nothing."""
        return {}

    @property
    def n_bytes(self) -> int:
        """Of A, Σ and one more while they are made."""
        return 3 * 8 * self.n_true_features**2

    def world_of(self, cell: Cell) -> int:
        """The seed of a cell's world: a seed is a whole replication."""
        return cell.seed

    def features(self, world_seed: int) -> Tensor:
        """Those of World."""
        return make_world(self, world_seed).features

    def scale(self, world_seed: int) -> float:
        """By which x is multiplied before it is trained on."""
        return 1.0

    def stream(
        self, world_seed: int, *, batch_size: int, batch_seed: int, device: torch.device
    ) -> "ToyStream":
        """Batches of a world."""
        of_size = replace(self, batch_size=batch_size)
        world = make_world(self, world_seed)
        return ToyStream(of_size, world, batch_seed=batch_seed, device=device)

    def flags(self, cell: Cell) -> dict:
        """Those that --evaluate needs for the world of the cell."""
        return {"data_law": self.law} | {k: v for k, v in asdict(self).items() if k != "law"}

    def worlds(self, seeds: list[int]) -> dict[str, "WorldFile"]:
        """By its name below a run folder, what holds the true features F and Σ of every seed."""

        def write(path: Path) -> None:
            made = {seed: make_world(self, seed) for seed in seeds}
            tensors = {f"seed{seed}.features": world.features for seed, world in made.items()}
            tensors |= {f"seed{seed}.covariance": world.covariance for seed, world in made.items()}
            write_tensors(path, tensors)

        def check(path: Path) -> None:
            if {f"seed{seed}.features" for seed in seeds} - read_tensors(path)[0].keys():
                raise Damaged(path, "it holds other tensors")

        return {"world.safetensors": WorldFile(write, check)}


class WorldFile(NamedTuple):
    """What writes a file of worlds, and what raises Damaged if it is not as it was written."""

    write: Callable[[Path], None]
    check: Callable[[Path], None]


@dataclass(frozen=True)
class World:
    """True features and how they go together.

    features: (n_true_features, activation_dim), rows of length 1
    factor: (n_true_features, n_true_features); z = factor @ n has covariance factor @ factor.T
        for standard normal n
    """

    features: Tensor
    factor: Tensor

    @property
    def covariance(self) -> Tensor:
        """Σ, (n_true_features, n_true_features)."""
        return self.factor @ self.factor.T


def make_world(data: ToyData, seed: int) -> World:
    """The world of a seed; drawn on the CPU in float64, hence the same for every device."""
    n = data.n_true_features
    rng = torch.Generator().manual_seed(named_seed(seed, "features"))
    features = torch.randn(n, data.activation_dim, generator=rng, dtype=torch.float64)
    features /= features.norm(dim=1, keepdim=True)
    rng = torch.Generator().manual_seed(named_seed(seed, "covariance"))
    make_factor = _post_factor if data.law == "post" else _june2023_factor
    return World(features.float(), make_factor(n, rng).float())


def _post_factor(n: int, rng: torch.Generator) -> Tensor:
    """Σ = A Aᵀ of a standard normal A, rescaled to unit diagonal: rows of A of length 1."""
    A = torch.randn(n, n, generator=rng, dtype=torch.float64)
    return A / A.norm(dim=1, keepdim=True)


def _june2023_factor(n: int, rng: torch.Generator) -> Tensor:
    """Σ = (U + Uᵀ)/2, uniform U, minus 1.001 λ_min on the diagonal: z has a std near 3.1."""
    U = torch.rand(n, n, generator=rng, dtype=torch.float64)
    sigma = (U + U.T) / 2
    smallest = torch.linalg.eigvalsh(sigma)[0]
    sigma -= 1.001 * smallest.clamp(max=0) * torch.eye(n, dtype=torch.float64)
    return torch.linalg.cholesky(sigma)


class ToyStream:
    """Batches of the world: batch(step) is a pure function of (world, batch seed, step).

    So every shard, every resume and every grid sees the same batches on one kind of device.
    """

    def __init__(self, data: ToyData, world: World, *, batch_seed: int, device: torch.device):
        self.data, self.batch_seed = data, batch_seed
        self.features = world.features.to(device)
        self.factor = world.factor.to(device)
        g = torch.arange(data.n_true_features, dtype=torch.float64)
        self.decay = (data.feature_prob_decay**g).float().to(device)
        self.rng = torch.Generator(device)
        # The first call of erf in a process may differ in the last bits when threads share it
        # (seen in 2 of 9 starts, MKL 2024.2, LOG.md). These two are thrown away.
        for _ in range(2):
            torch.special.ndtr(torch.zeros(data.batch_size, data.n_true_features, device=device))

    def batch(self, step: int) -> Tensor:
        """x of one step, (batch_size, activation_dim)."""
        return self._draw(step)[0]

    def with_truth(self, step: int) -> tuple[Tensor, Tensor]:
        """The same, and which features are on in it, (batch_size, n_true_features) bool."""
        x, amplitudes = self._draw(step)
        return x, amplitudes > 0

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        """x and amplitudes."""
        self.rng.manual_seed(named_seed(self.batch_seed, step))
        amplitudes = (
            self._amplitudes_post() if self.data.law == "post" else self._amplitudes_june2023()
        )
        x = amplitudes @ self.features
        if self.data.noise_std:
            x += self.data.noise_std * torch.randn(x.shape, generator=self.rng, device=x.device)
        return x, amplitudes

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.features.device)

    def _sample_u(self, n_samples: int) -> Tensor:
        """u = Φ(z) with z ~ N(0, Σ), (n_samples, n_true_features)."""
        shape = (n_samples, len(self.features))
        n = torch.randn(shape, generator=self.rng, device=self.features.device)
        return torch.special.ndtr(n @ self.factor.T)

    def _bernoulli_times_uniform(self, p: Tensor) -> Tensor:
        """b∘a with b ~ Bernoulli(p), a ~ U[0, 1), (batch_size, n_true_features).

        From one uniform v: b = [v < p], and given v < p, v/p is uniform again.
        """
        v = self._uniform(self.data.batch_size, len(self.features))
        return _up_to(v, p)

    def _amplitudes_post(self) -> Tensor:
        p = self._sample_u(self.data.batch_size) * self.decay
        p *= self.data.n_active / p.sum(dim=1, keepdim=True)  # Σ p = k in each sample
        return self._bernoulli_times_uniform(p.clamp_(max=1))

    def _amplitudes_june2023(self) -> Tensor:
        p = self._sample_u(1) * self.decay  # one z for the whole batch
        p *= self.data.n_active / p.sum()
        amplitudes = self._bernoulli_times_uniform(p.clamp_(max=1))
        # a sample with no active feature gets one at random
        n_true = len(self.features)
        at_random = (self._uniform(self.data.batch_size) * n_true).long().clamp_(max=n_true - 1)
        empty = (amplitudes == 0).all(dim=1)
        one = torch.nn.functional.one_hot(at_random, n_true).to(amplitudes)
        amplitudes = torch.where(empty[:, None], one, amplitudes)
        return amplitudes * self._uniform(self.data.batch_size, n_true)  # the second uniform


def _up_to(v: Tensor, p: Tensor) -> Tensor:
    """v/p where v < p, else 0: torch.where(v < p, v / p, 0) in a third of its time on a CPU."""
    return (v / p.clamp(min=TINY)).mul_(v < p)  # never inf · 0
