"""Steps stacks densely, with torch's operations: the reference of all other engines."""

import torch
from torch import Tensor

from sparse_coding.sae.batches import inputs_and_targets
from sparse_coding.sae.spec import Factors
from sparse_coding.sae.stack import Stack


class Engine:
    """What steps the stacks of an ensemble."""

    steps_at_a_time = 1

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h), of transcoders (n, 2, batch, h), has batches, of every
        autoencoder."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside parameters, by name, not copied."""
        return {}


class DenseEngine(Engine):
    """On any device, for all families.

    one_thread: on a CPU, whose GEMMs give other last bits with other numbers of threads
    """

    def __init__(self, stacks: list[Stack], *, one_thread: bool = False):
        self.stacks, self.one_thread = stacks, one_thread

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        before = torch.get_num_threads()
        if self.one_thread:
            torch.set_num_threads(1)
        try:
            for stack in self.stacks:
                stack.catch_up_()
                for x, y, of_step in zip(*inputs_and_targets(xs), factors, strict=True):
                    stack.step_(x, of_step, y)
        finally:
            torch.set_num_threads(before)
