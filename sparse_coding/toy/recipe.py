"""Cells of the toy replication as training needs them: data, starts, metrics, rows."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_coding.config import named_seed, passing_bar, require, require_flag
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.families import FAMILIES, PREFIXES, Kind
from sparse_coding.sae.saved import SparseAutoencoder, save_sae
from sparse_coding.sae.spec import Schedule, dead_steps
from sparse_coding.sweep.cells import merged_rows, sae_folder
from sparse_coding.sweep.grid import Cell, asked_and_found, specs_of
from sparse_coding.sweep.hardware import free_memory
from sparse_coding.sweep.metrics import (
    PAIR_BYTES,
    Scores,
    agreement,
    agreements,
    full_float32,
    matched_at_once,
    mmcs_with_larger,
    training_state,
)
from sparse_coding.sweep.training import Task
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.laws import Data, Stream

OF_CHOICE = ("fvu", "l0", "f1", "precision", "recall", "shrinkage")  # of what is chosen by batch
COLUMNS = (
    "seed", "world", "arch", "target_l0", "l1_alpha", "dict_ratio", "n_dict", "n_steps", "mmcs",
    "mmcs_dict_to_truth", "mmcs_with_larger", "n_recovered", "mcc", "uniqueness", "f1", "precision",
    "recall", "explained_variance", "shrinkage", "s_dec", "n_dead", "n_revived", "l0", "fvu", "mse",
    *(f"{name}_trained" for name in OF_CHOICE), "l1", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class ToyRecipe:
    """How cells of the toy replication are trained (a training.Recipe).

    l1_normalisation: per_feature divides l1_alpha by n_dict (the post), sum does not
    lr: of Adam
    n_steps: of batch_size vectors each
    prefixes: of nested families, see SAESpec
    n_eval_samples: fresh ones on which an autoencoder is evaluated, in whole batches
    decoder_rows: unit: of length 1; free, raw: of any, see sparse_coding/sae/stack.py

    Under the post's laws autoencoders are those of the post: they start as torch.nn.Linear, b_dec
    stays 0, and each family has its own learning rate. Under others W_enc starts tied to W_dec,
    b_dec is trained, and the learning rate is that of all, as in the benchmarks.
    """

    data: Data
    l1_normalisation: str
    lr: float
    n_steps: int
    device: torch.device
    prefixes: tuple[float, ...] = PREFIXES
    n_eval_samples: int = 2560
    decoder_rows: str = "unit"
    headline = ("metrics/mmcs", max)

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range; their names are those of the flags."""
        require_flag(self, "n_steps", self.n_steps >= 1, "at least 1")
        require_flag(self, "lr", 0 < self.lr < math.inf, "above 0 and finite")
        require_flag(self, "n_eval_samples", self.n_eval_samples >= 1, "at least 1")

    @property
    def of_the_post(self) -> bool:
        """Whether autoencoders are those of the post."""
        return isinstance(self.data, ToyData)

    @property
    def width(self) -> int:
        """activation_dim."""
        return self.data.activation_dim

    def memory(self, kinds: list[Kind]) -> int:
        """Bytes of the world, of an ensemble of these kinds of cells and of their evaluation."""
        d = self.data
        batch_size, n_dict = max(d.batch_size, d.eval_batch_size), max(n for _, n in kinds)
        ensemble = ensemble_bytes(kinds, self.width, batch_size, self.device)
        similarities = PAIR_BYTES * n_dict * d.n_true_features
        similarities *= matched_at_once(n_dict, d.n_true_features)
        return d.n_bytes + ensemble + similarities + 5 * batch_size * d.n_true_features

    def prepare(self, group: list[Cell]) -> Task:
        """Autoencoders of cells of one world with the stream they train on and their evaluation."""
        world, seed = self.data.world_of(group[0]), group[0].seed
        of_the_post = self.of_the_post
        of_world = partial(self.data.stream, world, device=self.device)
        batches, evaluation = named_seed(seed, "batches"), named_seed(seed, "evaluation")
        stream = of_world(batch_size=self.data.batch_size, batch_seed=batches)
        ensemble = Ensemble(
            specs_of(
                group,
                self.l1_normalisation,
                tied=not of_the_post,
                prefixes=self.prefixes,
                own_lr=of_the_post,
                x_scale=self.data.scale(world),
                rows=self.decoder_rows,
            ),
            self.width,
            lr=self.lr,
            device=self.device,
            b_dec=None if of_the_post else torch.zeros(self.width),
            project=not of_the_post,
            schedule=self.schedule,
        )

        def evaluate() -> list[tuple[dict, dict[str, Tensor]]]:
            size = self.data.eval_batch_size
            fresh = of_world(batch_size=size, batch_seed=evaluation)
            samples = fresh_samples(fresh, size, self.n_eval_samples)
            return self._evaluated(ensemble, group, samples, stream.features)

        measure = partial(training_state, ensemble, features=stream.features)
        return Task(ensemble, stream.batch, measure, evaluate)

    @property
    def schedule(self) -> Schedule:
        """Constant but for p-annealing: p falls in the second half of the steps. Under other laws
        than the post's Adam's eps is that of benchmarks, whose error is the sum over dimensions."""
        n, eps = self.n_steps, 1e-8 if self.of_the_post else 1e-8 / self.width
        return Schedule(n, eps=eps, anneal=range(n // 2, n), dead_steps=dead_steps(n))

    def _evaluated(
        self,
        ensemble: Ensemble,
        group: list[Cell],
        samples: Iterable[tuple[Tensor, Tensor]],
        features: Tensor,
    ) -> list[tuple[dict, dict[str, Tensor]]]:
        """Rows, and autoencoders to save."""
        saved = [ensemble.dictionary(i) for i in range(len(group))]
        saes = [
            SparseAutoencoder(**tensors, metadata={}, top_k=cell.top_k).to(self.device)
            for cell, tensors in zip(group, saved, strict=True)
        ]
        n = self.data.n_projection
        trained = [Scores(sae, features, n) for sae in saes]
        by_threshold = {  # of what chose its codes by batch in training
            i: Scores(saes[i], features, n)
            for i, cell in enumerate(group)
            if FAMILIES[cell.arch].selection == "batchtopk"
        }
        score(ensemble, trained, by_threshold.values(), samples)
        dictionaries = passing_bar([sae.W_dec for sae in saes], desc="matching", unit="SAE")
        agree, results = agreements(dictionaries, features), []
        for i, (cell, with_truth) in enumerate(zip(group, agree, strict=True)):
            known = trained[i].result()
            if i in by_threshold:
                known |= {f"{name}_trained": known[name] for name in OF_CHOICE}
                known |= by_threshold[i].result()
            known |= with_truth
            known |= asked_and_found(cell, ensemble, i, self.l1_normalisation)
            results.append((self._row(cell, known), saved[i]))
        return results

    def _row(self, cell: Cell, known: dict) -> dict:
        """A row of results.csv; None where a later stage fills in (mmcs_with_larger, seconds)."""
        known |= {"dict_ratio": cell.size_ratio, "n_steps": self.n_steps}
        known |= {"world": self.data.world_of(cell)}
        return {column: known.get(column) for column in COLUMNS}

    def save(self, folder: Path, cell: Cell, tensors: dict[str, Tensor], row: dict) -> None:
        """A SAELens-6 folder, with the flags of its world for --evaluate."""
        flags = {"seed": cell.seed, "n_eval_samples": self.n_eval_samples} | self.data.flags(cell)
        metadata = {"flags": flags, "l1_normalisation": self.l1_normalisation, "lr": self.lr}
        names = ("l1_alpha", "n_steps", "mmcs", "l0", "fvu", "arch", "target_l0")
        metadata |= {name: row[name] for name in names}
        save_sae(sae_folder(folder, cell), tensors, metadata=metadata, top_k=cell.top_k)

    def merged(self, folder: Path, cells: list[Cell]) -> list[dict]:
        """Rows of results.csv."""
        compare = {"mmcs_with_larger": mmcs_with_larger}
        return merged_rows(folder, cells, columns=COLUMNS, compare=compare, device=self.device)


def fresh_samples(stream: Stream, batch_size: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x and what is on in it, of at least n samples, in whole batches of the stream."""
    numbers = range(-(-n // batch_size))
    return map(stream.with_truth, passing_bar(numbers, desc="evaluation", unit="batch"))


@full_float32()
@torch.no_grad()
def score(
    ensemble: Ensemble,
    trained: list[Scores],
    saved: Iterable[Scores],
    samples: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Counts samples for all autoencoders of an ensemble, which choose codes as in training, and
    for some as they are saved."""
    of_stacks: list[dict[int, Scores]] = [{} for _ in ensemble.stacks]
    for i, one in enumerate(trained):
        stack, number = ensemble.place[i]
        of_stacks[stack][number] = one
    for x, truth in samples:
        for stack, of_stack in zip(ensemble.stacks, of_stacks, strict=True):
            codes, x_hat = stack.forward(x)
            for number, one in of_stack.items():
                one.add(x, x_hat[number], codes[number].T, truth)
        for one in saved:
            one.add_own(x, truth)


@full_float32()
@torch.no_grad()
def evaluate_one(
    sae: SparseAutoencoder, data: Data, cell: Cell, n_samples: int
) -> dict[str, float]:
    """The metrics of results.csv of an autoencoder that is saved, on the samples of a cell.

    Raises:
        UserError: it is of another width than the data; their world does not fit into memory.
    """
    require(
        data.n_bytes <= free_memory(torch.device("cpu")),
        f"the world of --n-true-features {data.n_true_features} needs {data.n_bytes / 1e9:.3g}"
        " GB of memory, more than is free",
    )
    require(
        sae.activation_dim == data.activation_dim,
        f"the autoencoder takes activations of width {sae.activation_dim}, the data have "
        f"--activation-dim {data.activation_dim}: give its world's flags, or use run.py --evaluate",
    )
    world, size = data.world_of(cell), data.eval_batch_size
    seed, device = named_seed(cell.seed, "evaluation"), sae.W_dec.device
    stream = data.stream(world, batch_size=size, batch_seed=seed, device=device)
    found = Scores(sae, stream.features, data.n_projection)
    for x, truth in fresh_samples(stream, size, n_samples):
        found.add_own(x, truth)
    values = agreement(sae.W_dec, stream.features) | found.result()
    return {name: values[name] for name in COLUMNS if name in values}
