"""Cells of the toy replication as training needs them: data, starts, metrics, rows."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_coding.config import named_seed, require_flag
from sparse_coding.files import read_tensors, write_tensors
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sweep.grid import Cell
from sparse_coding.sweep.hardware import step_seconds
from sparse_coding.sweep.metrics import (
    agreement_with_truth,
    mmcs_with_larger,
    reconstruction,
    training_state,
)
from sparse_coding.sweep.run_folder import merged_rows
from sparse_coding.sweep.training import Task
from sparse_coding.toy.data import ToyData, ToyStream, make_world

EVALUATION = {"n_batches": 10, "batch_size": 256}  # 2 560 fresh samples, as in 2023
COLUMNS = (
    "seed", "l1_alpha", "dict_ratio", "n_dict", "n_steps", "mmcs", "mmcs_dict_to_truth",
    "mmcs_with_larger", "n_recovered", "n_dead", "l0", "fvu", "mse", "l1", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class ToyRecipe:
    """How cells of the toy replication are trained (a training.Recipe).

    l1_normalisation: per_feature divides l1_alpha by n_dict (the post), sum does not
    n_steps: of batch_size vectors each; learning_rate: of Adam
    """

    data: ToyData
    l1_normalisation: str
    learning_rate: float
    n_steps: int
    device: torch.device
    headline = ("metrics/mmcs", max)

    def __post_init__(self) -> None:
        """Raises UserError for a constant out of its range; their names are those of the flags."""
        require_flag(self, "n_steps", self.n_steps >= 1, "at least 1")
        lr = self.learning_rate
        require_flag(self, "learning_rate", 0 < lr < float("inf"), "above 0 and finite")

    def memory(self, n_dicts: list[int]) -> int:
        world = 3 * 8 * self.data.n_true_features**2  # A, Σ and one more while they are made
        batch_size = max(self.data.batch_size, EVALUATION["batch_size"])
        return world + ensemble_bytes(n_dicts, self.data.activation_dim, batch_size, self.device)

    def disk(self, n_dicts: list[int]) -> int:
        """Bytes of a run folder at its largest: dictionaries and three checkpoints (one half
        written), each with Adam's two moments beside every parameter."""
        parameters = sum(2 * n * self.data.activation_dim + n for n in n_dicts)
        return 4 * parameters * (1 + 3 * 3)

    def seconds(self, n_features: int) -> float:
        h, batch_size = self.data.activation_dim, self.data.batch_size
        step = step_seconds(n_features, h, batch_size=batch_size, device=self.device)
        return self.n_steps * step

    def prepare(self, group: list[Cell]) -> Task:
        """Autoencoders of cells of one seed with the stream they train on and their evaluation."""
        seed = group[0].seed
        stream = partial(ToyStream, world=make_world(self.data, seed), device=self.device)
        training = stream(self.data, batch_seed=named_seed(seed, "batches"))
        at_evaluation = replace(self.data, batch_size=EVALUATION["batch_size"])
        fresh = stream(at_evaluation, batch_seed=named_seed(seed, "evaluation"))
        specs = specs_of(group, self.l1_normalisation)
        ensemble = Ensemble(
            specs, self.data.activation_dim, lr=self.learning_rate, device=self.device
        )

        def evaluate() -> list[tuple[dict, dict[str, Tensor]]]:
            values = agreement_with_truth(ensemble, training.features)
            values |= reconstruction(ensemble, map(fresh.batch, range(EVALUATION["n_batches"])))
            of_cell = [{k: v[i] for k, v in values.items()} for i in range(len(group))]
            return [
                (row_of(cell, found | {"n_steps": self.n_steps}), ensemble.dictionary(i))
                for i, (cell, found) in enumerate(zip(group, of_cell, strict=True))
            ]

        measure = partial(training_state, ensemble, features=training.features)
        return Task(ensemble, training.batch, measure, evaluate)

    def save(self, folder: Path, cell: Cell, tensors: dict[str, Tensor], row: dict) -> None:
        write_tensors(dictionary_path(folder, cell), tensors, info={"cell": cell.name})

    def merged(self, folder: Path, cells: list[Cell]) -> list[dict]:
        """Rows of results.csv."""

        def decoder_of(folder: Path, cell: Cell) -> Tensor:
            return read_tensors(dictionary_path(folder, cell))[0]["W_dec"].to(self.device)

        compare = {"mmcs_with_larger": mmcs_with_larger}
        return merged_rows(folder, cells, decoder_of=decoder_of, compare=compare)


def dictionary_path(folder: Path, cell: Cell) -> Path:
    return folder / "dictionaries" / f"{cell.name}.safetensors"


def specs_of(cells: list[Cell], l1_normalisation: str) -> list[SAESpec]:
    """The cells as specs of an ensemble, each with a start of its own that its name determines.

    l1_normalisation: per_feature divides l1_alpha by n_dict (the post), sum does not
    """
    return [
        SAESpec(
            n_dict=cell.n_dict,
            l1=cell.l1_alpha / (cell.n_dict if l1_normalisation == "per_feature" else 1),
            seed=named_seed(cell.seed, "start", cell.n_dict, cell.l1_exp),
        )
        for cell in cells
    ]


def row_of(cell: Cell, values: dict) -> dict:
    """A row of results.csv; None where a later stage fills in (mmcs_with_larger, seconds)."""
    known = {"seed": cell.seed, "l1_alpha": cell.l1_alpha, "dict_ratio": cell.size_ratio,
             "n_dict": cell.n_dict}  # fmt: skip
    return {column: (known | values).get(column) for column in COLUMNS}
