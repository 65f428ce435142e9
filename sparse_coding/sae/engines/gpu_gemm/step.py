"""A training step of neighbours in a stack, as launches of kernels and library GEMMs."""

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from sparse_coding.sae.engines.gpu_gemm import codes, rows, select
from sparse_coding.sae.engines.gpu_gemm.parts import ROUNDS, WAYS, Rows, Shape, Work
from sparse_coding.sae.engines.gpu_gemm.precision import product
from sparse_coding.sae.families import AUX, Penalty, Selection
from sparse_coding.sae.stack import Stack, largest

WARPS = 4  # of each kernel; not tuned


class Slice(NamedTuple):
    """Neighbours in a stack that are stepped together."""

    stack: int
    first: int
    end: int
    sparse: bool
    n_near: int  # features of each that the auxiliary loss may train


def shape_of(stack: Stack, batch: int, of: Slice, factor: torch.dtype) -> Shape:
    """What the kernels of a slice are compiled for."""
    family, h = stack.family, stack.W_dec.shape[2]
    block_h = max(16, 2 ** (h - 1).bit_length())
    return Shape(
        h=h,
        batch=batch,
        selection=get_args(Selection).index(family.selection),
        penalty=get_args(Penalty).index(family.penalty),
        b_dec=stack.b_dec is not None,
        project=stack.project and stack.unit_rows,
        unit_rows=stack.unit_rows,
        frozen=family.frozen,
        through_input=family.through_input,
        aux=of.n_near > 0,
        n_bands=len(stack.bands),
        bandwidth=family.bandwidth(h),
        slope=stack.slope,
        dead_steps=stack.dead_steps,
        sparse=of.sparse,
        half=factor != torch.float32,
        block_h=block_h,
        parts=min(64, 2 ** (batch - 1).bit_length()),
        gather_h=min(512, block_h),
        row_e=max(1, min(8, 4096 // block_h)),
    )


def work_shapes(shape: Shape, n: int, of: Slice, factor: torch.dtype) -> dict[str, tuple]:
    """(shape, dtype) of each field of Work but x and numbers, for autoencoders of n features."""
    f32, i32 = torch.float32, torch.int32
    h, batch, bands, n_saes = shape.h, shape.batch, shape.n_bands, of.end - of.first
    of_codes, of_rows, of_features = (n_saes, batch, n), (n_saes, n, h), (n_saes, n)
    of_samples, of_x, near = (n_saes, batch), (n_saes, batch, h), (n_saes, of.n_near, h)
    none = (0,)
    of_sparse, of_dense = (of_codes, none) if shape.sparse else (none, of_codes)
    listed = shape.sparse or get_args(Selection)[shape.selection] in ("topk", "batchtopk")
    return {
        "centred": (of_x, factor),
        "pre": (of_codes, f32),
        "raw": (of_codes, f32),
        "by_sample": (of_codes if listed else none, i32),
        "by_feature": (of_sparse, i32),
        "codes": (of_dense, factor),
        "delta": (of_dense, factor),
        **dict.fromkeys(("n_of_sample", "limit", "last"), (of_samples, i32)),
        "least": (of_samples, f32),
        "total": ((n_saes,), i32),
        "bracket": ((n_saes, 2, ROUNDS, 2), i32),
        "reached": ((n_saes, 2, ROUNDS, shape.parts, WAYS), i32),
        "powers": ((n_saes, -(-n // shape.tile_f), 2), f32),
        **dict.fromkeys(("n_of_feature", "count", "dead", "state", "missed"), (of_features, i32)),
        "sums": ((bands, *of_x), f32),
        "r": ((bands, *of_x), f32),
        "r_factor": ((bands, *of_x), factor),
        **dict.fromkeys(("bias_grad", "threshold_grad"), (of_features, f32)),
        **dict.fromkeys(("W_enc_grad", "W_dec_grad"), (none if shape.sparse else of_rows, f32)),
        "b_dec_grad": ((n_saes, h), f32),
        "aux_slot": (of_features, i32),
        **dict.fromkeys(("aux_enc", "aux_dec"), (near, f32)),
    }


class Step:
    """What steps one slice.

    near: (n_saes, n_near) int64, distinct features, among them all that may be dead
    """

    def __init__(self, stack: Stack, values: Rows, work: Work, shape: Shape, near: Tensor):
        self.rows, self.work, self.shape, self.near = values, work, shape, near
        self.selection, self.bands = stack.family.selection, stack.bands
        self.n_saes, self.n, _ = values.W_dec.shape

    def __call__(self) -> None:
        """One step on what stands in work.x and work.numbers."""
        values, work, shape = self.rows, self.work, self.shape
        n_samples, n_features = self.n_saes * shape.batch, self.n_saes * self.n
        n_tiles = self.n_saes * -(-self.n // shape.tile_f)
        if shape.b_dec:
            torch.sub(work.x, values.b_dec.unsqueeze(1), out=work.centred)
        else:
            work.centred.copy_(work.x)
        product(work.centred, values.W_enc_factor.mT, work.pre)
        self._select(n_samples)
        self._launch(codes.spread, n_tiles)
        self._launch(codes.adapt, self.n_saes)
        if shape.sparse:
            self._launch(codes.decode, n_samples * shape.n_bands)
        else:
            for (first, end), sums in zip(self.bands, work.sums, strict=True):
                product(work.codes[:, :, first:end], values.W_dec_factor[:, first:end], sums)
        self._launch(codes.residual, n_samples)
        if shape.sparse:
            self._launch(codes.pull, n_samples)
        else:
            for (first, end), r in zip(self.bands, work.r_factor, strict=True):
                product(r, values.W_dec_factor[:, first:end].mT, work.raw[:, :, first:end])
        self._launch(codes.slopes, n_tiles)
        if shape.aux:
            self._auxiliary()
        if not shape.sparse:
            self._gradients()
        if shape.b_dec:
            through = torch.bmm(work.bias_grad.unsqueeze(1), values.W_enc).squeeze(1)
            torch.sub(work.r[0].sum(dim=1), through, out=work.b_dec_grad)
        self._launch(rows.update, n_features)
        if shape.b_dec:
            self._launch(rows.update_b_dec, self.n_saes)

    def _launch(self, kernel: Callable, n: int, **options: int) -> None:
        kernel[(n,)](self.rows, self.work, self.n, self.shape, **options, num_warps=WARPS)

    def _select(self, n_samples: int) -> None:
        """Lists of the codes of each sample, where the step or its selection needs them."""
        if self.selection == "topk":
            self._launch(select.bound, n_samples)
        if self.work.by_sample.numel():
            self._launch(select.list_candidates, n_samples)
        if self.selection == "batchtopk":
            self._launch(select.tally, self.n_saes)
            self._launch(select.list_again, n_samples)
            self._launch(select.tally, self.n_saes)
            for ties in (False, True):
                for i in range(ROUNDS):
                    self._launch(select.narrow, self.n_saes * self.shape.parts, TIES=ties, ROUND=i)
        if self.selection in ("topk", "batchtopk"):
            self._launch(select.trim, n_samples)

    def _gradients(self) -> None:
        """Of W_enc and W_dec, by GEMMs."""
        work = self.work
        product(work.delta.mT, work.centred, work.W_enc_grad)
        for (first, end), r in zip(self.bands, work.r_factor, strict=True):
            product(work.codes[:, :, first:end].mT, r, work.W_dec_grad[:, first:end])

    def _auxiliary(self) -> None:
        """Gradients of the auxiliary loss, by GEMMs over the features that may be dead."""
        work, values, near = self.work, self.rows, self.near
        _, batch, h = work.centred.shape
        slots = torch.arange(near.numel(), dtype=torch.int32, device=near.device)
        work.aux_slot.fill_(-1).scatter_(1, near, slots.view(near.shape))
        dead = work.dead.gather(1, near).unsqueeze(1)
        bias = values.b_enc.gather(1, near).unsqueeze(1)
        aux = work.pre.gather(2, near.unsqueeze(1).expand(-1, batch, -1)).add_(bias)
        aux.relu_().mul_(dead)
        if near.shape[1] > h // 2:
            for of_one in aux:
                of_one.mul_(largest(of_one, h // 2))
        factor = aux.to(work.centred.dtype)
        W_dec = values.W_dec_factor.gather(1, near.unsqueeze(2).expand(-1, -1, h))
        left = product(factor, W_dec, torch.empty_like(work.r[-1])).add_(work.r[-1]).mul_(AUX)
        left = left.to(factor.dtype)
        product(factor.mT, left, work.aux_dec)
        delta = product(left, W_dec.mT, torch.empty_like(aux)).mul_(aux > 0)
        work.bias_grad.scatter_add_(1, near, delta.sum(dim=1))
        product(delta.to(factor.dtype).mT, work.centred, work.aux_enc)
