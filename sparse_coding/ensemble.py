"""Many sparse autoencoders trained at once on one stream of batches. Floor 1.

One autoencoder (b_dec is fixed at 0 in the toy replication, and left out of its arithmetic):

    codes = ReLU((x − b_dec) W_enc + b_enc)      (batch, n_dict)
    x_hat = codes W_dec + b_dec                  (batch, activation_dim), rows of W_dec of length 1
    loss  = mean over batch and dimensions of (x − x_hat)² + l1 · mean over batch of Σ codes

Autoencoders of one width form a Stack; all stacks see the same x. Inside, everything is
feature-major (features in rows, samples in columns): a feature's weights, moments and codes are
contiguous, and each GEMM has the shape of a single autoencoder, batched over the stack. So on CPU
an autoencoder's numbers are the same bits whatever else is in the ensemble, if n_dict and
activation_dim are multiples of 8 (a test holds that; odd sizes, which align differently in memory,
agree to rounding). One GEMM for all encoders measured no faster, see LOG.md.

Gradients are derived by hand (autograd agrees to 1e-9 in float64, see tests/test_ensemble.py):

    g       = 2/(batch · activation_dim) · (x_hat − x)         = ∂loss/∂x_hat
    ∂W_dec  = codesᵀ g
    δ       = (g W_decᵀ + l1/batch) ∘ [codes > 0]              = ∂loss/∂(encoder's output)
    ∂b_enc  = Σ over batch of δ
    ∂W_enc  = (x − b_dec)ᵀ δ = xᵀ δ − b_decᵀ ∂b_enc
    ∂b_dec  = Σ over batch of g − W_enc ∂b_enc

Gradient projection (an option): the part of ∂W_dec along a row of W_dec only changes the row's
length, which is put back to 1, so Adam is spared it (Bricken et al. 2023, Towards Monosemanticity).
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sparse_coding.members import Member, Schedule, initial_autoencoder

PARAMETERS = ("W_enc", "b_enc", "W_dec")  # and b_dec, where it is trained
# Of the controller that finds l1 for a wished l0, per step; ours, LOG.md
L0_GAIN = 0.008  # d log l1 / d log(l0 / target): its time constant is some hundred steps
L0_CLAMP = 2.0  # l0 further off than this factor counts as this: the start is no measurement


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
        members: list[Member],
        activation_dim: int,
        *,
        lr: float,
        scratch: Scratch,
        eps: float = 1e-8,
        b_dec: Tensor | None = None,
        project: bool = False,
    ):
        self.members, self.scratch, self.lr, self.project = members, scratch, lr, project
        self.n_dict = members[0].n_dict
        starts = [
            initial_autoencoder(activation_dim, self.n_dict, m.seed, tied=m.tied) for m in members
        ]
        to = {"device": scratch.device, "dtype": scratch.dtype}
        stacked = {name: torch.stack([s[name] for s in starts]).to(**to) for name in PARAMETERS}
        if scratch.dtype == torch.float64:  # rows of length 1 in the precision at hand
            stacked["W_dec"] = normalize(stacked["W_dec"], dim=2)
        if b_dec is not None:
            stacked["b_dec"] = b_dec.to(**to).repeat(len(members), 1)  # (n_saes, h)
        self.parameters = {
            k: torch.nn.Parameter(t, requires_grad=False) for k, t in stacked.items()
        }
        self.W_enc, self.b_enc, self.W_dec = (self.parameters[name] for name in PARAMETERS)
        self.b_dec = self.parameters.get("b_dec")
        self.l1 = torch.tensor([m.l1 for m in members], **to).view(-1, 1, 1)
        self.target_l0 = torch.tensor([m.target_l0 for m in members], **to).view(-1, 1, 1)
        self.seeks_l0 = any(m.target_l0 for m in members)
        self.adam = torch.optim.Adam(self.parameters.values(), lr=lr, eps=eps, fused=True)

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

    def step_(self, x: Tensor, *, lr_factor: float, l1_factor: float, seek_l0: bool) -> None:
        """One step of gradient descent on x (batch, activation_dim)."""
        batch, h = x.shape
        codes, x_hat = self.forward(x)
        if seek_l0 and self.seeks_l0:
            self._seek_l0_(codes)
        g = x_hat.sub_(x).mul_(2 / (batch * h))  # (n_saes, batch, h)
        self._set_gradients_(x, codes, g, l1=self.l1 * l1_factor)
        self.adam.param_groups[0]["lr"] = self.lr * lr_factor
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
        """Moves l1 toward the wished l0, where one is wished."""
        l0 = torch.count_nonzero(codes, dim=(1, 2)).view(-1, 1, 1) / codes.shape[2]
        off = (l0 / self.target_l0).clamp(1 / L0_CLAMP, L0_CLAMP)
        self.l1 = torch.where(self.target_l0 > 0, self.l1 * off**L0_GAIN, self.l1)


class Ensemble:
    """All autoencoders of a group of cells, stacked by width.

    Args:
        members: in any order; results come back in this order
        dtype: float32, or float64 for reference runs
        b_dec: its start, (activation_dim,); None fixes it at 0
        project: whether gradients are projected
    """

    def __init__(
        self,
        members: list[Member],
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
        self.members, self.schedule, self.n_steps_done = members, schedule, 0
        self.scratch = Scratch(device, dtype)
        order = sorted(range(len(members)), key=lambda i: members[i].n_dict)  # stable
        self.stacks: list[Stack] = []
        self.place: dict[int, tuple[int, int]] = {}  # member -> (stack, position in it)
        for _, group in groupby(order, key=lambda i: members[i].n_dict):
            indices = list(group)
            self.place |= {i: (len(self.stacks), k) for k, i in enumerate(indices)}
            stack_members = [members[i] for i in indices]
            options = dict(
                lr=lr, eps=schedule.eps, scratch=self.scratch, b_dec=b_dec, project=project
            )
            self.stacks.append(Stack(stack_members, activation_dim, **options))

    def step_(self, x: Tensor) -> None:
        """One training step of every autoencoder on x (batch, activation_dim)."""
        lr_factor = self.schedule.lr_factor(self.n_steps_done)
        l1_factor = self.schedule.l1_factor(self.n_steps_done)
        seek_l0 = self.schedule.seeks_l0(self.n_steps_done)
        for stack in self.stacks:
            stack.step_(x, lr_factor=lr_factor, l1_factor=l1_factor, seek_l0=seek_l0)
        self.n_steps_done += 1

    def in_order(self, per_stack: list[list]) -> list:
        """Values listed per stack, as one list in the order of `members`."""
        return [per_stack[s][k] for s, k in (self.place[i] for i in range(len(self.members)))]

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
        """The weight of the L1 term of autoencoder i: what the controller found, if it seeks."""
        s, k = self.place[i]
        return float(self.stacks[s].l1[k])

    def state(self) -> dict[str, Tensor]:
        """Parameters and Adam's moments by name, not copied: for a checkpoint."""
        tensors = {}
        for s, stack in enumerate(self.stacks):
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
        for s, stack in enumerate(self.stacks):
            stack.l1 = tensors.get(f"{s}.l1", stack.l1).to(stack.l1.device)
            for name, parameter in stack.parameters.items():
                parameter.copy_(tensors[f"{s}.{name}"])
                prefix = f"{s}.{name}."
                stack.adam.state[parameter] = {
                    key.removeprefix(prefix): value.to(parameter.device, copy=True)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }


def ensemble_bytes(n_dicts: list[int], activation_dim: int, batch_size: int) -> int:
    """Bytes that an ensemble of these widths needs: its state, and scratch for its largest stack.

    With Adam's moments the state is 12 (2 n_dict h + n_dict) bytes per autoencoder, h =
    activation_dim; the scratch holds codes, δ (n_dict x batch), two gradients (n_dict x h), x_hat.
    """
    h = activation_dim
    state = sum(12 * (2 * n * h + n) for n in n_dicts)
    scratch = max(
        n_dicts.count(n) * 4 * (2 * n * (batch_size + h) + batch_size * h) for n in set(n_dicts)
    )
    return state + scratch
