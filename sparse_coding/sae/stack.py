"""Autoencoders of one family and width, and their dense training step.

One autoencoder (b_dec is fixed at 0 in the toy replication, and left out of its arithmetic):

    pre   = (x − b_dec) W_enc + b_enc            (batch, n_dict)
    codes = ReLU(pre) of those that the family selects, else 0
    x_hat = codes W_dec + b_dec                  (batch, activation_dim), rows of W_dec of length 1
    loss  = mean over batch and dimensions of (x − x_hat)² + l1 · mean over batch of penalty(codes)

Which families there are, and their sources, is in families.py. Where several codes are equal, the
selection of a k takes those of the lowest feature, then of the lowest sample.

Inside, everything is feature-major (features in rows, samples in columns): a feature's weights,
moments and codes are contiguous.

Gradients are derived by hand (autograd agrees to 1e-9 in float64, see tests/sae/test_families.py):

    g       = 2/(batch · activation_dim) · (x_hat − x)         = ∂loss/∂x_hat
    ∂W_dec  = codesᵀ g
    δ       = (g W_decᵀ + l1/batch · penalty′(codes)) ∘ [codes > 0] = ∂loss/∂(encoder's output)
    ∂b_enc  = Σ over batch of δ
    ∂W_enc  = (x − b_dec)ᵀ δ = xᵀ δ − b_decᵀ ∂b_enc
    ∂b_dec  = Σ over batch of g − W_enc ∂b_enc

penalty′ is 1 (l1), p · (codes + eps)^(p−1) (lp), slope · (1 − tanh²(slope · codes)) (l0_tanh) or 0.

Nested prefixes (Matryoshka): the loss has the mean squared error of x_hat_l, from the features of
prefix l alone, for each prefix; a feature's g is the sum over the prefixes that contain it.

Thresholds θ: the step at θ has a straight-through gradient, from the window |pre − θ| < eps/2:

    ∂θ = −1/eps · Σ over the window of (θ δ′ + l1/batch · [l0_step])   with δ′ = δ before its mask

and δ gains θ/eps · δ′ in the window, where the family passes that gradient through the input, too.

Auxiliary loss: of the features that are dead, the activation_dim/2 largest ReLU(pre) of a sample
reconstruct e = x − x_hat, which is given: AUX · mean of (e − aux W_dec)².

Free rows (an option, as in SAELens): a row of length n counts as one of length 1 whose code is
n · code, which is what selections of a k compare and what penalties but l0_step see; thresholds
compare pre itself. So with φ = l1/batch · penalty′(n · codes), δ gains n · φ, and the gradient of a
row gains Σ over batch of φ · codes, along the row. Raw rows, of any length too, count as they are.

p-annealing: whenever p falls, l1 changes so that l1 · Σ codes^p of the batch at hand does not
(Karvonen et al. use the mean of the last ten batches, and ten falls).

Refined families: the codes above are the first ones, c₁. With r = x − b_dec − c₁ W_dec,

    pre₂  = pre + REFINEMENT · r W_enc           and the codes are chosen from that

so with δ of pre₂ and u = REFINEMENT · δ W_encᵀ = ∂loss/∂r: ∂W_enc gains REFINEMENT · rᵀ δ, ∂W_dec
gains −c₁ᵀ u, ∂b_dec gains −Σ u, and δ of pre is δ − (u W_decᵀ) ∘ [c₁ > 0]. Bands are cut along the
ranks of the features by how often they fire; the error of an inner prefix trains its last band
alone, beside the error of the whole. Errors of samples weigh as softmax(TILT · error / their mean).

Transcoders predict another site's y from x (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944):
y takes x's place in the loss, in e and in g, and nothing is taken off the encoder's input. A skip
connection (Paulo, Shabalin, Belrose 2025, arXiv 2501.18823) is part of every prefix's y_hat:

    pre = x W_enc + b_enc        y_hat = codes W_dec + b_dec + x W_skipᵀ, W_skip at first 0
    ∂W_skip = gᵀ x               ∂b_dec = Σ over batch of g               ∂W_enc = xᵀ δ

Gradient projection (an option): the part of ∂W_dec along a row of W_dec only changes the row's
length, which is put back to 1, so Adam is spared it (Bricken et al. 2023, Towards Monosemanticity).
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.sae.adam import Adam
from sparse_coding.sae.families import (
    AUX,
    EMA,
    FAMILIES,
    LP_EPS,
    RATE_EMA,
    REFINEMENT,
    SLOPE,
    THRESHOLD,
    TILT,
    bands,
)
from sparse_coding.sae.spec import (
    BETAS,
    DEAD_STEPS,
    DORMANT,
    L0_CLAMP,
    L0_GAIN,
    Factors,
    SAESpec,
    stacked_starts,
)

PARAMETERS = ("W_enc", "b_enc", "W_dec")  # and, where there are such, b_dec, threshold and W_skip


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
    """Autoencoders of one family and width, (n_saes, n_dict, activation_dim) each for W_enc and
    W_dec.

    dead_steps: without firing, after which a feature counts as dead
    """

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
        dead_steps: int = DEAD_STEPS,
    ):
        self.specs, self.scratch, self.project = specs, scratch, project
        self.n_dict, self.lr = specs[0].n_dict, lr * specs[0].lr_factor
        self.family, self.transcodes = FAMILIES[specs[0].arch], specs[0].transcodes
        self.bands = bands(self.n_dict, specs[0].prefixes if self.family.nested else (1.0,))
        to = {"device": scratch.device, "dtype": scratch.dtype}
        shape = (len(specs), self.n_dict)
        stacked = stacked_starts(specs, activation_dim, **to)
        if b_dec is not None:
            stacked["b_dec"] = b_dec.to(**to).repeat(len(specs), 1) * self.x_scale  # (n_saes, h)
        if self.family.selection == "jump":
            stacked["threshold"] = torch.full(shape, THRESHOLD, **to)
        self.parameters = {
            k: torch.nn.Parameter(t, requires_grad=False) for k, t in stacked.items()
        }
        self.W_enc, self.b_enc, self.W_dec = (self.parameters[name] for name in PARAMETERS)
        self.b_dec = self.parameters.get("b_dec")
        self.threshold = self.parameters.get("threshold")
        self.W_skip = self.parameters.get("W_skip")  # (n_saes, width of y, width of x)
        self.l1 = torch.tensor([spec.l1 for spec in specs], **to).view(-1, 1, 1)
        sought = [spec.target_l0 * spec.seeks_l0 for spec in specs]
        self.target_l0 = torch.tensor(sought, **to).view(-1, 1, 1)
        self.seeks_l0 = any(sought)
        # share of samples that a feature fires on, a running mean, in refined families
        self.rate = torch.zeros(len(specs), self.n_dict * self.family.refined, **to)
        # code chosen in a batch, a running mean
        self.smallest, self.smallest_of_first = (torch.zeros(len(specs), **to) for _ in range(2))
        self.adam = Adam(self.parameters.values(), lr=self.lr, betas=BETAS, eps=eps)
        self._start_counts(dead_steps)

    def _start_counts(self, dead_steps: int) -> None:
        self.dead_steps, shape = dead_steps, self.b_enc.shape
        of_features = {"dtype": torch.int32, "device": self.scratch.device}
        # steps since a feature fired, as far as sparse kernels count them; no moments, no hurry
        self.idle = torch.full(shape, DORMANT, **of_features)
        self.silent = torch.zeros(shape, **of_features)  # steps since it fired, or since the start
        self.n_revived = self.silent.new_zeros(shape[:1], dtype=torch.int64)

    @property
    def unit_rows(self) -> bool:
        """Whether rows of W_dec keep length 1."""
        return self.specs[0].rows == "unit"

    @property
    def weighed(self) -> bool:
        """Whether codes count times the length of their row."""
        return self.specs[0].rows == "free"

    @property
    def x_scale(self) -> float:
        """By which x is multiplied before step_ sees it."""
        return self.specs[0].x_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes feature-major (n_saes, n_dict, batch), x_hat (n_saes, batch, activation_dim)).

        Both are scratch: valid until the next forward of any stack; and in units of x.
        """
        scale = self.x_scale
        x = x if scale == 1 else x * scale
        codes = self.select_(self.encode(x))
        if self.family.refined:
            codes = self.select_(self.refine(x, codes)[0])
        x_hat = self.decode(codes)
        if self.W_skip is not None:
            x_hat += self.skipped(x)
        return (codes, x_hat) if scale == 1 else (codes.div_(scale), x_hat.div_(scale))

    def refine(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(pre₂, c₁, r (n_saes, batch, h)) from first codes, whose scratch pre₂ takes."""
        first = self.scratch("first", *codes.shape).copy_(codes)
        r = self.scratch("r", len(codes), *x.shape).copy_(x)
        r.sub_(self.decode(first))
        pre = self.encode(x)
        return pre.baddbmm_(self.W_enc, r.transpose(1, 2), alpha=REFINEMENT), first, r

    def encode(self, x: Tensor) -> Tensor:
        """Pre-activations, feature-major (n_saes, n_dict, batch); scratch."""
        n_saes, n_dict, h = self.W_enc.shape
        pre = self.scratch("codes", n_saes, n_dict, len(x))
        x_T = x.T.expand(n_saes, h, len(x))
        bias = self.b_enc.unsqueeze(2)  # (n_saes, n_dict, 1)
        if self.b_dec is not None and not self.transcodes:
            # without a copy of x; one by one: bmm gives a single one other bits than among others
            of_b_dec = [W @ b for W, b in zip(self.W_enc, self.b_dec, strict=True)]
            bias = bias - torch.stack(of_b_dec).unsqueeze(2)
        return torch.baddbmm(bias, self.W_enc, x_T, out=pre)

    def select_(self, pre: Tensor, k_factor: float = 1.0) -> Tensor:
        """Pre-activations become codes, in place; k_factor: times the k of the family."""
        kind = self.family.selection
        if kind == "jump":
            pre.mul_(pre > self.threshold.unsqueeze(2))
        codes = pre.relu_()
        batch = codes.shape[2]
        for i, of_one in enumerate(codes) if self.family.has_k else ():
            k, compared = self.specs[i].target_l0 * k_factor, self._of_unit_row(i, of_one)
            if kind == "topk":
                of_one.mul_(largest(compared.T, int(k)).T)
            else:
                of_one.mul_(largest(compared.view(1, -1), int(k * batch)).view_as(of_one))
        return codes

    def _of_unit_row(self, i: int, codes: Tensor) -> Tensor:
        """Codes (n_dict, batch) of autoencoder i if its rows of W_dec had length 1."""
        return codes * self.W_dec[i].norm(dim=1, keepdim=True) if self.weighed else codes

    def decode(self, codes: Tensor) -> Tensor:
        """x_hat (n_saes, batch, activation_dim); scratch."""
        n_saes, _, h = self.W_dec.shape
        x_hat = self.scratch("x_hat", n_saes, codes.shape[2], h)
        if self.b_dec is None:
            return torch.bmm(codes.transpose(1, 2), self.W_dec, out=x_hat)
        b_dec = self.b_dec.unsqueeze(1)
        return torch.baddbmm(b_dec, codes.transpose(1, 2), self.W_dec, out=x_hat)

    def skipped(self, x: Tensor) -> Tensor:
        """x W_skipᵀ (n_saes, batch, activation_dim)."""
        return torch.bmm(x.expand(len(self.W_skip), *x.shape), self.W_skip.mT)

    def step_(self, x: Tensor, factors: Factors, y: Tensor | None = None) -> None:
        """One dense step of gradient descent on x (batch, activation_dim); y: of transcoders."""
        pre, k_factor = self.encode(x), 1.0
        if self.family.refined:
            k_factor = factors.k
            pre, first, r = self.refine(x, self.select_(pre, k_factor))
            self._track_(self.smallest_of_first, first)
        dead = self.silent >= self.dead_steps
        needed = self.threshold is not None or (self.family.aux and bool(dead.any()))
        kept = self.scratch("pre", *pre.shape).copy_(pre) if needed else None
        codes = self.select_(pre, k_factor)
        self._adapt_(codes, factors)
        y = x if y is None else y
        errors, whole = self._errors(y if self.W_skip is None else y - self.skipped(x), codes)
        delta = self._set_decoder_gradients_(codes, errors, self.l1 * factors.l1, factors.p)
        through = 0
        if self.threshold is not None:
            through = self._set_threshold_gradient_(kept, delta, self.l1 * factors.l1)
        # threshold_backward: δ where codes > 0, else 0, in one pass
        torch.ops.aten.threshold_backward.grad_input(delta, codes, 0, grad_input=delta)
        if self.family.through_input:
            delta += through
        if self.family.aux and needed:
            self._add_auxiliary_(kept, dead, delta, whole)
        if self.family.refined:
            W_enc_grad, u = self._add_refinement_(first, r, delta)
        self._set_encoder_gradients_(x, delta, errors[0])
        if self.family.refined:
            self.W_enc.grad += W_enc_grad
            if self.b_dec is not None:
                self.b_dec.grad -= u.sum(dim=1)
        self.adam.lr = self.lr * factors.lr
        if self.family.frozen:
            self.W_dec.grad.zero_()
        self.adam.step()
        if self.unit_rows and not self.family.frozen:
            normalize(self.W_dec, dim=2, out=self.W_dec)
        if self.threshold is not None:
            self.threshold.clamp_(min=0)

    def _errors(self, x: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        """g (n_saes, batch, h) of each band of features, the sum over the prefixes with it; and of
        the whole x_hat."""
        batch, h = x.shape[-2:]
        if self.family.refined:
            return self._errors_of_ranks(x, codes)
        if len(self.bands) == 1:
            errors = [self.decode(codes).sub_(x).mul_(2 / (batch * h))]
            return errors, errors[0]
        x_hats, so_far = [], torch.zeros_like(x) if self.b_dec is None else self.b_dec.unsqueeze(1)
        for i, (first, end) in enumerate(self.bands):
            x_hat = self.scratch(f"x_hat of prefix {i}", len(codes), batch, h)
            parts = codes[:, first:end].transpose(1, 2), self.W_dec[:, first:end]
            x_hats.append(torch.baddbmm(so_far.expand_as(x_hat), *parts, out=x_hat))
            so_far = x_hat
        for x_hat in x_hats:
            x_hat.sub_(x).mul_(2 / (batch * h))
        for inner, outer in zip(x_hats[-2::-1], x_hats[::-1], strict=False):
            inner += outer
        return x_hats, x_hats[-1]

    def _bands_of_ranks(self) -> list[Tensor]:
        """Which features (n_saes, n_dict, 1) are in each band, cut along their rates."""
        order = self.rate.argsort(dim=1, descending=True, stable=True)
        ranks = order.argsort(dim=1).unsqueeze(2)
        return [(ranks >= first) & (ranks < end) for first, end in self.bands]

    def _errors_of_ranks(self, x: Tensor, codes: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same where an inner prefix trains its last band alone and samples are weighed."""
        batch, h = x.shape
        whole = self.decode(codes).sub_(x).mul_(2 / (batch * h)).clone()
        outer = _tilted(whole)
        x_hat = x.new_zeros(1) if self.b_dec is None else self.b_dec.unsqueeze(1)
        errors = []
        for band in self._bands_of_ranks()[:-1]:
            x_hat = x_hat + torch.bmm((codes * band).transpose(1, 2), self.W_dec)
            errors.append(outer + _tilted((x_hat - x) * (2 / (batch * h))))
        return [*errors, outer], whole

    def _add_refinement_(self, first: Tensor, r: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Adds what goes through the first codes to ∂W_dec and δ; returns what r adds to ∂W_enc,
        and u."""
        W_enc_grad = REFINEMENT * torch.bmm(delta, r)
        u = REFINEMENT * torch.bmm(delta.transpose(1, 2), self.W_enc)
        self.W_dec.grad.baddbmm_(first, u, alpha=-1)
        delta.sub_(torch.bmm(self.W_dec, u.transpose(1, 2)).mul_(first > 0))
        return W_enc_grad, u

    def _set_decoder_gradients_(
        self, codes: Tensor, errors: list[Tensor], l1: Tensor, p: float
    ) -> Tensor:
        """∂W_dec; returns δ before its mask, scratch."""
        n_saes, n_dict, batch = codes.shape
        self.W_dec.grad = self.scratch("W_dec.grad", *self.W_dec.shape)
        delta = self.scratch("delta", n_saes, n_dict, batch)
        plain = l1 / batch * (self.family.penalty == "l1" and not self.weighed)
        if self.family.refined:
            self.W_dec.grad.zero_()
            delta.zero_()
            for band, g in zip(self._bands_of_ranks(), errors, strict=True):
                self.W_dec.grad.baddbmm_(codes * band, g)
                delta += torch.bmm(self.W_dec, g.transpose(1, 2)) * band
            return delta
        for (first, end), g in zip(self.bands, errors, strict=True):
            torch.bmm(codes[:, first:end], g, out=self.W_dec.grad[:, first:end])
            W_dec = self.W_dec[:, first:end]
            torch.baddbmm(plain, W_dec, g.transpose(1, 2), out=delta[:, first:end])
        if self.weighed:
            self._add_penalty_of_free_rows_(codes, delta, l1, p)
        elif self.family.penalty in ("lp", "l0_tanh"):
            delta += self._penalty_slope(codes, l1 / batch, p)
        return delta

    def _penalty_slope(self, codes: Tensor, weight: Tensor, p: float) -> Tensor:
        """weight · penalty′(codes)"""
        if self.family.penalty == "lp":
            return weight * p * (codes + LP_EPS) ** (p - 1)
        if self.family.penalty == "l0_tanh":
            slope = self.slope
            return weight * slope * (1 - torch.tanh(slope * codes) ** 2)
        return weight * (self.family.penalty == "l1")

    def _add_penalty_of_free_rows_(
        self, codes: Tensor, delta: Tensor, l1: Tensor, p: float
    ) -> None:
        length = self.W_dec.norm(dim=2, keepdim=True)
        pull = self._penalty_slope(codes * length, l1 / codes.shape[2], p)  # φ
        delta += pull * length
        self.W_dec.grad += (pull * codes).sum(dim=2, keepdim=True) * (self.W_dec / length)

    @property
    def slope(self) -> float:
        """Of tanh, in the penalty l0_tanh."""
        return SLOPE * self.W_dec.shape[2] ** 0.5

    def _set_threshold_gradient_(self, pre: Tensor, delta: Tensor, l1: Tensor) -> Tensor:
        """∂θ from δ before its mask; returns what of it goes through the input."""
        theta = self.threshold.unsqueeze(2)
        pulls = theta * delta
        if self.family.penalty == "l0_step":
            pulls += l1 / pre.shape[2]
        bandwidth = self.family.bandwidth(self.W_dec.shape[2])
        pulls.mul_((pre - theta).abs() < bandwidth / 2).div_(bandwidth)
        self.threshold.grad = -pulls.sum(dim=2)
        return pulls

    def _add_auxiliary_(self, pre: Tensor, dead: Tensor, delta: Tensor, g: Tensor) -> None:
        """Adds the gradients of the auxiliary loss to ∂W_dec and δ; g: of the whole x_hat."""
        _, batch, h = g.shape
        aux = pre.relu_().mul_(dead.unsqueeze(2))
        for i, of_one in enumerate(aux):
            of_one.mul_(largest(self._of_unit_row(i, of_one).T, h // 2).T)
        left_over = g * (-batch * h / 2)  # e
        g_aux = torch.baddbmm(left_over, aux.transpose(1, 2), self.W_dec, beta=-1)
        g_aux *= 2 * AUX / (batch * h)
        self.W_dec.grad.baddbmm_(aux, g_aux)
        delta.add_(torch.bmm(self.W_dec, g_aux.transpose(1, 2)).mul_(aux > 0))

    def _set_encoder_gradients_(self, x: Tensor, delta: Tensor, g: Tensor) -> None:
        """∂W_enc, ∂b_enc and ∂b_dec from δ; projects ∂W_dec. g: the sum over all prefixes."""
        n_saes, n_dict, h = self.W_enc.shape
        W_enc_grad = self.scratch("W_enc.grad", n_saes, n_dict, h)
        if self.project and self.unit_rows:
            along = torch.mul(self.W_dec.grad, self.W_dec, out=W_enc_grad).sum(2, keepdim=True)
            self.W_dec.grad.addcmul_(self.W_dec, along, value=-1)
        self.W_enc.grad = torch.bmm(delta, x.expand(n_saes, *x.shape), out=W_enc_grad)
        self.b_enc.grad = delta.sum(dim=2)
        if self.W_skip is not None:
            self.W_skip.grad = torch.bmm(g.mT, x.expand(n_saes, *x.shape))
        if self.transcodes and self.b_dec is not None:
            self.b_dec.grad = g.sum(dim=1)
        elif self.b_dec is not None:
            through_encoder = self.b_enc.grad.unsqueeze(1)  # (n_saes, 1, n_dict)
            W_enc_grad.addcmul_(through_encoder.mT, self.b_dec.unsqueeze(1), value=-1)
            self.b_dec.grad = g.sum(dim=1) - torch.bmm(through_encoder, self.W_enc).squeeze(1)

    def _adapt_(self, codes: Tensor, factors: Factors) -> None:
        """What follows from a batch's codes alone: l1 toward the target l0 or with p, the running
        mean of the smallest code, and which features are silent."""
        if self.family.penalty == "lp" and factors.p != factors.p_before:
            active, shifted = codes > 0, codes + LP_EPS
            sums = [(shifted**p * active).sum(dim=(1, 2)) for p in (factors.p_before, factors.p)]
            ratio = torch.where(sums[1] > 0, sums[0] / sums[1], 1).view(-1, 1, 1)
            self.l1.mul_(ratio)
        if factors.seek_l0 and self.seeks_l0:
            self._seek_l0_(codes)
        if self.family.selection == "batchtopk":
            self._track_(self.smallest, codes)
        if self.family.refined:
            self.rate += RATE_EMA * ((codes > 0).to(codes).mean(dim=2) - self.rate)
        fired = codes.any(dim=2)
        self.n_revived += ((self.silent >= self.dead_steps) & fired).sum(dim=1)
        self.silent.add_(1).mul_(~fired)

    def _track_(self, smallest: Tensor, codes: Tensor) -> None:
        """Moves running means (n_saes,) toward the smallest codes of a batch."""
        for i, of_one in enumerate(codes):
            of_one = self._of_unit_row(i, of_one)
            found = torch.where(of_one > 0, of_one, torch.inf).amin()
            found = torch.where(found < torch.inf, found, smallest[i])
            before = torch.where(smallest[i] == 0, found, smallest[i])
            smallest[i] = before + EMA * (found - before)

    def _seek_l0_(self, codes: Tensor) -> None:
        """Moves l1 toward the target l0, where there is one."""
        l0 = torch.count_nonzero(codes, dim=(1, 2)).view(-1, 1, 1) / codes.shape[2]
        off = (l0 / self.target_l0).clamp(1 / L0_CLAMP, L0_CLAMP)
        self.l1.copy_(torch.where(self.target_l0 > 0, self.l1 * off**L0_GAIN, self.l1))

    def catch_up_(self) -> None:
        """Decays v of dormant features for the steps beyond DORMANT, in which sparse kernels left
        them alone, their m spent (cpu_adam.py): as if all had been stepped densely."""
        missed = (self.idle - DORMANT).clamp_(min=0)
        self.idle.zero_()
        for name in (*PARAMETERS, "threshold") if missed.any() else ():
            if name not in self.parameters:
                continue
            v = self.adam.state[self.parameters[name]]["exp_avg_sq"]
            decay = BETAS[1] ** missed.to(v.dtype)
            v *= decay if v.dim() == 2 else decay.unsqueeze(2)


def largest(values: Tensor, n: int) -> Tensor:
    """Where the n largest of each row of values (rows, m) are, as a mask; all if n > m.

    Of equal values the first ones are taken: in a row, the lower index.
    """
    n = min(n, values.shape[1])
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if values.device.type == "cpu":  # numpy selects ten times as fast
        smallest = torch.from_numpy(np.partition(values.numpy(), -n, axis=1)[:, -n, None])
        chosen = values >= smallest
        if bool((chosen.sum(dim=1, dtype=torch.int32) == n).all()):  # nothing is tied
            return chosen
    else:
        smallest = values.topk(n, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, tied = values > smallest, values == smallest
    room = n - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


def _tilted(g: Tensor) -> Tensor:
    """g (n_saes, batch, h), each sample's times batch · softmax(TILT · its error / their mean)."""
    error = g.square().sum(dim=2)
    share = torch.softmax(TILT * error / error.mean(dim=1, keepdim=True), dim=1)
    return g * (share * g.shape[1]).unsqueeze(2)
