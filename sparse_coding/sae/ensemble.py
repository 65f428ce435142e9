"""Many sparse autoencoders trained at once on one stream of batches.

Autoencoders of one family and width form a Stack (stack.py has the formulas); all stacks see the
same x. Engines step them: with kernels that leave out the zeros, compiled for the CPU (cpu.py) or
a GPU (gpu.py, many small ones of relu; gpu_gemm/, the others), else densely with torch, which is
the reference. State and results are the same but for rounding.

On a CPU an autoencoder's numbers are the same bits whatever else is in the ensemble: each is
stepped alone, and each batched GEMM of the dense steps has the shape of a single autoencoder (if
n_dict and activation_dim are multiples of 8, a test holds that; odd sizes, which align differently
in memory, agree to rounding there). One GEMM for all encoders measured no faster, see LOG.md.
"""

from collections import Counter
from itertools import groupby

import torch
from torch import Tensor

from sparse_coding.sae.engines import gpu
from sparse_coding.sae.engines.cpu import CpuEngine, engine_bytes, kernels_compile
from sparse_coding.sae.engines.cpu_compile import has_kernels
from sparse_coding.sae.engines.dense import DenseEngine, Engine
from sparse_coding.sae.families import FAMILIES, MOST_PREFIXES, Kind
from sparse_coding.sae.saved import unscaled
from sparse_coding.sae.spec import Factors, SAESpec, Schedule
from sparse_coding.sae.stack import PARAMETERS, Scratch, Stack

COUNTS = ("idle", "silent", "n_revived")  # of a stack, beside its parameters
OF_ENGINE = "engine."  # before the names of what an engine adds to the state
MOST_H = 512  # width up to which gpu.py takes relu; beyond it kernels lose against library GEMMs


class Ensemble:
    """All autoencoders of a group of cells, stacked by family and width.

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
        archs = list(FAMILIES)
        kinds = [(spec.n_dict, archs.index(spec.arch), spec.rows) for spec in specs]
        order = sorted(range(len(specs)), key=kinds.__getitem__)  # stable
        self.stacks: list[Stack] = []
        self.place: dict[int, tuple[int, int]] = {}  # of each spec: (stack, position in it)
        for _, group in groupby(order, key=kinds.__getitem__):
            indices = list(group)
            self.place |= {i: (len(self.stacks), k) for k, i in enumerate(indices)}
            of_stack = [specs[i] for i in indices]
            self.stacks.append(
                Stack(
                    of_stack,
                    activation_dim,
                    lr=lr,
                    eps=schedule.eps,
                    scratch=self.scratch,
                    b_dec=b_dec,
                    project=project,
                    dead_steps=schedule.dead_steps,
                )
            )
        self.engine = engine_of(self.stacks)

    def step_(self, x: Tensor) -> None:
        """One training step of every autoencoder on x (batch, activation_dim); of transcoders on x
        and y, (2, batch, activation_dim)."""
        self.steps_(x.unsqueeze(0))

    def steps_(self, xs: Tensor) -> None:
        """A training step of every autoencoder on each x of xs (n, batch, activation_dim), of
        transcoders (n, 2, batch, activation_dim)."""
        steps = range(self.n_steps_done, self.n_steps_done + len(xs))
        self.engine.steps_(xs, n_done=steps.start, factors=[self.schedule.at(i) for i in steps])
        self.n_steps_done = steps.stop

    def in_order(self, per_stack: list[list]) -> list:
        """Values listed per stack, as one list in the order of `specs`."""
        return [per_stack[s][k] for s, k in (self.place[i] for i in range(len(self.specs)))]

    def dictionary(self, i: int) -> dict[str, Tensor]:
        """Autoencoder i as saved: W_enc (activation_dim, n_dict), b_enc (n_dict,),
        W_dec (n_dict, activation_dim), b_dec (activation_dim,), on the CPU; and threshold (n_dict,)
        where its family has one of each feature, or chooses by batch: then the smallest code that
        a batch chose, on average (first_threshold: of the first codes of a refined family). Free
        rows of W_dec are brought to length 1, codes along."""
        s, k = self.place[i]
        stack = self.stacks[s]
        W_enc, b_enc, W_dec = (stack.parameters[name][k].cpu() for name in PARAMETERS)
        length = torch.ones_like(b_enc)
        if not stack.unit_rows:
            length = W_dec.norm(dim=1)
            W_enc, b_enc = W_enc * length[:, None], b_enc * length
            W_dec = W_dec / length[:, None]
        of_code = torch.ones_like(length) if stack.weighed else length  # of those compared
        zero = torch.zeros(self.activation_dim, dtype=W_dec.dtype)
        b_dec = zero if stack.b_dec is None else stack.b_dec[k].cpu()
        saved = {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if stack.family.selection == "batchtopk":
            saved["threshold"] = stack.smallest[k].cpu() * of_code
        if stack.family.refined:
            saved["first_threshold"] = stack.smallest_of_first[k].cpu() * of_code
        if stack.threshold is not None:
            saved["threshold"] = stack.threshold[k].cpu() * length
        if stack.W_skip is not None:
            saved["W_skip"] = stack.W_skip[k].cpu()
        return unscaled(saved, stack.x_scale)

    def l1(self, i: int) -> float:
        """Weight of the penalty of autoencoder i, which a controller may have moved."""
        s, k = self.place[i]
        return float(self.stacks[s].l1[k])

    def n_revived(self, i: int) -> int:
        """How often a dead feature of autoencoder i fired again."""
        s, k = self.place[i]
        return int(self.stacks[s].n_revived[k])

    def state(self) -> dict[str, Tensor]:
        """Parameters and Adam's moments by name, not copied: for a checkpoint."""
        tensors = {}
        for s, stack in enumerate(self.stacks):
            tensors |= {f"{s}.{name}": getattr(stack, name) for name in COUNTS}
            if stack.seeks_l0 or stack.family.penalty == "lp":
                tensors[f"{s}.l1"] = stack.l1
            if stack.family.selection == "batchtopk":
                tensors[f"{s}.smallest"] = stack.smallest
            if stack.family.refined:
                tensors[f"{s}.rate"] = stack.rate
                tensors[f"{s}.smallest_of_first"] = stack.smallest_of_first
            for name, parameter in stack.parameters.items():
                tensors[f"{s}.{name}"] = parameter
                for moment, value in stack.adam.state[parameter].items():
                    tensors[f"{s}.{name}.{moment}"] = value
        for name, tensor in self.engine.state().items():
            tensors[f"{OF_ENGINE}{name}"] = tensor
        return tensors

    def load_state_(self, tensors: dict[str, Tensor]) -> None:
        """Continues from state(), exactly."""
        self.n_steps_done = int(tensors["0.W_enc.step"])  # of Adam
        for stack in self.stacks:  # where checkpoints have none, all features are up to date
            for name in COUNTS:
                getattr(stack, name).zero_()
        for name, tensor in self.state().items():
            if name.startswith(OF_ENGINE) and name not in tensors:
                tensor.fill_(True)  # another engine wrote them; right, if not fast, until it looks
            elif name in tensors or not name.endswith(COUNTS):
                tensor.copy_(tensors[name])


class Engines(Engine):
    """Several engines, each for stacks of its own, with what x is multiplied by for it."""

    def __init__(self, parts: list[tuple[Engine, float]]):
        self.parts = parts
        self.steps_at_a_time = min(part.steps_at_a_time for part, _ in parts)

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        for part, scale in self.parts:
            scaled = xs if scale == 1 else xs * scale
            part.steps_(scaled, n_done=n_done, factors=factors)

    def state(self) -> dict[str, Tensor]:
        """That of all parts."""
        states = [part.state() for part, _ in self.parts]
        return {f"{i}.{k}": t for i, state in enumerate(states) for k, t in state.items()}


def engine_of(stacks: list[Stack]) -> Engine:
    """The fastest that this machine has for the stacks' device and precision."""
    parts = []
    for scale in dict.fromkeys(stack.x_scale for stack in stacks):
        same = [stack for stack in stacks if stack.x_scale == scale]
        parts += [(engine, scale) for engine in _engines(same)]
    (first, scale), *others = parts
    return Engines(parts) if others or scale != 1 else first


def _engines(stacks: list[Stack]) -> list[Engine]:
    """Those for stacks of one scale: kernels where there are such, dense steps for the others."""
    on, dtype = stacks[0].W_dec.device.type, stacks[0].W_dec.dtype
    compiled = on == "cpu" and has_kernels()
    if on == "cuda" and dtype == torch.float32 and gpu.has_triton():
        return _gpu_engines(stacks)
    fast = [stack for stack in stacks if compiled and dtype == torch.float32 and not stack.weighed]
    if not fast or not kernels_compile():
        return [DenseEngine(stacks, one_thread=compiled)]
    engine = CpuEngine(fast, n_threads=torch.get_num_threads())
    dense = [stack for stack in stacks if stack not in fast]
    return [engine, *[DenseEngine(dense, one_thread=True)] * bool(dense)]


def _gpu_engines(stacks: list[Stack]) -> list[Engine]:
    from sparse_coding.sae.engines.gpu_gemm.engine import GemmEngine

    kinds: dict[type, list[Stack]] = {}
    for stack in stacks:
        arch, (_, _, h), device = stack.specs[0].arch, stack.W_dec.shape, stack.W_dec.device
        if _is_small(arch, h, device) and stack.unit_rows and not stack.transcodes:
            kind = gpu.GpuEngine
        else:
            dense = stack.weighed or stack.family.refined or stack.transcodes
            kind = DenseEngine if dense else GemmEngine
        kinds.setdefault(kind, []).append(stack)
    return [kind(of_kind) for kind, of_kind in kinds.items()]


def _is_small(arch: str, h: int, device: torch.device) -> bool:
    """Whether gpu.py's kernels take this family and width; they multiply, for which Triton knows
    the tensor cores of compute capability 8.0 and later."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return FAMILIES[arch] == FAMILIES["relu"] and h <= MOST_H and not old


def ensemble_bytes(
    kinds: list[Kind],
    activation_dim: int,
    batch_size: int,
    device: torch.device,
    *,
    transcodes: bool = False,
) -> int:
    """Bytes that an ensemble of these (family, n_dict) needs: its state, and scratch for its
    largest stack.

    With Adam's moments the state is 12 (2 n_dict h + n_dict) bytes per autoencoder, h =
    activation_dim; of transcoders 12 h² more, for W_skip. Scratch of a stack: codes (n_dict x
    batch), x_hat, and for dense steps δ and two gradients (n_dict x h); engines with kernels have
    their own.
    """
    h = activation_dim
    state = sum(12 * (2 * n * h + n) + 8 * n + 8 for _, n in kinds)
    state += sum(12 * n for arch, n in kinds if FAMILIES[arch].selection == "jump")
    state += sum(8 * n for arch, n in kinds if FAMILIES[arch].refined)
    state += 12 * h**2 * len(kinds) * transcodes
    compiled = device.type == "cpu" and has_kernels()
    on_gpu = device.type == "cuda" and gpu.has_triton() and not transcodes
    fast = [kind for kind in kinds if compiled or (on_gpu and not FAMILIES[kind[0]].refined)]
    of_skip = (2 * batch_size * h + h**2) * transcodes
    scratch = 4 * max(
        kinds.count(kind) * (_scratch_numbers(kind, h, batch_size, fast=kind in fast) + of_skip)
        for kind in set(kinds)
    )
    if fast and compiled:
        n_threads = torch.get_num_threads()
        scratch += engine_bytes(fast, h, batch_size, n_threads=n_threads, transcodes=transcodes)
    if fast and on_gpu:
        scratch += _gpu_bytes(fast, h, batch_size, device)
    return state + scratch


def _gpu_bytes(kinds: list[Kind], h: int, batch: int, device: torch.device) -> int:
    from sparse_coding.sae.engines.gpu_gemm.engine import engine_bytes as gemm_bytes

    small = [n for arch, n in kinds if _is_small(arch, h, device)]
    others = Counter(kind for kind in kinds if not _is_small(kind[0], h, device))
    of_small = gpu.engine_bytes(small, h, batch) if small else 0
    stacks = [(FAMILIES[arch], n, n_saes) for (arch, n), n_saes in others.items()]
    return of_small + (gemm_bytes(stacks, h, batch) if stacks else 0)


def _scratch_numbers(kind: Kind, h: int, batch: int, *, fast: bool) -> int:
    """Of one autoencoder of a stack: codes and x_hat; δ and gradients of dense steps; and of those
    of other families, temporaries."""
    (arch, n), family = kind, FAMILIES[kind[0]]
    # selections and penalties, of masks and powers, take three more tensors of the codes' shape
    temporaries = 3 * (arch != "relu")
    if fast:  # evaluations alone
        return n * batch * (1 + temporaries + family.refined) + (1 + family.refined) * batch * h
    kept = (family.selection == "jump" or family.aux) + temporaries + 3 * family.refined
    n_prefixes = MOST_PREFIXES if family.nested else 1
    n_errors = n_prefixes + 2 * family.aux if temporaries else 0
    return n * (2 * (batch + h) + kept * batch) + (1 + n_errors) * batch * h
