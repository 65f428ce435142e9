"""Adam (Kingma, Ba 2015, https://arxiv.org/abs/1412.6980) whose moments stay where they are."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam:
    """One fused kernel of torch for all parameters. torch.optim.Adam gives the same numbers, but it
    imports torch's compiler, which takes two seconds, and makes its moments at the first step,
    while other engines hold views of them from the start.

    state: of each parameter step, exp_avg and exp_avg_sq
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, betas: tuple[float, float], eps: float
    ):
        self.lr, self.betas, self.eps = lr, betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in parameters
        }

    @torch.no_grad()
    def step(self) -> None:
        """Moves parameters against their gradients."""
        adam(
            list(self.state),
            [parameter.grad for parameter in self.state],
            *([s[name] for s in self.state.values()] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [s["step"] for s in self.state.values()],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
