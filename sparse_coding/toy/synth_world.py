"""Worlds of many features: hierarchical, correlated, in superposition.

The law is that of SynthSAEBench (Chanin, Garriga-Alonso 2026, https://arxiv.org/abs/2602.14687),
as the package that defines it draws it; its 16 384 features of width 768 are the benchmark.

    rates       p of feature i falls as a power of i + 1, from MOST to LEAST
    trees       features in breadth-first order: n / 128 roots, BRANCHING children each, DEPTH
                levels below the roots; the rest are free. Siblings exclude each other. p of a child
                is divided by its parent's and raised by its siblings' (see corrected)
    copula      z = loadings · ε + diagonal · η of standard normal ε (RANK numbers) and η;
                a feature is a candidate where z > threshold, that is with probability p
    magnitude   max(0, mean + std · normal); 0 is off
    hierarchy   a child is on if it is a candidate and its parent is on; of several siblings one,
                at random, stays; a child's magnitude is times its parent's / the parent's mean
                (scaled: False leaves that out, as the first version of the benchmark did)
    x           Σ magnitude · row of features + bias; rows are of length 1 and nearly orthogonal

Sparse but Wrong (Chanin, Garriga-Alonso 2025, https://arxiv.org/abs/2508.16560) has a smaller one:
orthogonal features without trees, whose rates fall linearly, and a dense copula of both signs.
"""

import hashlib
import io
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.config import UserError, first_line, named_seed, passing_bar, require
from sparse_coding.files import write_atomic
from sparse_coding.sae.engines.cpu_compile import one_thread_here

EXPONENT, MOST, LEAST = 0.5, 0.4, 5e-4  # of the rates
FEATURES_PER_ROOT, BRANCHING, DEPTH = 128, 4, 3  # of the trees
IN_TREE = sum(BRANCHING**level for level in range(DEPTH + 1))
RANK, LOADING, LEAST_SQUARE = 25, 0.1, 0.01  # of the copula: the least square of a diagonal
MEANS, STD_MEAN, STD_STD = (5.0, 4.0), 0.5, 0.5  # of magnitudes: falling linearly; |normal|
BIAS = 0.5  # its length
MATCHING = 1e-4  # between probability and what threshold says, in files
FARTHEST = 10.0  # threshold, in place of infinite ones; z passes it once in 1e23 samples
# by numpy and zipfile, of a file that is no npz or a damaged one
UNREADABLE = (OSError, ValueError, LookupError, EOFError, BadZipFile, MemoryError, OverflowError,
              NotImplementedError, SyntaxError, TokenError, TypeError, zlib.error)  # fmt: skip
ORTHOGONAL_STEPS, ORTHOGONAL_LR, CHUNK = 100, 3e-4, 1024
# of Sparse but Wrong: rates from the first to one beyond the last; magnitudes; of pairs of features
# the share that is correlated, and how strongly
FIRST, BEYOND, NORMAL = 0.395, 0.05, (1.0, 0.15)
CORRELATED, STRENGTHS = 0.7, (0.3, 0.9)
# least eigenvalue of the correlations before their diagonal is 1 again: the paper has 1e-6, from
# which a diagonal of the copula would be lost in float32
LEAST_EIGENVALUE = 1e-3


@dataclass(frozen=True)
class SynthWorld:
    """What x is drawn from; float32 on the CPU but for parent. The names are those of its file.

    probability: of being a candidate
    threshold: of z, where that has this probability
    """

    features: Tensor  # (n, activation_dim)
    bias: Tensor  # (activation_dim,)
    parent: Tensor  # (n,) int32; -1: none
    probability: Tensor  # (n,)
    threshold: Tensor  # (n,)
    loadings: Tensor  # (n, rank)
    diagonal: Tensor  # (n,)
    mean: Tensor  # (n,)
    std: Tensor  # (n,)

    @property
    def children(self) -> Tensor:
        """(n, most children), -1 where there are fewer."""
        found: list[list[int]] = [[] for _ in self.parent]
        for child, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                found[parent].append(child)
        most = max(map(len, found))
        rows = [row + [-1] * (most - len(row)) for row in found]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), most)

    @property
    def depth(self) -> Tensor:
        """(n,) int64: steps to the root."""
        parents, depth = self.parent.tolist(), []
        for parent in parents:  # a parent comes before its children
            depth.append(0 if parent < 0 else depth[parent] + 1)
        return torch.tensor(depth)


def base_rates(n: int) -> Tensor:
    """p of each feature before the trees correct it, float64."""
    r = torch.arange(1, n + 1, dtype=torch.float64) ** -EXPONENT
    return LEAST + (MOST - LEAST) * (r - r[-1]) / (r[0] - r[-1])


def parents(n: int) -> Tensor:
    """(n,) int32, -1 for roots and free features."""
    n_roots = max(1, n // FEATURES_PER_ROOT)
    in_trees = min(n, n_roots * IN_TREE)
    i = torch.arange(n, dtype=torch.int32)
    child = (i >= n_roots) & (i < in_trees)
    return torch.where(child, (i - n_roots) // BRANCHING, -1)


def corrected(base: Tensor, parent: Tensor) -> Tensor:
    """Rates of candidates: p / p_parent · (1 + Σ p of the siblings / p_parent), at most 1.

    It does not bring the base rates back, since the parents' own are lower than p_parent; that is
    the benchmark's law.
    """
    of_children = torch.zeros_like(base)
    is_child = parent >= 0
    above = parent[is_child].long()
    of_children.index_add_(0, above, base[is_child])
    p = base.clone()
    siblings = of_children[above] - base[is_child]
    p[is_child] = base[is_child] / base[above] * (1 + siblings / base[above])
    return p.clamp(max=1)


def make_synth_world(
    n: int, activation_dim: int, seed: int, *, n_steps: int = ORTHOGONAL_STEPS
) -> SynthWorld:
    """The world of a seed, drawn on the CPU, the same for every device and number of threads.

    n_steps: of orthogonalising, 4 n² activation_dim operations each; a bar shows them if they take
        long
    """
    parent = parents(n)
    p = corrected(base_rates(n), parent)

    def normals(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=_rng(seed, name), dtype=torch.float64)

    loadings = LOADING * normals("loadings", n, RANK)
    squares = loadings.square().sum(dim=1, keepdim=True)
    loadings *= ((1 - LEAST_SQUARE) / squares).clamp(max=1).sqrt()
    features = normalize(normals("features", n, activation_dim)).float()
    bias = BIAS * normalize(normals("bias", activation_dim), dim=0)
    tensors = dict(
        bias=bias,
        probability=p,
        threshold=_thresholds(p),
        loadings=loadings,
        diagonal=(1 - loadings.square().sum(dim=1)).sqrt(),
        mean=torch.linspace(*MEANS, n, dtype=torch.float64),
        std=(STD_MEAN + STD_STD * normals("std", n)).abs(),
    )
    return SynthWorld(
        features=orthogonalised(features, n_steps),
        parent=parent,
        **{name: tensor.float() for name, tensor in tensors.items()},
    )


def _rng(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(named_seed(seed, name))


def _thresholds(p: Tensor) -> Tensor:
    return (math.sqrt(2) * torch.special.erfinv(1 - 2 * p)).clamp(-FARTHEST, FARTHEST)


def make_correlated_world(n: int, activation_dim: int, seed: int) -> SynthWorld:
    """The world of a seed as in Sparse but Wrong; n is at most activation_dim.

    The copula's correlations C are those of _correlations; with eigenvalues and vectors of C before
    its diagonal is 1 again, loadings are those above the least one and the rest is the diagonal.
    """
    rng = _rng(seed, "orthogonal features")
    square = torch.randn(activation_dim, activation_dim, generator=rng, dtype=torch.float64)
    p = BEYOND + (FIRST - BEYOND) * torch.arange(n - 1, -1, -1, dtype=torch.float64) / n
    loadings, diagonal = _factors(_correlations(n, _rng(seed, "correlations")))
    tensors = dict(
        features=torch.linalg.qr(square)[0][:n],
        bias=torch.zeros(activation_dim),
        probability=p,
        threshold=_thresholds(p),
        loadings=loadings,
        diagonal=diagonal,
        mean=torch.full((n,), NORMAL[0]),
        std=torch.full((n,), NORMAL[1]),
    )
    parent = torch.full((n,), -1, dtype=torch.int32)
    return SynthWorld(parent=parent, **{name: t.float() for name, t in tensors.items()})


def _correlations(n: int, rng: torch.Generator) -> Tensor:
    """(n, n): of a random share of the pairs, half of them negative; no correlations yet, since
    such a matrix has negative eigenvalues."""
    pairs = torch.combinations(torch.arange(n))
    pairs = pairs[torch.randperm(len(pairs), generator=rng)][: round(CORRELATED * len(pairs))]
    low, high = STRENGTHS
    strength = low + (high - low) * torch.rand(len(pairs), generator=rng, dtype=torch.float64)
    strength[len(pairs) // 2 :] *= -1
    C = torch.eye(n, dtype=torch.float64)
    C[pairs[:, 0], pairs[:, 1]] = C[pairs[:, 1], pairs[:, 0]] = strength
    return C


def _factors(C: Tensor) -> tuple[Tensor, Tensor]:
    """(loadings (n, rank), diagonal (n,)) of C, eigenvalues raised to LEAST_EIGENVALUE, rescaled to
    variances of 1."""
    values, vectors = torch.linalg.eigh(C)
    values = (values - LEAST_EIGENVALUE).clamp(min=0)
    loadings = (vectors * values.sqrt())[:, values > 0]
    scale = (loadings.square().sum(dim=1) + LEAST_EIGENVALUE).rsqrt()
    return loadings * scale[:, None], LEAST_EIGENVALUE**0.5 * scale


def orthogonalised(features: Tensor, n_steps: int = ORTHOGONAL_STEPS) -> Tensor:
    """Rows (n, activation_dim) after steps of Adam on Σ_{i≠j} (d_i · d_j)² + n Σ_i (|d_i|² − 1)²,
    then of length 1.

    In chunks of rows, a thread each, so that no bit depends on how many there are.
    """
    if not n_steps:  # torch's optimizers take two seconds to import
        return normalize(features)
    D = torch.nn.Parameter(features.clone(), requires_grad=False)
    D.grad = torch.empty_like(D)
    adam = torch.optim.Adam([D], lr=ORTHOGONAL_LR)
    starts = range(0, len(D), CHUNK)

    def gradient(start: int) -> None:
        rows = D[start : start + CHUNK]
        cosines = rows @ D.T
        squared_length = rows.square().sum(dim=1, keepdim=True)
        cosines[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 0
        pull = 4 * len(D) * (squared_length - 1) * rows
        D.grad[start : start + CHUNK] = torch.addmm(pull, cosines, D, alpha=4)

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=one_thread_here) as pool:
        for _ in passing_bar(range(n_steps), desc="orthogonal features", unit="step"):
            list(pool.map(gradient, starts))
            adam.step()
    return normalize(D.detach())


def read_world(path: Path) -> SynthWorld:
    """A world that was drawn elsewhere: an npz of the arrays of SynthWorld.

    Raises:
        UserError: an array is missing, has another shape or numbers that make no world.
    """
    names = [field.name for field in fields(SynthWorld)]
    try:
        with np.load(path, allow_pickle=False) as file, np.errstate(all="ignore"):
            arrays = {  # a part that is no array is bytes
                name: np.asarray(file[name]).astype(np.int32 if name == "parent" else np.float32)
                for name in names
            }
    except UNREADABLE as error:
        raise UserError(
            f"{path} is no world: {first_line(error)}. It is an npz of {', '.join(names)}"
        ) from error
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["threshold"].clamp_(-FARTHEST, FARTHEST)
    world = SynthWorld(**tensors)
    _check(world, path)
    return world


def _check(world: SynthWorld, path: Path) -> None:
    """Raises UserError where arrays do not go together."""

    def need(holds: object, what: str) -> None:
        require(bool(holds), f"{path} is no world: {what}")

    need(world.features.dim() == 2 and len(world.features), "features is no matrix")
    n, h = world.features.shape
    shapes = {"bias": (h,), "loadings": (n, world.loadings.shape[-1])}
    for name in (field.name for field in fields(SynthWorld) if field.name != "features"):
        shape, found = shapes.get(name, (n,)), tuple(getattr(world, name).shape)
        need(found == shape, f"{name} has the shape {found}, not {shape}")
        need(getattr(world, name).isfinite().all(), f"{name} has numbers that are not finite")
    need(world.features.isfinite().all(), "features has numbers that are not finite")
    before = torch.arange(n)
    ordered = ((world.parent >= -1) & (world.parent < before)).all()
    need(ordered, "parent: each comes before its children, and is -1 where there is none")
    p, z = world.probability, world.threshold
    need(((p >= 0) & (p <= 1)).all(), "probability has numbers outside 0 to 1")
    off = (torch.special.ndtr(-z) - p).abs().max()
    need(off < MATCHING, f"threshold is not that of probability: off by up to {off:.3g}")
    need((world.diagonal > 0).all(), "diagonal has numbers that are not above 0")
    need((world.std >= 0).all(), "std has numbers below 0")
    parents_mean = world.mean[world.parent[world.parent >= 0].long()]
    need((parents_mean > 0).all(), "mean of a parent is not above 0")


def write_world(world: SynthWorld, path: Path) -> None:
    """That file of a world, whole or not at all; its folder is made."""
    buffer = io.BytesIO()
    np.savez(buffer, **{field.name: getattr(world, field.name).numpy() for field in fields(world)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def digest(world: SynthWorld) -> str:
    """16 hex digits of its arrays."""
    arrays = (getattr(world, field.name).numpy() for field in fields(world))
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def constants() -> dict[str, tuple[float, ...]]:
    """All numbers above that a drawn world depends on."""
    named = {k: v if isinstance(v, tuple) else (v,) for k, v in globals().items() if k.isupper()}
    return {k: v for k, v in named.items() if all(isinstance(number, float | int) for number in v)}
