"""What the CPU kernels are given: an autoencoder's arrays, and the memory of a step.

All of it is views of a Stack's tensors, or allocated once for each thread.
"""

import math
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from sparse_coding.sae.families import FAMILIES, MOST_PREFIXES, Kind, Penalty, Selection
from sparse_coding.sae.spec import BETAS, Factors, StepNumbers
from sparse_coding.sae.stack import Stack

BLOCK = 64  # samples decoded at a time
TILE = 128  # features: a tile's codes and gradients (128 KB each at 256) stay in L2
GROUP = 4  # least number of features of which topk keeps a maximum
COUNTED = (  # what a Stack keeps of an autoencoder beside its parameters
    "idle", "silent", "n_revived", "l1", "target_l0", "smallest", "smallest_of_first", "rate",
)  # fmt: skip
FACTORS = "codes", "W_dec", "g", "aux", "g_aux", "aux_dec", "x"  # of GEMMs, parts are in Work
CANDIDATES = 1 / 4  # share of the codes among which the k largest are sought


class Sae(NamedTuple):
    """An autoencoder's parameters with Adam's moments (_m, _v), views of a Stack's tensors, and
    what its family chooses. What a family lacks has a length of 0.

    idle: steps since a feature had a gradient; beyond DORMANT its row waits for what it missed
    hint: below what a batch will select, of codes and of first ones; no state, since no result
        depends on it
    order: of the features by rate, of a step; no state either
    """

    W_enc: ndarray  # (n_dict, h)
    b_enc: ndarray  # (n_dict,)
    W_dec: ndarray  # (n_dict, h)
    W_enc_parts: ndarray  # (n_dict, parts, h) uint16: what stands for it in GEMMs (cpu_bf16.py)
    b_dec: ndarray  # (h,), or (0,) where it is fixed at 0
    threshold: ndarray  # (n_dict,)
    W_skip: ndarray  # (h, h), of transcoders with a skip connection
    W_enc_m: ndarray
    W_enc_v: ndarray
    b_enc_m: ndarray
    b_enc_v: ndarray
    W_dec_m: ndarray
    W_dec_v: ndarray
    b_dec_m: ndarray
    b_dec_v: ndarray
    threshold_m: ndarray
    threshold_v: ndarray
    W_skip_m: ndarray
    W_skip_v: ndarray
    idle: ndarray  # (n_dict,) int32
    silent: ndarray  # (n_dict,) int32
    n_revived: ndarray  # (1,) int64
    l1: ndarray  # (1,)
    target_l0: ndarray  # (1,), 0 where l1 stays
    smallest: ndarray  # (1,)
    smallest_of_first: ndarray  # (1,)
    rate: ndarray  # (n_dict,), of refined families
    hint: ndarray  # (2,)
    order: ndarray  # (n_dict,) int32
    bands: ndarray  # ends of the bands of features, int64
    selection: int
    penalty: int
    bandwidth: float  # of the threshold's window
    through_input: bool
    frozen: bool
    aux: bool
    refined: bool
    transcodes: bool
    k: float  # per sample
    dead_steps: int


class Work(NamedTuple):
    """Scratch of one step of one autoencoder. What its family lacks has a length of 0.

    sparse: whether this step is
    off: ∂b_dec, a part per tile
    start, feature, value: codes above 0 by sample; those of sample b at start[b] to start[b + 1]
    limit: of each sample the smallest code that is selected, as bits
    room: how many of those equal to the limit are; for batchtopk the first number alone
    """

    codes: ndarray  # (n_dict, batch)
    codes_parts: ndarray  # (n_dict, parts, batch) uint16, of dense steps
    W_dec_parts: ndarray  # (n_dict, parts, h) uint16, of dense steps
    bits: ndarray  # (n_dict * batch,) int32: the same memory
    where: ndarray  # (n_dict, batch): samples that a feature fires on, ascending
    count: ndarray  # (n_dict,) int32: how many
    listed: ndarray  # (n_dict,) bool: whether `where` has them
    sparse: ndarray  # (1,) bool
    g: ndarray  # (bands, batch, h)
    g_parts: ndarray  # (bands, batch, parts, h) uint16, of dense steps
    off: ndarray  # (tiles, h)
    start: ndarray  # (batch + 2,) int64
    feature: ndarray  # (most codes of a sparse step,) int32
    value: ndarray  # the same, float32
    window: ndarray  # (n_dict, batch): samples within the threshold's window, ascending
    n_window: ndarray  # (n_dict,) int32
    maxima: ndarray  # (groups * batch,) int32: keys of the largest codes
    keys: ndarray  # (most candidates,) int32
    limit: ndarray  # (batch,) int32
    limit_value: ndarray  # (batch,) float32: the same memory
    room: ndarray  # (batch,) int32
    low: ndarray  # (batch,) int32, of bisection
    high: ndarray  # (batch,) int32
    aux: ndarray  # (n_dict, batch): ReLU(pre) of dead features, of which the largest stay
    aux_parts: ndarray  # (dead, parts, batch) uint16
    aux_bits: ndarray  # (n_dict * batch,) int32: the same memory
    n_dead: ndarray  # (1,) int64
    dead_row: ndarray  # (n_dict,) int32: where a feature stands among the dead, or -1
    aux_count: ndarray  # (dead,) int32: codes above 0
    g_aux: ndarray  # (batch, h)
    g_aux_parts: ndarray  # (batch, parts, h) uint16
    aux_dec: ndarray  # (dead, h): rows of W_dec, later ∂W_dec
    aux_dec_parts: ndarray  # (dead, parts, h) uint16, of the rows
    aux_enc: ndarray  # (dead, h): ∂W_enc
    aux_bias: ndarray  # (dead,)
    x: ndarray  # (batch, h), refined
    x_parts: ndarray  # (batch, parts, h) uint16
    back: ndarray  # (batch, h): −u
    band: ndarray  # (n_dict,) int32: of each feature
    error: ndarray  # (bands, batch): of each prefix, later its weight
    target: ndarray  # (batch or h, the larger, h): y − x W_skipᵀ, later ∂W_skip
    place: int  # 1 if it is of first codes, else 0


class Gradients(NamedTuple):
    """Gradients of a tile: scratch of one thread."""

    delta: ndarray  # (TILE, batch)
    delta_parts: ndarray  # (TILE, parts, batch) uint16
    b_enc: ndarray  # (TILE,)
    threshold: ndarray  # (TILE,)
    W_enc: ndarray  # (TILE, h)
    W_dec: ndarray  # (TILE, h)
    slope: ndarray  # (batch,), of a feature's penalty


def shapes_of_parts(
    shapes: dict[str, tuple], factors: tuple[str, ...], n_parts: int
) -> dict[str, tuple]:
    """(shape, dtype) of what stands for these factors in GEMMs."""
    found = {}
    for name in factors:
        *rows, n = shapes[name][0]
        found[f"{name}_parts"] = (*rows, n_parts, n), torch.uint16
    return found


def work_shapes(
    kind: Kind, batch: int, h: int, *, density: float, n_parts: int, skip: bool = False,
    place: int = 0,
) -> dict[str, tuple]:  # fmt: skip
    """(shape, dtype) of each field of Work that has memory of its own."""
    (arch, n), f32, i32 = kind, torch.float32, torch.int32
    family, sample = FAMILIES[arch], torch.uint16 if batch < 2**16 else i32
    most = n * batch if family.refined else int(max(density, 0) * n * batch)
    jump, topk = (n * (family.selection == name) for name in ("jump", "topk"))
    chosen, dead = n * family.has_k, n * family.aux * (not place)
    n_bands = (MOST_PREFIXES if family.nested else 1) * (not place)
    refined, compares = family.refined and not place, family.has_k or family.aux
    shapes = {
        "codes": ((n, batch), f32),
        "where": ((n, batch), sample),
        "count": ((n,), i32),
        "listed": ((n,), torch.bool),
        "sparse": ((1,), torch.bool),
        "g": ((n_bands, batch, h), f32),
        "off": ((-(-n // TILE) * (not place), h), f32),
        "start": ((batch + 2,), torch.int64),
        "feature": ((most,), i32),
        "value": ((most,), f32),
        "window": ((jump, batch), sample),
        "n_window": ((jump,), i32),
        "maxima": ((-(-topk // GROUP) * batch,), i32),
        "keys": ((int(CANDIDATES * chosen) * batch,), i32),
        **dict.fromkeys(("limit", "room", "low", "high"), ((batch * compares,), i32)),
        "aux": ((dead, batch), f32),
        "n_dead": ((1,), torch.int64),
        **dict.fromkeys(("dead_row", "aux_count"), ((dead,), i32)),
        "g_aux": ((batch if dead else 0, h), f32),
        **dict.fromkeys(("aux_dec", "aux_enc"), ((dead, h), f32)),
        "aux_bias": ((dead,), f32),
        **dict.fromkeys(("x", "back"), ((batch * refined, h), f32)),
        "band": ((n * refined,), i32),
        "error": ((n_bands * refined, batch), f32),
        "target": ((max(batch, h) * skip, h), f32),
    }
    return shapes | shapes_of_parts(shapes | {"W_dec": ((n, h), f32)}, FACTORS, n_parts)


def gradient_shapes(batch: int, h: int, n_parts: int) -> dict[str, tuple]:
    """(shape, dtype) of each field of Gradients."""
    shapes = {
        "delta": (TILE, batch),
        **dict.fromkeys(("b_enc", "threshold"), (TILE,)),
        **dict.fromkeys(("W_enc", "W_dec"), (TILE, h)),
        "slope": (batch,),
    }
    shapes = {name: (shape, torch.float32) for name, shape in shapes.items()}
    return shapes | shapes_of_parts(shapes, ("delta",), n_parts)


def largest_work(
    kinds: list[Kind], batch: int, h: int, *, place: int, **sizes: float
) -> dict[str, tuple]:
    """(numbers, dtype) of each field of Work with memory for autoencoders of any of these kinds.
    sizes: of work_shapes"""
    kinds = {kind for kind in kinds if FAMILIES[kind[0]].refined or not place}
    shapes = [work_shapes(kind, batch, h, place=place, **sizes) for kind in kinds]
    return {
        name: (max(math.prod(of_kind[name][0]) for of_kind in shapes), dtype)
        for name, (_, dtype) in (shapes[0].items() if shapes else ())
    }


class Scratch:
    """Work and Gradients of a thread, for autoencoders of these kinds."""

    def __init__(
        self,
        kinds: list[Kind],
        batch: int,
        h: int,
        *,
        density: float,
        n_parts: int = 0,
        skip: bool = False,
    ):
        self.kinds, self.batch, self.h = kinds, batch, h
        self.sizes = dict(density=density, n_parts=n_parts, skip=skip)
        self.flat: list[dict[str, Tensor]] = []  # by place
        self.gradients = Gradients(
            **{
                name: torch.empty(shape, dtype=dtype).numpy()
                for name, (shape, dtype) in gradient_shapes(batch, h, n_parts).items()
            }
        )
        self.of_kind: dict[Kind, tuple[Work, Work]] = {}

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        flat = sum(t.numel() * t.element_size() for flat in self.flat for t in flat.values())
        return flat + sum(array.nbytes for array in self.gradients)

    def works(self, kind: Kind) -> tuple[Work, Work]:
        """The Work of an autoencoder of that kind, and that of its first codes, which is the same
        if it has none; valid until the next one's."""
        if not self.flat:
            # torch's memory begins at multiples of 64 bytes, as fast vector loads want it
            for place in (0, 1):
                sizes = self.sizes | {"place": place}
                largest = largest_work(self.kinds, self.batch, self.h, **sizes).items()
                self.flat.append(
                    {name: torch.empty(n, dtype=dtype) for name, (n, dtype) in largest}
                )
        if kind not in self.of_kind:
            work = self._work(kind, 0)
            self.of_kind[kind] = work, self._work(kind, 1) if FAMILIES[kind[0]].refined else work
        return self.of_kind[kind]

    def _work(self, kind: Kind, place: int) -> Work:
        shapes = work_shapes(kind, self.batch, self.h, **self.sizes, place=place)
        arrays = {
            name: self.flat[place][name][: math.prod(shape)].view(shape).numpy()
            for name, (shape, _) in shapes.items()
        }
        arrays["bits"] = arrays["codes"].reshape(-1).view(np.int32)
        arrays["aux_bits"] = arrays["aux"].reshape(-1).view(np.int32)
        arrays["limit_value"] = arrays["limit"].view(np.float32)
        return Work(**arrays, place=place)


def views(stack: Stack, n_parts: int = 0) -> list[Sae]:
    """A stack's autoencoders as the kernels take them: views, stepping one changes the stack. The
    parts of W_enc are still to be filled."""
    n_saes, family, none = len(stack.specs), stack.family, torch.zeros(len(stack.specs), 0)
    tensors = {}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"):
        parameter = stack.parameters.get(name)
        state = stack.adam.state.get(parameter, {})
        lacking = (
            stack.W_dec[:, :0] if name == "W_skip" else none
        )  # a matrix, as where there is one
        tensors[name] = lacking if parameter is None else parameter
        tensors[f"{name}_m"] = state.get("exp_avg", lacking)
        tensors[f"{name}_v"] = state.get("exp_avg_sq", lacking)
    for name in COUNTED:
        tensors[name] = getattr(stack, name).view(n_saes, -1)
    shape = n_saes, stack.n_dict, n_parts, stack.W_dec.shape[2]
    tensors["W_enc_parts"] = torch.empty(shape, dtype=torch.uint16)
    tensors["hint"] = torch.zeros(n_saes, 2)
    n_ranked = stack.n_dict * family.refined
    tensors["order"] = torch.arange(n_ranked, dtype=torch.int32).repeat(n_saes, 1)
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    same = dict(
        bands=np.array([end for _, end in stack.bands], np.int64),
        selection=get_args(Selection).index(family.selection),
        penalty=get_args(Penalty).index(family.penalty),
        bandwidth=family.bandwidth(stack.W_dec.shape[2]),
        through_input=family.through_input,
        frozen=family.frozen,
        refined=family.refined,
        transcodes=stack.transcodes,
        aux=family.aux,
        dead_steps=stack.dead_steps,
    )
    return [
        Sae(**{name: array[i] for name, array in arrays.items()}, k=float(spec.target_l0), **same)
        for i, spec in enumerate(stack.specs)
    ]


def step_numbers(stack: Stack, n_done: int, factors: list[Factors]) -> np.ndarray:
    """StepNumbers of each step, (n, numbers) float32."""
    numbers = [
        StepNumbers(
            rate=stack.lr * f.lr / (1 - BETAS[0] ** t),
            root=(1 - BETAS[1] ** t) ** -0.5,
            eps=stack.adam.eps,
            l1_factor=f.l1,
            seeks_l0=f.seek_l0,
            project=stack.project and stack.unit_rows,
            p=f.p,
            unit_rows=stack.unit_rows,
            p_before=f.p_before,
            k_factor=f.k if stack.family.refined else 1.0,
        )
        for t, f in enumerate(factors, start=n_done + 1)
    ]
    return np.array(numbers, np.float32)
