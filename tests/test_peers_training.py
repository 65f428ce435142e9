"""Fifty steps of the trainers of SAELens and dictionary_learning, and of ours: the same parameters.

Both start from the same parameters and see the same batches, theirs in float64 (SAELens keeps
thresholds in float32), ours there and by the engine for float32, where no constant of the dense
engine is replaced. What is the same by a setting is set so here:

- their losses are sums over the dimensions, ours are means: weights of penalties and Adam's eps are
  divided by the width; dictionary_learning's Matryoshka has the mean over its n groups of errors
  that are weighted by 1/n, so there they are multiplied by n² as well
- dictionary_learning raises its learning rate from 0 at the first step, ours from the first stride:
  without a warm-up they agree; its decoders start from rows of length 1 and its b_dec at the
  geometric median of the first batch, which is given to ours
- SAELens leaves the lengths of W_dec's rows free, as ours does with rows="free". Also, they are
  kept at 1, by hooks on its own trainer that do what dictionary_learning does: the part of the
  gradient along a row is removed, and rows are normalised after the step. All that its formulas
  have of lengths then cancels out
- their clipping of gradients to 1 is never active, which is checked; only in the last test features
  count as dead

Skipped where they are not installed; tests/requirements-peers.txt says how to install them.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from sparse_coding.sae import stack as stack_module
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.families import AUX, FAMILIES, Family, bands
from sparse_coding.sae.families import PREFIXES as SHARES
from sparse_coding.sae.spec import Factors, SAESpec, Schedule

H, N_DICT, BATCH, N_STEPS, K = 24, 96, 128, 50, 6
LR, L1, L0, LR_WARMUP, L1_WARMUP, DECAY_START = 1e-3, 0.02, 2e-3, 5, 8, 40
BANDWIDTH, THRESHOLD = 0.05, 0.04
WITHIN = 1e-4  # relative, of each parameter


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    return pytest.importorskip("sae_lens")


@pytest.fixture(scope="module")
def trainers() -> Callable:
    """Makes a trainer of dictionary_learning, in float64, with rows of W_dec of length 1."""
    pytest.importorskip("dictionary_learning")
    known = dict(steps=N_STEPS, activation_dim=H, dict_size=N_DICT, layer=0, lm_name="none")
    schedule = dict(lr=LR, warmup_steps=0, decay_start=DECAY_START, device="cpu", seed=0)

    def made(name: str, **options):
        module, trainer_class = name.split(".")
        module = importlib.import_module(f"dictionary_learning.trainers.{module}")
        trainer = getattr(module, trainer_class)(**known, **schedule, **options)
        trainer.ae.double()
        if hasattr(trainer.ae, "bias"):
            weight = trainer.ae.decoder.weight.data
            weight /= weight.norm(dim=0)
        return trainer

    return made


@pytest.fixture(autouse=True)
def norms(monkeypatch) -> Iterator[list[float]]:
    """Of all gradients that a trainer would clip to 1."""
    clip, found = nn.utils.clip_grad_norm_, []

    def noted(*args, **options) -> Tensor:
        found.append(float(clip(*args, **options)))
        return torch.tensor(found[-1])

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    yield found
    assert all(norm < 1 for norm in found)


@pytest.fixture(scope="module")
def xs() -> list[Tensor]:
    """Sparse mixtures of 60 directions around a mean, short enough for gradients below 1."""
    rng = torch.Generator().manual_seed(5)
    directions = nn.functional.normalize(torch.randn(60, H, generator=rng, dtype=torch.float64))
    active = torch.rand(N_STEPS, BATCH, 60, generator=rng) < 0.08
    amounts = torch.rand(N_STEPS, BATCH, 60, generator=rng, dtype=torch.float64) * active
    return list(0.2 * (amounts @ directions + 0.1))


def ours(
    arch: str,
    start: dict[str, Tensor],
    xs: list[Tensor],
    *,
    l1: float = 0.0,
    scale: float = 1.0,
    schedule: Schedule,
    k: int = K,
    unit_rows: bool = True,
    dtype: torch.dtype = torch.float64,
    before_step: Callable[[Ensemble, int], None] = lambda *_: None,
) -> dict[str, Tensor]:
    """Our parameters after all batches.

    Args:
        start: by the names of Ensemble.dictionary; without b_dec it stays 0
        l1, scale: weight of their penalty; our loss times the width, relative to theirs
        before_step: may change the ensemble
    """
    k = k if FAMILIES[arch].has_k else 0
    spec = SAESpec(
        N_DICT,
        l1 * scale / H,
        0,
        tied=True,
        target_l0=k,
        arch=arch,
        rows="unit" if unit_rows else "free",
    )
    ensemble = Ensemble(
        [spec],
        H,
        lr=LR,
        device=torch.device("cpu"),
        dtype=dtype,
        b_dec=start.get("b_dec"),
        project=True,
        schedule=replace(schedule, n_steps=N_STEPS, eps=1e-8 * scale / H),
    )
    stack = ensemble.stacks[0]
    for name in stack.parameters.keys() & start.keys():
        value = start[name].T if name == "W_enc" else start[name]
        stack.parameters[name][0] = value
    for step, x in enumerate(xs):
        before_step(ensemble, step)
        ensemble.step_(x.to(dtype))
    found = {name: tensor[0] for name, tensor in stack.parameters.items()}
    return ensemble.dictionary(0) | found | {"W_enc": found["W_enc"].T}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict) -> None:
    for name, theirs in expected.items():
        theirs = theirs.detach().double()
        assert float((theirs - start.get(name, 0)).norm()) > 1e-3, name  # it has learnt
        off = float((found[name].double() - theirs).norm() / theirs.norm())
        assert off < WITHIN, name


# --- dictionary_learning ---


def of_dictionary_learning(ae: nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters by our names."""
    if hasattr(ae, "W_enc"):
        known = {name: getattr(ae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    else:
        known = {"W_enc": ae.encoder.weight.T, "b_enc": ae.encoder.bias}
        known |= {"W_dec": ae.decoder.weight.T}
        known["b_dec"] = ae.bias if hasattr(ae, "bias") else ae.b_dec
    if hasattr(ae, "threshold"):
        known["threshold"] = ae.threshold.expand(N_DICT)
    return {name: tensor.detach().double().clone() for name, tensor in known.items()}


P_ANNEAL = {
    "initial_sparsity_penalty": L1,
    "sparsity_function": "Lp^p",
    "sparsity_queue_length": 1,
    "p_end": 0.2,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("arch", "trainer_class", "options"),
    [
        ("relu", "standard.StandardTrainer", {"l1_penalty": L1}),
        ("p_anneal", "p_anneal.PAnnealTrainer", P_ANNEAL | {"anneal_start": 2 * N_STEPS}),
    ],
)
def test_dictionary_learning_with_a_penalty(trainers, xs, arch, trainer_class, options, dtype):
    """p-annealing before it begins: see the next test."""
    trainer = trainers(trainer_class, sparsity_warmup_steps=L1_WARMUP, **options)
    start = of_dictionary_learning(trainer.ae)
    for step, x in enumerate(xs):
        trainer.update(step, x)
    schedule = Schedule(l1_warmup=L1_WARMUP, decay_start=DECAY_START)
    found = ours(arch, start, xs, l1=L1, schedule=schedule, dtype=dtype)
    assert_same(found, of_dictionary_learning(trainer.ae), start)


def test_dictionary_learning_while_p_falls(trainers, xs, monkeypatch):
    """Its p and weight are given to ours at each step: it finds them from the batches before, ours
    finds them from the batch at hand. Its codes get no eps under the power."""
    monkeypatch.setattr(stack_module, "LP_EPS", 0.0)
    options = P_ANNEAL | {"anneal_start": 10, "anneal_end": 40, "n_sparsity_updates": 6}
    trainer = trainers("p_anneal.PAnnealTrainer", sparsity_warmup_steps=None, **options)
    start, used = of_dictionary_learning(trainer.ae), []
    for step, x in enumerate(xs):
        used.append((trainer.p, trainer.sparsity_coeff))
        trainer.update(step, x)
    assert used[-1][0] == pytest.approx(0.2)
    assert used[-1][1] < L1 / 2

    def follow(ensemble: Ensemble, step: int) -> None:
        ensemble.stacks[0].l1.fill_(used[step][1] / H)

    schedule = Followed(decay_start=DECAY_START, powers=tuple(p for p, _ in used))
    found = ours("p_anneal", start, xs, l1=L1, schedule=schedule, before_step=follow)
    assert_same(found, of_dictionary_learning(trainer.ae), start)


@dataclass(frozen=True)
class Followed(Schedule):
    """With a power p for each step, whose changes leave the weight alone."""

    powers: tuple[float, ...] = ()

    def at(self, step: int) -> Factors:
        p = self.powers[step]
        return Factors(lr=self.lr_factor(step), p=p, p_before=p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("arch", "trainer_class"),
    [
        ("topk", "top_k.TopKTrainer"),
        ("batchtopk", "batch_top_k.BatchTopKTrainer"),
        ("matryoshka", "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer"),
    ],
)
def test_dictionary_learning_with_a_k(trainers, xs, arch, trainer_class, dtype):
    """Its threshold follows the smallest code as ours does from the first step, not the 1000th."""
    sizes = [end - first for first, end in bands(N_DICT, SHARES)]
    nested = {"group_fractions": [size / N_DICT for size in sizes]}
    options = dict(k=K, threshold_start_step=-1, threshold_beta=0.99)
    trainer = trainers(trainer_class, **options, **(nested if arch == "matryoshka" else {}))
    start, module = of_dictionary_learning(trainer.ae), sys.modules[type(trainer).__module__]
    median = getattr(module, "geometric_median", None) or type(trainer).geometric_median
    start["b_dec"] = median(xs[0])
    for step, x in enumerate(xs):
        trainer.update(step, x)
    scale = len(sizes) ** 2 if arch == "matryoshka" else 1
    schedule = Schedule(decay_start=DECAY_START)
    found = ours(arch, start, xs, scale=scale, schedule=schedule, dtype=dtype)
    expected = of_dictionary_learning(trainer.ae)
    if arch == "topk":
        del expected["threshold"]  # ours has none
    assert_same(found, expected, start)


def test_dictionary_learning_with_thresholds(trainers, xs, monkeypatch):
    """Its b_dec stays at 0, as it is not taken off its input. Without its penalty, whose gradient
    it takes from codes, that is from the upper half of the window only."""
    monkeypatch.setattr(Family, "bandwidth", lambda self, width: BANDWIDTH)
    monkeypatch.setattr(stack_module, "BETAS", (0.0, 0.999))
    options = dict(sparsity_penalty=0.0, bandwidth=BANDWIDTH, sparsity_warmup_steps=None)
    trainer = trainers("jumprelu.JumpReluTrainer", **options)
    trainer.ae.b_dec.requires_grad_(False)
    trainer.ae.threshold.data.fill_(THRESHOLD)
    start = of_dictionary_learning(trainer.ae)
    del start["b_dec"]
    for step, x in enumerate(xs):
        trainer.update(step, x)
        assert trainer.ae.threshold.min() > 0  # beyond which ours would not go
    expected = of_dictionary_learning(trainer.ae)
    assert not expected.pop("b_dec").any()
    found = ours("jumprelu", start, xs, schedule=Schedule(decay_start=DECAY_START))
    assert_same(found, expected, start)


# --- SAELens ---


def of_sae_lens(sae: nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters by our names."""
    known = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if hasattr(sae, "threshold"):
        known["threshold"] = sae.threshold.clamp(min=0)  # as at the start of its next step
    if hasattr(sae, "topk_threshold"):
        known["threshold"] = sae.topk_threshold.expand(N_DICT)
    return {name: tensor.detach().double().clone() for name, tensor in known.items()}


def keep_rows_at_length_1(sae: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def project(W_dec: nn.Parameter) -> None:
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec

    def normalise(*_) -> None:
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)

    sae.W_dec.register_post_accumulate_grad_hook(project)
    optimizer.register_step_post_hook(normalise)


def sae_lens_trainer(
    sae_lens: ModuleType, name: str, options: dict, *, unit_rows: bool, **more
) -> "sae_lens.SAETrainer":
    """Its trainer of a new SAE of this name.

    options, more: of the SAE, of the trainer
    """
    torch.manual_seed(0)
    of_sae = dict(d_in=H, d_sae=N_DICT, dtype="float64", decoder_init_norm=1.0)
    of_sae |= {} if unit_rows else {"decoder_init_norm": 0.5}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(**of_sae, **options)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    # tied as it is, x_hat would be too large, and the gradients clipped
    sae.W_enc.data *= 0.5 / sae.cfg.decoder_init_norm
    schedule = dict(lr=LR, lr_end=LR, lr_warm_up_steps=LR_WARMUP)
    schedule |= dict(lr_decay_steps=N_STEPS - DECAY_START)
    n = dict(total_training_samples=N_STEPS * BATCH, train_batch_size_samples=BATCH)
    config = sae_lens.config.SAETrainerConfig(**schedule, **n, **more)
    trainer = sae_lens.SAETrainer(config, sae, iter(()))
    if unit_rows:
        keep_rows_at_length_1(sae, trainer.optimizer)
    return trainer


OF_SAE_LENS = Schedule(lr_warmup=LR_WARMUP - 1, l1_warmup=L1_WARMUP, decay_start=DECAY_START)
TANH = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True,
        "jumprelu_tanh_scale": 4 * H**0.5}  # fmt: skip
JUMP = {"jumprelu_init_threshold": THRESHOLD, "jumprelu_bandwidth": BANDWIDTH,
        "l0_warm_up_steps": L1_WARMUP}  # fmt: skip
PREFIXES = [end for _, end in bands(N_DICT, SHARES)]


SAE_LENS = [
    ("relu", "Standard", {"l1_coefficient": L1, "l1_warm_up_steps": L1_WARMUP}),
    ("topk", "TopK", {"k": K}),
    ("batchtopk", "BatchTopK", {"k": K}),
    ("matryoshka", "MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": PREFIXES}),
]
SAE_LENS_JUMP = [
    ("jumprelu", "JumpReLU", JUMP | {"l0_coefficient": L0}),
    ("jumprelu_tanh", "JumpReLU", JUMP | TANH | {"l0_coefficient": L0}),
]


@pytest.mark.parametrize(
    ("arch", "name", "options", "unit_rows", "dtype"),
    [(*one, rows, torch.float64) for one in SAE_LENS + SAE_LENS_JUMP for rows in (True, False)]
    + [(*one, True, torch.float32) for one in SAE_LENS],
)
def test_sae_lens(sae_lens, xs, monkeypatch, arch, name, options, unit_rows, dtype):
    """Thresholds of a k: its mean starts at 0, here at the first batch's, as ours does."""
    monkeypatch.setattr(Family, "bandwidth", lambda self, width: BANDWIDTH)
    trainer = sae_lens_trainer(sae_lens, name, options, unit_rows=unit_rows)
    sae, start = trainer.sae, of_sae_lens(trainer.sae)
    for step, x in enumerate(xs):
        trainer.step(x)
        trainer.n_training_steps += 1
        if step == 0 and FAMILIES[arch].selection == "batchtopk":
            sae.topk_threshold /= sae.cfg.topk_threshold_lr
    weight = L1 if arch == "relu" else L0
    options = dict(schedule=OF_SAE_LENS, unit_rows=unit_rows, dtype=dtype)
    found = ours(arch, start, xs, l1=weight, **options)
    assert_same(found, of_sae_lens(sae), start)
    assert unit_rows or (found["W_dec"].norm(dim=1) - 0.5).abs().max() > 0.01


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize(
    ("arch", "name", "options"),
    [
        ("topk", "TopK", {}),
        ("batchtopk", "BatchTopK", {}),
        ("matryoshka", "MatryoshkaBatchTopK", {"matryoshka_widths": PREFIXES}),
    ],
)
def test_sae_lens_with_dead_features(sae_lens, xs, arch, name, options, unit_rows):
    """The auxiliary loss, by our weight, where it is the same: SAELens's is weaker if fewer
    features are dead than it takes of them, and it takes negative pre-activations as well."""
    options = options | dict(k=1, aux_loss_coefficient=AUX)
    window = 3
    trainer = sae_lens_trainer(
        sae_lens, name, options, unit_rows=unit_rows, dead_feature_window=window
    )
    sae, xs = trainer.sae, [x[:32] / 2 for x in xs]
    sae.b_enc.data += 0.06
    start, n_dead = of_sae_lens(sae), []
    for x in xs:
        dead = trainer.dead_neurons
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        n_positive = (pre[:, dead] > 0).sum(dim=1)
        assert not dead.any() or n_positive.min() >= H // 2
        n_dead.append(int(dead.sum()))
        trainer.step(x)
        trainer.n_training_steps += 1
    assert min(n_dead[window + 1 :]) > 0
    schedule = replace(OF_SAE_LENS, dead_steps=window + 1)  # theirs are dead beyond the window
    found = ours(arch, start, xs, schedule=schedule, k=1, unit_rows=unit_rows)
    expected = of_sae_lens(sae)
    expected.pop("threshold", None)  # see the test above
    assert_same(found, expected, start)
