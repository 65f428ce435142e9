"""Many sparse autoencoders trained at once on one stream of batches. Floor 1.

One autoencoder (no b_dec: it is fixed at 0 in the toy replication):

    codes = ReLU(x W_enc + b_enc)          (batch, n_dict)
    x_hat = codes W_dec                    (batch, activation_dim), rows of W_dec of length 1
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
    δ       = (g W_decᵀ + l1/batch) ∘ [codes > 0]              = ∂loss/∂(x W_enc + b_enc)
    ∂W_enc  = xᵀ δ,  ∂b_enc = Σ over batch of δ
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import normalize

PARAMETERS = ("W_enc", "b_enc", "W_dec")


@dataclass(frozen=True)
class Member:
    """One autoencoder of an ensemble.

    l1: weight of mean Σ codes in the loss, l1_alpha times its normalisation
    seed: of its start
    """

    n_dict: int
    l1: float
    seed: int


def initial_autoencoder(activation_dim: int, n_dict: int, seed: int) -> dict[str, Tensor]:
    """The start of June 2023: W_enc, b_enc as torch.nn.Linear, W_dec orthogonal, rows of length 1.

    Drawn on the CPU in float32. Feature-major as in a Stack: W_enc is (n_dict, activation_dim),
    the transpose of what Ensemble.dictionary and the saved files have.
    """
    rng = torch.Generator().manual_seed(seed)
    bound = activation_dim**-0.5  # torch.nn.Linear: U(−1/√fan_in, 1/√fan_in) for weight and bias
    W_enc = torch.empty(n_dict, activation_dim).uniform_(-bound, bound, generator=rng)
    b_enc = torch.empty(n_dict).uniform_(-bound, bound, generator=rng)
    W_dec = torch.nn.init.orthogonal_(torch.empty(n_dict, activation_dim), generator=rng)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": normalize(W_dec, dim=1)}


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

    def __init__(self, members: list[Member], activation_dim: int, *, lr: float, scratch: Scratch):
        self.members, self.scratch = members, scratch
        self.n_dict = members[0].n_dict
        starts = [initial_autoencoder(activation_dim, self.n_dict, m.seed) for m in members]
        to = {"device": scratch.device, "dtype": scratch.dtype}
        stacked = {name: torch.stack([s[name] for s in starts]).to(**to) for name in PARAMETERS}
        if scratch.dtype == torch.float64:  # rows of length 1 in the precision at hand
            stacked["W_dec"] = normalize(stacked["W_dec"], dim=2)
        self.parameters = {
            k: torch.nn.Parameter(t, requires_grad=False) for k, t in stacked.items()
        }
        self.W_enc, self.b_enc, self.W_dec = (self.parameters[name] for name in PARAMETERS)
        self.l1 = torch.tensor([m.l1 for m in members], **to).view(-1, 1, 1)
        self.adam = torch.optim.Adam(self.parameters.values(), lr=lr, fused=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes feature-major (n_saes, n_dict, batch), x_hat (n_saes, batch, activation_dim)).

        Both are scratch: valid until the next forward of any stack.
        """
        n_saes, n_dict, h = self.W_enc.shape
        codes = self.scratch("codes", n_saes, n_dict, len(x))
        x_hat = self.scratch("x_hat", n_saes, len(x), h)
        x_T = x.T.expand(n_saes, h, len(x))
        torch.baddbmm(self.b_enc.unsqueeze(2), self.W_enc, x_T, out=codes).relu_()
        torch.bmm(codes.transpose(1, 2), self.W_dec, out=x_hat)
        return codes, x_hat

    def step_(self, x: Tensor) -> None:
        """One step of gradient descent on x (batch, activation_dim)."""
        batch, h = x.shape
        n_saes, n_dict, _ = self.W_enc.shape
        codes, x_hat = self.forward(x)
        g = x_hat.sub_(x).mul_(2 / (batch * h))  # (n_saes, batch, h)

        self.W_dec.grad = self.scratch("W_dec.grad", n_saes, n_dict, h)
        torch.bmm(codes, g, out=self.W_dec.grad)
        delta = self.scratch("delta", n_saes, n_dict, batch)
        torch.baddbmm(self.l1 / batch, self.W_dec, g.transpose(1, 2), out=delta)
        # threshold_backward: δ where codes > 0, else 0, in one pass
        torch.ops.aten.threshold_backward.grad_input(delta, codes, 0, grad_input=delta)
        self.W_enc.grad = self.scratch("W_enc.grad", n_saes, n_dict, h)
        torch.bmm(delta, x.expand(n_saes, batch, h), out=self.W_enc.grad)
        self.b_enc.grad = delta.sum(dim=2)

        self.adam.step()
        normalize(self.W_dec, dim=2, out=self.W_dec)


class Ensemble:
    """All autoencoders of a group of cells, stacked by width.

    Args:
        members: in any order; results come back in this order
        dtype: float32, or float64 for reference runs
    """

    def __init__(
        self,
        members: list[Member],
        activation_dim: int,
        *,
        lr: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.activation_dim = activation_dim
        self.members = members
        self.scratch = Scratch(device, dtype)
        order = sorted(range(len(members)), key=lambda i: members[i].n_dict)  # stable
        self.stacks: list[Stack] = []
        self.place: dict[int, tuple[int, int]] = {}  # member -> (stack, position in it)
        for _, group in groupby(order, key=lambda i: members[i].n_dict):
            indices = list(group)
            self.place |= {i: (len(self.stacks), k) for k, i in enumerate(indices)}
            stack_members = [members[i] for i in indices]
            self.stacks.append(Stack(stack_members, activation_dim, lr=lr, scratch=self.scratch))

    def step_(self, x: Tensor) -> None:
        """One training step of every autoencoder on x (batch, activation_dim)."""
        for stack in self.stacks:
            stack.step_(x)

    def in_order(self, per_stack: list[list]) -> list:
        """Values listed per stack, as one list in the order of `members`."""
        return [per_stack[s][k] for s, k in (self.place[i] for i in range(len(self.members)))]

    def dictionary(self, i: int) -> dict[str, Tensor]:
        """Autoencoder i as saved: W_enc (activation_dim, n_dict), b_enc (n_dict,),
        W_dec (n_dict, activation_dim), b_dec (activation_dim,), on the CPU."""
        s, k = self.place[i]
        stack = self.stacks[s]
        W_enc, b_enc, W_dec = (stack.parameters[name][k].cpu() for name in PARAMETERS)
        b_dec = torch.zeros(self.activation_dim, dtype=W_dec.dtype)
        return {"W_enc": W_enc.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}

    def state(self) -> dict[str, Tensor]:
        """Parameters and Adam's moments by name, not copied: for a checkpoint."""
        tensors = {}
        for s, stack in enumerate(self.stacks):
            for name, parameter in stack.parameters.items():
                tensors[f"{s}.{name}"] = parameter
                for moment, value in stack.adam.state[parameter].items():
                    tensors[f"{s}.{name}.{moment}"] = value
        return tensors

    def load_state_(self, tensors: dict[str, Tensor]) -> None:
        """Continues from state(), exactly."""
        for s, stack in enumerate(self.stacks):
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
