"""Cells of the toy replication as tasks to train: data, starts, metrics, table rows. Floor 2."""

from functools import partial

import torch

from sparse_coding.config import named_seed
from sparse_coding.ensemble import Ensemble, Member
from sparse_coding.evaluation import agreement_with_truth, reconstruction, training_state
from sparse_coding.sweep import Cell
from sparse_coding.toy_data import ToyData, ToyStream, make_world
from sparse_coding.training import Task

N_EVALUATION_BATCHES = 10  # of fresh samples: 2 560 at batch 256, as in 2023
COLUMNS = (
    "seed", "l1_alpha", "dict_ratio", "n_dict", "n_steps", "mmcs", "mmcs_dict_to_truth",
    "mmcs_with_larger", "n_recovered", "n_dead", "l0", "fvu", "mse", "l1", "seconds",
)  # fmt: skip


def prepare_task(
    group: list[Cell],
    data: ToyData,
    *,
    l1_normalisation: str,
    learning_rate: float,
    n_steps: int,
    device: torch.device,
) -> Task:
    """Autoencoders of cells of one seed with the stream they train on and their evaluation."""
    seed = group[0].seed
    stream = partial(ToyStream, data, make_world(data, seed), device=device)
    training = stream(batch_seed=named_seed(seed, "batches"))
    fresh = stream(batch_seed=named_seed(seed, "evaluation"))
    members = members_of(group, l1_normalisation)
    ensemble = Ensemble(members, data.activation_dim, lr=learning_rate, device=device)

    def evaluate() -> list[dict]:
        values = agreement_with_truth(ensemble, training.features)
        values |= reconstruction(ensemble, map(fresh.batch, range(N_EVALUATION_BATCHES)))
        return [
            row_of(cell, {k: v[i] for k, v in values.items()} | {"n_steps": n_steps})
            for i, cell in enumerate(group)
        ]

    measure = partial(training_state, ensemble, features=training.features)
    return Task(ensemble, training.batch, measure, evaluate)


def members_of(cells: list[Cell], l1_normalisation: str) -> list[Member]:
    """The cells as members of an ensemble, each with a start of its own that its name determines.

    l1_normalisation: per_feature divides l1_alpha by n_dict (the post), sum does not
    """
    return [
        Member(
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
