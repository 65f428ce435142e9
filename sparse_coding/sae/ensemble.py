"""Many sparse autoencoders trained at once on one stream of batches.

Autoencoders of one width form a Stack (stack.py has the formulas); all stacks see the same x. An
engine steps them: with kernels that leave out the zeros, compiled for the CPU (cpu.py) or a
GPU (gpu.py), else densely with torch, which is the reference. State and results are the same
but for rounding.

On a CPU an autoencoder's numbers are the same bits whatever else is in the ensemble: each is
stepped alone, and each batched GEMM of the dense steps has the shape of a single autoencoder (if
n_dict and activation_dim are multiples of 8, a test holds that; odd sizes, which align differently
in memory, agree to rounding there). One GEMM for all encoders measured no faster, see LOG.md.
"""

from itertools import groupby

import torch
from torch import Tensor

from sparse_coding.sae import gpu
from sparse_coding.sae.cpu import CpuEngine, engine_bytes, has_kernels, kernels_compile
from sparse_coding.sae.spec import SAESpec, Schedule
from sparse_coding.sae.stack import PARAMETERS, DenseEngine, Scratch, Stack


class Ensemble:
    """All autoencoders of a group of cells, stacked by width.

    Args:
        specs: in any order; results come back in this order
        dtype: float32, or float64 for reference runs
        b_dec: its start, (activation_dim,); None fixes it at 0
        project: whether gradients are projected
    """

    def __init__(
        self,
        specs: list[SAESpec],
        activation_dim: int,
        *,
        lr: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        b_dec: Tensor | None = None,
        project: bool = False,
        schedule: Schedule = Schedule(),  # noqa: B008, frozen
    ):
        self.activation_dim = activation_dim
        self.specs, self.schedule, self.n_steps_done = specs, schedule, 0
        self.scratch = Scratch(device, dtype)
        order = sorted(range(len(specs)), key=lambda i: specs[i].n_dict)  # stable
        self.stacks: list[Stack] = []
        self.place: dict[int, tuple[int, int]] = {}  # of each spec: (stack, position in it)
        for _, group in groupby(order, key=lambda i: specs[i].n_dict):
            indices = list(group)
            self.place |= {i: (len(self.stacks), k) for k, i in enumerate(indices)}
            of_stack = [specs[i] for i in indices]
            options = dict(
                lr=lr, eps=schedule.eps, scratch=self.scratch, b_dec=b_dec, project=project
            )
            self.stacks.append(Stack(of_stack, activation_dim, **options))
        self.engine = engine_of(self.stacks)

    def step_(self, x: Tensor) -> None:
        """One training step of every autoencoder on x (batch, activation_dim)."""
        self.steps_(x.unsqueeze(0))

    def steps_(self, xs: Tensor) -> None:
        """A training step of every autoencoder on each x of xs (n, batch, activation_dim)."""
        steps = range(self.n_steps_done, self.n_steps_done + len(xs))
        self.engine.steps_(xs, n_done=steps.start, factors=[self.schedule.at(i) for i in steps])
        self.n_steps_done = steps.stop

    def in_order(self, per_stack: list[list]) -> list:
        """Values listed per stack, as one list in the order of `specs`."""
        return [per_stack[s][k] for s, k in (self.place[i] for i in range(len(self.specs)))]

    def dictionary(self, i: int) -> dict[str, Tensor]:
        """Autoencoder i as saved: W_enc (activation_dim, n_dict), b_enc (n_dict,),
        W_dec (n_dict, activation_dim), b_dec (activation_dim,), on the CPU."""
        s, k = self.place[i]
        stack = self.stacks[s]
        W_enc, b_enc, W_dec = (stack.parameters[name][k].cpu() for name in PARAMETERS)
        zero = torch.zeros(self.activation_dim, dtype=W_dec.dtype)
        b_dec = zero if stack.b_dec is None else stack.b_dec[k].cpu()
        return {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}

    def l1(self, i: int) -> float:
        """Weight of the L1 term of autoencoder i, which a controller may have moved."""
        s, k = self.place[i]
        return float(self.stacks[s].l1[k])

    def state(self) -> dict[str, Tensor]:
        """Parameters and Adam's moments by name, not copied: for a checkpoint."""
        tensors = {}
        for s, stack in enumerate(self.stacks):
            tensors[f"{s}.idle"] = stack.idle
            if stack.seeks_l0:
                tensors[f"{s}.l1"] = stack.l1
            for name, parameter in stack.parameters.items():
                tensors[f"{s}.{name}"] = parameter
                for moment, value in stack.adam.state[parameter].items():
                    tensors[f"{s}.{name}.{moment}"] = value
        return tensors

    def load_state_(self, tensors: dict[str, Tensor]) -> None:
        """Continues from state(), exactly."""
        self.n_steps_done = int(tensors["0.W_enc.step"])  # of Adam
        for stack in self.stacks:
            stack.idle.zero_()  # where checkpoints have none, all features are up to date
        for name, tensor in self.state().items():
            if name in tensors or not name.endswith(".idle"):
                tensor.copy_(tensors[name])


def engine_of(stacks: list[Stack]) -> CpuEngine | gpu.GpuEngine | DenseEngine:
    """The fastest that this machine has for the stacks' device and precision."""
    on, dtype = stacks[0].W_dec.device.type, stacks[0].W_dec.dtype
    if on == "cpu" and dtype == torch.float32 and has_kernels() and kernels_compile():
        return CpuEngine(stacks, n_threads=torch.get_num_threads())
    if on == "cuda" and dtype == torch.float32 and gpu.has_triton():
        return gpu.GpuEngine(stacks)
    return DenseEngine(stacks)


def ensemble_bytes(
    n_dicts: list[int], activation_dim: int, batch_size: int, device: torch.device
) -> int:
    """Bytes that an ensemble of these widths needs: its state, and scratch for its largest stack.

    With Adam's moments the state is 12 (2 n_dict h + n_dict) bytes per autoencoder, h =
    activation_dim. Scratch of a stack: codes (n_dict x batch), x_hat, and for dense steps δ and two
    gradients (n_dict x h); engines with kernels have their own.
    """
    h = activation_dim
    state = sum(12 * (2 * n * h + n) + 4 * n for n in n_dicts)
    compiled = device.type == "cpu" and has_kernels()
    on_gpu = device.type == "cuda" and gpu.has_triton()
    per_feature = batch_size if compiled or on_gpu else 2 * (batch_size + h)
    scratch = max(n_dicts.count(n) * 4 * (n * per_feature + batch_size * h) for n in set(n_dicts))
    if compiled:
        scratch += engine_bytes(n_dicts, h, batch_size, n_threads=torch.get_num_threads())
    if on_gpu:
        scratch += gpu.engine_bytes(n_dicts, h, batch_size)
    return state + scratch
