"""Cells of the toy replication as training needs them: data, starts, metrics, rows."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
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
    ReconstructionSums,
    agreement,
    agreement_with_truth,
    full_float32,
    mmcs_with_larger,
    reconstructed,
    reconstruction,
    training_state,
)
from sparse_coding.sweep.training import Task
from sparse_coding.toy.data import ToyData, ToyStream, World, make_world

EVALUATION = {"n_batches": 10, "batch_size": 256}  # 2 560 fresh samples, as in 2023
COLUMNS = (
    "seed", "arch", "target_l0", "l1_alpha", "dict_ratio", "n_dict", "n_steps", "mmcs",
    "mmcs_dict_to_truth", "mmcs_with_larger", "n_recovered", "n_dead", "n_revived", "l0", "fvu",
    "mse", "fvu_trained", "l0_trained", "l1", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class ToyRecipe:
    """How cells of the toy replication are trained (a training.Recipe).

    l1_normalisation: per_feature divides l1_alpha by n_dict (the post), sum does not
    lr: of Adam
    n_steps: of batch_size vectors each
    prefixes: of nested families, see SAESpec
    """

    data: ToyData
    l1_normalisation: str
    lr: float
    n_steps: int
    device: torch.device
    prefixes: tuple[float, ...] = PREFIXES
    headline = ("metrics/mmcs", max)

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range; their names are those of the flags."""
        require_flag(self, "n_steps", self.n_steps >= 1, "at least 1")
        require_flag(self, "lr", 0 < self.lr < float("inf"), "above 0 and finite")

    @property
    def width(self) -> int:
        """activation_dim."""
        return self.data.activation_dim

    def memory(self, kinds: list[Kind]) -> int:
        """Bytes of the world and of an ensemble of these kinds of cells."""
        world = world_bytes(self.data)
        batch_size = max(self.data.batch_size, EVALUATION["batch_size"])
        return world + ensemble_bytes(kinds, self.width, batch_size, self.device)

    def prepare(self, group: list[Cell]) -> Task:
        """Autoencoders of cells of one seed with the stream they train on and their evaluation."""
        seed = group[0].seed
        world = make_world(self.data, seed)
        stream = ToyStream(
            self.data, world, batch_seed=named_seed(seed, "batches"), device=self.device
        )
        ensemble = Ensemble(
            specs_of(group, self.l1_normalisation, tied=False, prefixes=self.prefixes),
            self.width,
            lr=self.lr,
            device=self.device,
            schedule=self.schedule,
        )

        def evaluate() -> list[tuple[dict, dict[str, Tensor]]]:
            values = agreement_with_truth(ensemble, stream.features)
            values |= reconstruction(ensemble, fresh_batches(self.data, world, seed, self.device))
            results = []
            for i, cell in enumerate(group):
                known = {name: of_cells[i] for name, of_cells in values.items()}
                known |= asked_and_found(cell, ensemble, i, self.l1_normalisation)
                saved = ensemble.dictionary(i)
                if FAMILIES[cell.arch].selection == "batchtopk":  # saved with a threshold
                    known |= {f"{name}_trained": known[name] for name in ("fvu", "l0")}
                    sae = SparseAutoencoder(**saved, metadata={}).to(self.device)
                    known |= self._reconstruction_of(sae, world, seed)
                results.append((self._row(cell, known), saved))
            return results

        measure = partial(training_state, ensemble, features=stream.features)
        return Task(ensemble, stream.batch, measure, evaluate)

    @property
    def schedule(self) -> Schedule:
        """Constant but for p-annealing: p falls in the second half of the steps."""
        n = self.n_steps
        return Schedule(n, anneal=range(n // 2, n), dead_steps=dead_steps(n))

    @full_float32()
    @torch.no_grad()
    def _reconstruction_of(
        self, sae: SparseAutoencoder, world: World, seed: int
    ) -> dict[str, float]:
        sums = ReconstructionSums(1, sae.n_dict, self.width, self.device)
        for x in fresh_batches(self.data, world, seed, self.device):
            reconstructed(sae, x, sums)
        return {name: value.item() for name, value in sums.result().items()}

    def _row(self, cell: Cell, known: dict) -> dict:
        """A row of results.csv; None where a later stage fills in (mmcs_with_larger, seconds)."""
        known = {"dict_ratio": cell.size_ratio, "n_steps": self.n_steps} | known
        return {column: known.get(column) for column in COLUMNS}

    def save(self, folder: Path, cell: Cell, tensors: dict[str, Tensor], row: dict) -> None:
        """A SAELens-6 folder, with the flags of its world for --evaluate."""
        flags = {"data_law": self.data.law, "seed": cell.seed}
        flags |= {k: v for k, v in asdict(self.data).items() if k != "law"}
        metadata = {"flags": flags, "l1_normalisation": self.l1_normalisation, "lr": self.lr}
        names = ("l1_alpha", "n_steps", "mmcs", "l0", "fvu", "arch", "target_l0")
        metadata |= {name: row[name] for name in names}
        save_sae(sae_folder(folder, cell), tensors, metadata=metadata, top_k=cell.top_k)

    def merged(self, folder: Path, cells: list[Cell]) -> list[dict]:
        """Rows of results.csv."""
        compare = {"mmcs_with_larger": mmcs_with_larger}
        return merged_rows(folder, cells, columns=COLUMNS, compare=compare, device=self.device)


def world_bytes(data: ToyData) -> int:
    """Of A, Σ and one more while they are made."""
    return 3 * 8 * data.n_true_features**2


def fresh_batches(data: ToyData, world: World, seed: int, device: torch.device) -> Iterator[Tensor]:
    """The samples of a world on which autoencoders are evaluated: none of those they trained on."""
    data = replace(data, batch_size=EVALUATION["batch_size"])
    stream = ToyStream(data, world, batch_seed=named_seed(seed, "evaluation"), device=device)
    numbers = range(EVALUATION["n_batches"])
    return map(stream.batch, passing_bar(numbers, desc="evaluation", unit="batch"))


@full_float32()
@torch.no_grad()
def evaluate_one(sae: SparseAutoencoder, data: ToyData, seed: int) -> dict[str, float]:
    """The metrics of results.csv of an autoencoder that is saved, on the world of the seed.

    Raises:
        UserError: it is of another width than the data; their world does not fit into memory.
    """
    require(
        world_bytes(data) <= free_memory(torch.device("cpu")),
        f"the world of --n-true-features {data.n_true_features} needs {world_bytes(data) / 1e9:.3g}"
        " GB of memory, more than is free",
    )
    require(
        sae.activation_dim == data.activation_dim,
        f"the autoencoder takes activations of width {sae.activation_dim}, the data have "
        f"--activation-dim {data.activation_dim}: give its world's flags, or use run.py --evaluate",
    )
    world, device = make_world(data, seed), sae.W_dec.device
    sums = ReconstructionSums(1, sae.n_dict, data.activation_dim, device)
    for x in fresh_batches(data, world, seed, device):
        reconstructed(sae, x, sums)
    values = agreement(sae.W_dec.unsqueeze(0), world.features.to(device)) | sums.result()
    return {name: values[name].item() for name in COLUMNS if name in values}
