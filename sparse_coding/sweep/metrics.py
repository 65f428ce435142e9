"""The metrics of a dictionary and of a whole ensemble, each formula once.

MMCS (mean max cosine similarity) is from Sharkey, Braun, Millidge (2022). Dictionaries and true
features are matrices whose rows are the features; rows need not have length 1 here.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.config import named_seed
from sparse_coding.sae.batches import inputs_and_targets
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.saved import SparseAutoencoder

RECOVERED = 0.9  # cosine similarity above which a true feature counts as recovered; ours
PAIR_BYTES = 12  # of a similarity while rows are matched: in float32, then in float64
MATCHED_BYTES = 2**28  # that several dictionaries may take, matched at the same time; ours
CHUNK = 4096  # dictionary rows compared at once: bounds memory at n_true x 4096 similarities


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside, whatever training uses: it would bias cosines near a threshold by 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_float32()
def max_cosine(features: Tensor, dictionary: Tensor) -> Tensor:
    """For each row of `features` the largest cosine similarity over rows of `dictionary`.

    Args:
        features: (n_features, activation_dim)
        dictionary: (..., n_dict, activation_dim)
    Returns:
        (..., n_features)
    """
    features = normalize(features, dim=-1)
    best = [
        (normalize(chunk, dim=-1) @ features.T).amax(dim=-2)  # (..., chunk, n_features) -> max
        for chunk in dictionary.split(CHUNK, dim=-2)
    ]
    return torch.stack(best).amax(dim=0)


def mmcs(features: Tensor, dictionary: Tensor) -> Tensor:
    """Mean over `features` of max_cosine. Not symmetric: mmcs(dictionary, features) is
    `mmcs_dict_to_truth`. Shapes as in max_cosine, result (...,)."""
    return max_cosine(features, dictionary).mean(dim=-1)


def mmcs_with_larger(dictionary: Tensor, larger: list[Tensor]) -> float | None:
    """Mean over (the next two) larger dictionaries of mmcs(dictionary, larger); None without one.

    Needs no ground truth: features found by this dictionary and by the larger ones are likely real.
    """
    if not larger:
        return None
    return sum(float(mmcs(dictionary, other)) for other in larger) / len(larger)


def n_matched(dictionary: Tensor, larger: list[Tensor]) -> int | None:
    """Features whose cosine similarity with some feature of the next larger dictionary exceeds
    RECOVERED; None without one."""
    if not larger:
        return None
    return int((max_cosine(dictionary, larger[0]) > RECOVERED).sum())


def chance_mmcs(features: Tensor, n_dict: int) -> float:
    """mmcs of one random dictionary of n_dict rows: what knowing nothing gives."""
    rng = torch.Generator().manual_seed(named_seed("chance"))
    random = torch.randn(n_dict, features.shape[1], generator=rng)
    return float(mmcs(features.cpu(), random))


def ceiling_mmcs(features: Tensor, n_dict: int) -> float:
    """mmcs if every dictionary row were an exact true feature (the first n_dict of them).

    A small dictionary can exceed it a little, with rows that lie between true features.
    """
    return float(mmcs(features, features[:n_dict]))


def agreement(W_dec: Tensor, features: Tensor) -> dict[str, float]:
    """mmcs, mmcs_dict_to_truth, n_recovered, mcc and uniqueness of one dictionary.

    Args:
        W_dec: (n_dict, activation_dim)
        features: the true ones, (n_true_features, activation_dim)
    """
    return next(agreements([W_dec], features))


def agreements(dictionaries: Iterable[Tensor], features: Tensor) -> Iterator[dict[str, float]]:
    """The same of each dictionary. Threads match them, which takes longest, while others are
    compared."""
    waiting = deque()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for W_dec in dictionaries:
            best, similarity = max_cosine(features, W_dec), matches(W_dec, features)
            found = {
                "mmcs": float(best.mean()),
                "mmcs_dict_to_truth": float(mmcs(W_dec, features)),
                "n_recovered": int((best > RECOVERED).sum()),
                "uniqueness": uniqueness(similarity),
            }
            waiting.append((found, pool.submit(mcc, similarity)))
            if len(waiting) >= matched_at_once(*similarity.shape):
                yield _matched(*waiting.popleft())
        for one in waiting:
            yield _matched(*one)


def _matched(found: dict[str, float], matching: Future) -> dict[str, float]:
    return found | {"mcc": matching.result()}


def matched_at_once(n_dict: int, n_features: int) -> int:
    """How many dictionaries are matched with true features at the same time."""
    most = MATCHED_BYTES // (PAIR_BYTES * n_dict * n_features)
    return max(1, min(torch.get_num_threads(), most))


@full_float32()
def matches(dictionary: Tensor, features: Tensor) -> Tensor:
    """|cosine similarity| of rows of both, (n_dict, n_features)."""
    return (normalize(dictionary, dim=-1) @ normalize(features, dim=-1).T).abs()


def mcc(similarity: Tensor) -> float:
    """Mean correlation coefficient: the mean |cosine| of the pairs of a one-to-one matching that
    makes it largest (Hungarian algorithm), over the smaller of both sides.

    As SynthSAEBench has it (Chanin, Garriga-Alonso 2026, https://arxiv.org/abs/2602.14687). NaN of
    a dictionary that is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    matrix = similarity.cpu().numpy()
    if not np.isfinite(matrix).all():
        return math.nan
    return float(matrix[linear_sum_assignment(matrix, maximize=True)].mean())


def uniqueness(similarity: Tensor) -> float:
    """Share of different features among the nearest of each row of a dictionary: 1 if no two rows
    are nearest to the same one. Same source; it counts collisions and matches nothing."""
    nearest = similarity.argmax(dim=1)
    return len(nearest.unique()) / len(nearest)


class DetectionSums:
    """Counts over batches, from which precision, recall and f1 follow: whether each latent is on
    where the feature nearest to it is on.

    Source: as of mcc. A latent is a row of the dictionary; it is on where its code is not 0.

    nearest: (n_dict,) int64, of each latent
    """

    def __init__(self, nearest: Tensor):
        self.nearest = nearest
        self.on, self.true, self.both = (
            torch.zeros(len(nearest), dtype=torch.int64, device=nearest.device) for _ in range(3)
        )
        self.ratio = torch.zeros((), dtype=torch.float64, device=nearest.device)
        self.n_samples = torch.zeros((), dtype=torch.int64, device=nearest.device)

    def add(self, x: Tensor, x_hat: Tensor, codes: Tensor, truth: Tensor) -> None:
        """x, x_hat (batch, activation_dim), codes (batch, n_dict), truth (batch, n_features): what
        is on, bool."""
        # a row for each latent: rows are fetched and summed several times as fast as columns
        on, true = codes.T.bool().contiguous(), truth.T[self.nearest]
        for count, where in ((self.on, on), (self.true, true), (self.both, on & true)):
            count += where.sum(dim=1, dtype=torch.int32)
        length, of_x_hat = x.double().norm(dim=1), x_hat.double().norm(dim=1)
        self.ratio += torch.where(length > 0, of_x_hat / length, 0).sum()
        self.n_samples += (length > 0).sum()

    def result(self) -> dict[str, float]:
        """precision, recall and f1, each a mean over all latents of its own, 0 where it is
        undefined, as of dead ones; shrinkage, the mean of |x_hat| / |x| where x is not 0."""
        both = self.both.double()
        precision = torch.where(self.on > 0, both / self.on, 0.0)
        recall = torch.where(self.true > 0, both / self.true, 0.0)
        f1 = torch.where(self.both > 0, 2 * both / (self.on + self.true), 0.0)
        means = {"precision": precision, "recall": recall, "f1": f1}
        found = {name: float(of_latents.mean()) for name, of_latents in means.items()}
        return found | {"shrinkage": float(self.ratio / self.n_samples)}


class ReconstructionSums:
    """Sums over batches in float64, from which l0, l1, mse, fvu, n_dead and density follow.

    For a stack of `n_saes` autoencoders of one width on the same x. The result does not depend on
    how the samples were cut into batches.
    """

    def __init__(self, n_saes: int, n_dict: int, activation_dim: int, device: torch.device):
        self.n_samples = 0
        self.squared_error, self.code_sum = (
            torch.zeros(n_saes, dtype=torch.float64, device=device) for _ in range(2)
        )
        self.n_fired = torch.zeros(n_saes, n_dict, dtype=torch.int64, device=device)
        self.x_sum = torch.zeros(activation_dim, dtype=torch.float64, device=device)
        self.x_squared = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, x_hat: Tensor, codes: Tensor) -> None:
        """x (batch, activation_dim), x_hat (n_saes, batch, activation_dim),
        codes feature-major (n_saes, n_dict, batch)."""
        self.n_samples += len(x)
        # one dimension at a time: torch sums down to a single number in another order, by threads,
        # so that one autoencoder alone would differ from itself among others
        for i, (own_codes, own_x_hat) in enumerate(zip(codes, x_hat, strict=True)):
            # one by one: copies in float64 of one autoencoder at a time
            self.squared_error[i] += (own_x_hat - x).double().square().sum(dim=1).sum(dim=0)
            self.code_sum[i] += own_codes.sum(dim=1, dtype=torch.float64).sum(dim=0)
            self.n_fired[i] += (own_codes > 0).sum(dim=1, dtype=torch.int32)  # 4 times as fast
        self.x_sum += x.double().sum(dim=0)
        self.x_squared += x.double().square().sum()

    def result(self) -> dict[str, Tensor]:
        """l0, l1 (mean Σ codes), mse, fvu, n_dead, each (n_saes,).

        fvu = Σ(x − x_hat)² / Σ(x − mean x)²: 1 for predicting the mean, undefined (NaN) if x is
        constant.
        """
        x_variance = self.x_squared - self.x_sum.square().sum() / self.n_samples
        return {
            "l0": self.n_fired.sum(dim=1).double() / self.n_samples,
            "l1": self.code_sum / self.n_samples,
            "mse": self.squared_error / (self.n_samples * len(self.x_sum)),
            "fvu": self.squared_error / x_variance,
            "n_dead": (self.n_fired == 0).sum(dim=1),
        }

    def density(self) -> Tensor:
        """Share of the samples on which each feature is active, (n_saes, n_dict)."""
        return self.n_fired.double() / self.n_samples


def decoder_projection(x: Tensor, W_dec: Tensor, b_dec: Tensor, n: int) -> float:
    """s_n^dec: the (n · batch)-th largest entry of (x − b_dec) W_decᵀ, for an n somewhat above the
    l0 that is sought. Over autoencoders of several l0 it is least where that is right, since at any
    other one rows mix features and more of them look alike to x.

    Source: Chanin, Garriga-Alonso 2025, https://arxiv.org/abs/2508.16560

    Args:
        x: (batch, activation_dim)
        W_dec: (n_dict, activation_dim), n_dict above n, rows of length 1
        b_dec: (activation_dim,)
    """
    entries = ((x - b_dec) @ W_dec.T).flatten()
    return float(entries.kthvalue(len(entries) - n * len(x)).values)


class Scores:
    """What a row of results.csv says of an autoencoder on samples whose true features are known.

    features: (n_true_features, activation_dim)
    n: of s_dec, the mean of decoder_projection over batches; None: without it
    """

    def __init__(self, sae: SparseAutoencoder, features: Tensor, n: int | None = None):
        self.sums = ReconstructionSums(1, sae.n_dict, sae.activation_dim, sae.W_dec.device)
        self.detection = DetectionSums(matches(sae.W_dec, features).argmax(dim=1))
        self.sae, self.n = sae, n if n is None or n < sae.n_dict else None
        self.s_dec: list[float] = []

    def add(self, x: Tensor, x_hat: Tensor, codes: Tensor, truth: Tensor) -> None:
        """As DetectionSums.add."""
        self.sums.add(x, x_hat.unsqueeze(0), codes.T.unsqueeze(0))
        self.detection.add(x, x_hat, codes, truth)
        if self.n is not None:
            self.s_dec.append(decoder_projection(x, self.sae.W_dec, self.sae.b_dec, self.n))

    def add_own(self, x: Tensor, truth: Tensor) -> None:
        """The same of what the autoencoder itself makes of x."""
        codes = self.sae.encode(x)
        self.add(x, self.sae.decode(codes), codes, truth)

    def result(self) -> dict[str, float]:
        """That of both sums, explained_variance, 1 − fvu, and s_dec."""
        found = {name: value.item() for name, value in self.sums.result().items()}
        found |= self.detection.result() | {"explained_variance": 1 - found["fvu"]}
        return found | ({"s_dec": fmean(self.s_dec)} if self.s_dec else {})


def reconstructed(sae: SparseAutoencoder, x: Tensor, y: Tensor, sums: ReconstructionSums) -> Tensor:
    """x_hat of x, both (n, activation_dim), counted in the sums of this one autoencoder. y: what
    x_hat is of: x but of transcoders."""
    codes = sae.encode(x)
    x_hat = sae.decode(codes, x)
    sums.add(y, x_hat.unsqueeze(0), codes.T.unsqueeze(0))
    return x_hat


@full_float32()
def reconstruction(ensemble: Ensemble, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """l0, l1, mse, fvu, n_dead over all samples of the batches, in the order of the specs.

    Args:
        batches: each (batch_size, activation_dim), of transcoders (2, batch_size, activation_dim)
    """
    h, device = ensemble.activation_dim, ensemble.scratch.device
    sums = [ReconstructionSums(len(s.specs), s.n_dict, h, device) for s in ensemble.stacks]
    for batch in batches:
        (x,), (y,) = inputs_and_targets(batch[None])
        for stack, total in zip(ensemble.stacks, sums, strict=True):
            codes, x_hat = stack.forward(x)
            total.add(y, x_hat, codes)
    return _in_order(ensemble, [total.result() for total in sums])


def training_state(ensemble: Ensemble, x: Tensor, features: Tensor) -> dict[str, list[float]]:
    """What is logged while training: loss and l0 on the last batch, mmcs with the features."""
    on_batch = reconstruction(ensemble, [x])
    of_stacks = [
        torch.stack([mmcs(features, W) for W in stack.W_dec]).tolist()  # a GPU is waited for once
        for stack in ensemble.stacks
    ]
    return {
        "train/mse": on_batch["mse"],
        "train/l0": on_batch["l0"],
        "metrics/mmcs": ensemble.in_order(of_stacks),
    }


def _in_order(ensemble: Ensemble, per_stack: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    return {k: ensemble.in_order([d[k].tolist() for d in per_stack]) for k in per_stack[0]}
