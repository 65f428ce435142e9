"""Autoencoders of one width and their dense training step.

One autoencoder (b_dec is fixed at 0 in the toy replication, and left out of its arithmetic):

    codes = ReLU((x − b_dec) W_enc + b_enc)      (batch, n_dict)
    x_hat = codes W_dec + b_dec                  (batch, activation_dim), rows of W_dec of length 1
    loss  = mean over batch and dimensions of (x − x_hat)² + l1 · mean over batch of Σ codes

Inside, everything is feature-major (features in rows, samples in columns): a feature's weights,
moments and codes are contiguous.

Gradients are derived by hand (autograd agrees to 1e-9 in float64, see tests/sae/test_ensemble.py):

    g       = 2/(batch · activation_dim) · (x_hat − x)         = ∂loss/∂x_hat
    ∂W_dec  = codesᵀ g
    δ       = (g W_decᵀ + l1/batch) ∘ [codes > 0]              = ∂loss/∂(encoder's output)
    ∂b_enc  = Σ over batch of δ
    ∂W_enc  = (x − b_dec)ᵀ δ = xᵀ δ − b_decᵀ ∂b_enc
    ∂b_dec  = Σ over batch of g − W_enc ∂b_enc

Gradient projection (an option): the part of ∂W_dec along a row of W_dec only changes the row's
length, which is put back to 1, so Adam is spared it (Bricken et al. 2023, Towards Monosemanticity).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.sae.spec import (
    BETAS,
    DORMANT,
    L0_CLAMP,
    L0_GAIN,
    Factors,
    SAESpec,
    initial_autoencoder,
)

PARAMETERS = ("W_enc", "b_enc", "W_dec")  # and b_dec, where it is trained


class Scratch:
    """Buffers that all stacks share, since one stack is stepped at a time: allocated once."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        n = torch.Size(shape).numel()
        if name not in self.flat or self.flat[name].numel() < n:
            self.flat[name] = torch.empty(n, device=self.device, dtype=self.dtype)
        return self.flat[name][:n].view(shape)


class Stack:
    """Autoencoders of one width, (n_saes, n_dict, activation_dim) each for W_enc and W_dec."""

    def __init__(
        self,
        specs: list[SAESpec],
        activation_dim: int,
        *,
        lr: float,
        scratch: Scratch,
        eps: float = 1e-8,
        b_dec: Tensor | None = None,
        project: bool = False,
    ):
        self.specs, self.scratch, self.lr, self.project = specs, scratch, lr, project
        self.n_dict = specs[0].n_dict
        to = {"device": scratch.device, "dtype": scratch.dtype}
        stacked = _stacked_starts(specs, activation_dim, **to)
        if b_dec is not None:
            stacked["b_dec"] = b_dec.to(**to).repeat(len(specs), 1)  # (n_saes, h)
        self.parameters = {
            k: torch.nn.Parameter(t, requires_grad=False) for k, t in stacked.items()
        }
        self.W_enc, self.b_enc, self.W_dec = (self.parameters[name] for name in PARAMETERS)
        self.b_dec = self.parameters.get("b_dec")
        self.l1 = torch.tensor([spec.l1 for spec in specs], **to).view(-1, 1, 1)
        self.target_l0 = torch.tensor([spec.target_l0 for spec in specs], **to).view(-1, 1, 1)
        self.seeks_l0 = any(spec.target_l0 for spec in specs)
        self.adam = _adam_in_place(self.parameters.values(), lr=lr, eps=eps)
        # steps since a feature fired, as far as sparse kernels count them; no moments, no hurry
        shape = (len(specs), self.n_dict)
        self.idle = torch.full(shape, DORMANT, dtype=torch.int32, device=scratch.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes feature-major (n_saes, n_dict, batch), x_hat (n_saes, batch, activation_dim)).

        Both are scratch: valid until the next forward of any stack.
        """
        n_saes, n_dict, h = self.W_enc.shape
        codes = self.scratch("codes", n_saes, n_dict, len(x))
        x_hat = self.scratch("x_hat", n_saes, len(x), h)
        x_T = x.T.expand(n_saes, h, len(x))
        bias = self.b_enc.unsqueeze(2)  # (n_saes, n_dict, 1)
        if self.b_dec is None:
            torch.baddbmm(bias, self.W_enc, x_T, out=codes).relu_()
            torch.bmm(codes.transpose(1, 2), self.W_dec, out=x_hat)
            return codes, x_hat
        # (x − b_dec) W_enc + b_enc without a copy of x per autoencoder
        bias = torch.baddbmm(bias, self.W_enc, self.b_dec.unsqueeze(2), alpha=-1)
        torch.baddbmm(bias, self.W_enc, x_T, out=codes).relu_()
        torch.baddbmm(self.b_dec.unsqueeze(1), codes.transpose(1, 2), self.W_dec, out=x_hat)
        return codes, x_hat

    def step_(self, x: Tensor, factors: Factors) -> None:
        """One dense step of gradient descent on x (batch, activation_dim)."""
        batch, h = x.shape
        codes, x_hat = self.forward(x)
        if factors.seek_l0 and self.seeks_l0:
            self._seek_l0_(codes)
        g = x_hat.sub_(x).mul_(2 / (batch * h))  # (n_saes, batch, h)
        self._set_gradients_(x, codes, g, l1=self.l1 * factors.l1)
        self.adam.param_groups[0]["lr"] = self.lr * factors.lr
        self.adam.step()
        normalize(self.W_dec, dim=2, out=self.W_dec)

    def _set_gradients_(self, x: Tensor, codes: Tensor, g: Tensor, *, l1: Tensor) -> None:
        """Gradients of all parameters, by the formulas above."""
        n_saes, n_dict, h = self.W_enc.shape
        batch = len(x)
        self.W_dec.grad = self.scratch("W_dec.grad", n_saes, n_dict, h)
        torch.bmm(codes, g, out=self.W_dec.grad)
        W_enc_grad = self.scratch("W_enc.grad", n_saes, n_dict, h)
        if self.project:
            along = torch.mul(self.W_dec.grad, self.W_dec, out=W_enc_grad).sum(2, keepdim=True)
            self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)
        delta = self.scratch("delta", n_saes, n_dict, batch)
        torch.baddbmm(l1 / batch, self.W_dec, g.transpose(1, 2), out=delta)
        # threshold_backward: δ where codes > 0, else 0, in one pass
        torch.ops.aten.threshold_backward.grad_input(delta, codes, 0, grad_input=delta)
        self.W_enc.grad = torch.bmm(delta, x.expand(n_saes, batch, h), out=W_enc_grad)
        self.b_enc.grad = delta.sum(dim=2)
        if self.b_dec is not None:
            through_encoder = self.b_enc.grad.unsqueeze(1)  # (n_saes, 1, n_dict)
            W_enc_grad.baddbmm_(through_encoder.mT, self.b_dec.unsqueeze(1), alpha=-1)
            self.b_dec.grad = g.sum(dim=1) - torch.bmm(through_encoder, self.W_enc).squeeze(1)

    def _seek_l0_(self, codes: Tensor) -> None:
        """Moves l1 toward the target l0, where there is one."""
        l0 = torch.count_nonzero(codes, dim=(1, 2)).view(-1, 1, 1) / codes.shape[2]
        off = (l0 / self.target_l0).clamp(1 / L0_CLAMP, L0_CLAMP)
        self.l1.copy_(torch.where(self.target_l0 > 0, self.l1 * off**L0_GAIN, self.l1))

    def catch_up_(self) -> None:
        """Decays the moments of dormant features for the steps beyond DORMANT, in which sparse
        kernels left them alone (cpu_kernels.py): as if all had been stepped densely."""
        missed = (self.idle - DORMANT).clamp_(min=0)
        self.idle.zero_()
        for name in PARAMETERS if missed.any() else ():
            state = self.adam.state[self.parameters[name]]
            for moment, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True):
                decay = beta ** missed.to(state[moment].dtype)
                state[moment] *= decay if name == "b_enc" else decay.unsqueeze(2)


def _stacked_starts(
    specs: list[SAESpec], activation_dim: int, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """name -> (n_saes, ...)"""
    starts = [
        initial_autoencoder(activation_dim, spec.n_dict, spec.seed, tied=spec.tied)
        for spec in specs
    ]
    stacked = {
        name: torch.stack([start[name] for start in starts]).to(device, dtype)
        for name in PARAMETERS
    }
    if dtype == torch.float64:  # rows of length 1 in the precision at hand
        stacked["W_dec"] = normalize(stacked["W_dec"], dim=2)
    return stacked


def _adam_in_place(parameters: Iterable[Tensor], *, lr: float, eps: float) -> torch.optim.Adam:
    """Fused Adam whose moments stay where they are from the start: other engines hold views."""
    adam = torch.optim.Adam(parameters, lr=lr, betas=BETAS, eps=eps, fused=True)
    for parameter in adam.param_groups[0]["params"]:
        adam.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam


class DenseEngine:
    """Steps stacks with torch's operations, on any device: the reference of all other engines."""

    steps_at_a_time = 1

    def __init__(self, stacks: list[Stack]):
        self.stacks = stacks

    def steps_(self, xs: Tensor, *, n_done: int, factors: list[Factors]) -> None:
        """As many steps as xs (n, batch, h) has batches, of every autoencoder."""
        for stack in self.stacks:
            stack.catch_up_()
            for x, of_step in zip(xs, factors, strict=True):
                stack.step_(x, of_step)
