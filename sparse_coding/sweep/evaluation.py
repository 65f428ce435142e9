"""Metrics of a whole ensemble. The formulas are in metrics.py."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sweep.metrics import (
    RECOVERED,
    ReconstructionSums,
    full_float32,
    max_cosine,
    mmcs,
)


@full_float32()
def reconstruction(ensemble: Ensemble, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """l0, l1, mse, fvu, n_dead over all samples of the batches, in the order of the members.

    Args:
        batches: each (batch_size, activation_dim)
    """
    h, device = ensemble.activation_dim, ensemble.scratch.device
    sums = [ReconstructionSums(len(s.members), s.n_dict, h, device) for s in ensemble.stacks]
    for x in batches:
        for stack, total in zip(ensemble.stacks, sums, strict=True):
            codes, x_hat = stack.forward(x)
            total.add(x, x_hat, codes)
    return _in_order(ensemble, [total.result() for total in sums])


def agreement_with_truth(ensemble: Ensemble, features: Tensor) -> dict[str, list[float]]:
    """mmcs, mmcs_dict_to_truth, n_recovered against the true features (n, activation_dim)."""
    per_stack = []
    for stack in ensemble.stacks:
        # one by one: each GEMM has the shape of one autoencoder, whatever else is in the stack
        best = torch.stack([max_cosine(features, W_dec) for W_dec in stack.W_dec])
        to_truth = torch.stack([mmcs(W_dec, features) for W_dec in stack.W_dec])
        recovered = (best > RECOVERED).sum(dim=1)
        per_stack.append(
            {"mmcs": best.mean(dim=1), "mmcs_dict_to_truth": to_truth, "n_recovered": recovered}
        )
    return _in_order(ensemble, per_stack)


def training_state(ensemble: Ensemble, x: Tensor, features: Tensor) -> dict[str, list[float]]:
    """What is logged while training: loss and l0 on the last batch, mmcs with the features."""
    on_batch = reconstruction(ensemble, [x])
    found = [torch.stack([mmcs(features, W) for W in s.W_dec]).tolist() for s in ensemble.stacks]
    return {
        "train/mse": on_batch["mse"],
        "train/l0": on_batch["l0"],
        "metrics/mmcs": ensemble.in_order(found),
    }


def _in_order(ensemble: Ensemble, per_stack: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    return {k: ensemble.in_order([d[k].tolist() for d in per_stack]) for k in per_stack[0]}
