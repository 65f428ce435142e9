"""The ensemble against a plain autograd autoencoder in float64, and against itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_coding.config import named_seed
from sparse_coding.sae.engines.cpu import DENSITY, Scratch
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.saved import SparseAutoencoder, unscaled
from sparse_coding.sae.spec import SAESpec, Schedule, initial_autoencoder
from sparse_coding.toy.data import ToyData, ToyStream, make_world

CPU = torch.device("cpu")
H, N_STEPS, LR = 256, 200, 1e-3
ALPHAS, SIZES = (0.01, 0.3, 10.0), (64, 512)
DATA = ToyData("post", H, 512, n_active=5, feature_prob_decay=0.99, noise_std=0.0, batch_size=64)


def batches(n: int, dtype=torch.float32) -> list[torch.Tensor]:
    stream = ToyStream(DATA, make_world(DATA, 0), batch_seed=1, device=CPU)
    return [stream.batch(step).to(dtype) for step in range(n)]


def spec(n_dict: int, alpha: float) -> SAESpec:
    return SAESpec(n_dict, alpha / n_dict, named_seed("test", n_dict, alpha))


class ReferenceSAE(nn.Module):
    """A single autoencoder in plain autograd and float64: the reference of the whole project."""

    def __init__(self, start: dict[str, torch.Tensor]):
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec = (
            nn.Parameter(start[name].double().clone()) for name in ("W_enc", "b_enc", "W_dec")
        )
        self.normalise_()

    def normalise_(self) -> None:
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def loss(self, x: torch.Tensor, l1: float) -> torch.Tensor:
        codes = torch.relu(x @ self.W_enc.T + self.b_enc)
        return ((x - codes @ self.W_dec) ** 2).mean() + l1 * codes.sum(dim=1).mean()


def train_reference(m: SAESpec) -> ReferenceSAE:
    sae = ReferenceSAE(initial_autoencoder(H, m.n_dict, m.seed))
    adam = torch.optim.Adam(sae.parameters(), lr=LR, foreach=False, fused=False)
    for x in batches(N_STEPS, torch.float64):
        adam.zero_grad()
        sae.loss(x, m.l1).backward()
        adam.step()
        sae.normalise_()
    return sae


def trained(specs: list[SAESpec], dtype=torch.float32, n_steps=N_STEPS) -> Ensemble:
    ensemble = Ensemble(specs, H, lr=LR, device=CPU, dtype=dtype)
    for x in batches(n_steps, dtype):
        ensemble.step_(x)
    return ensemble


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module")
def specs() -> list[SAESpec]:
    return [spec(n, alpha) for alpha in ALPHAS for n in SIZES]  # sizes interleaved on purpose


@pytest.fixture(scope="module")
def in_float32(specs) -> Ensemble:
    return trained(specs)


@pytest.fixture(scope="module")
def in_float64(specs) -> Ensemble:
    return trained(specs, torch.float64)


@pytest.mark.parametrize("i", range(len(ALPHAS) * len(SIZES)))
def test_ensemble_equals_single_autograd_sae_after_200_steps(specs, in_float32, in_float64, i):
    reference = train_reference(specs[i])
    expected = {
        "W_enc": reference.W_enc.detach().T,
        "b_enc": reference.b_enc.detach(),
        "W_dec": reference.W_dec.detach(),
    }
    for name, parameter in expected.items():
        assert distance(in_float64.dictionary(i)[name], parameter) < 1e-9, name
        assert distance(in_float32.dictionary(i)[name], parameter) < 2e-3, name


def test_a_member_has_the_same_bits_alone_as_among_others(specs, in_float32):
    for i in (0, 3, 5):
        alone = trained([specs[i]]).dictionary(0)
        for name, tensor in in_float32.dictionary(i).items():
            assert torch.equal(tensor, alone[name]), (i, name)


def test_dictionary_rows_have_length_one_at_the_start_and_after_every_step(specs):
    ensemble = Ensemble(specs, H, lr=LR, device=CPU)
    for x in [None, *batches(3)]:
        if x is not None:
            ensemble.step_(x)
        for stack in ensemble.stacks:
            torch.testing.assert_close(stack.W_dec.norm(dim=2), torch.ones(stack.W_dec.shape[:2]))


def test_start_is_that_of_linear_layers_and_an_orthogonal_decoder():
    start = initial_autoencoder(64, 32, seed=3)
    assert torch.allclose(start["W_dec"] @ start["W_dec"].T, torch.eye(32), atol=1e-5)
    for name in ("W_enc", "b_enc"):  # U(-1/8, 1/8)
        assert start[name].abs().max() <= 1 / 8
    assert start["W_enc"].std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_start_depends_on_the_seed_alone():
    a, b, c = (initial_autoencoder(16, 8, seed)["W_enc"] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_forward_computes_the_formulas_of_the_docstring(specs):
    ensemble = Ensemble(specs, H, lr=LR, device=CPU)
    x = batches(1)[0]
    saved = ensemble.dictionary(1)  # alpha 0.01, n_dict 512
    s, k = ensemble.place[1]
    codes, x_hat = ensemble.stacks[s].forward(x)
    expected = torch.relu((x - saved["b_dec"]) @ saved["W_enc"] + saved["b_enc"])
    torch.testing.assert_close(codes[k].T, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        x_hat[k], expected @ saved["W_dec"] + saved["b_dec"], atol=1e-5, rtol=1e-4
    )


def test_dictionary_has_the_names_and_shapes_of_the_contract(specs):
    saved = Ensemble(specs, H, lr=LR, device=CPU).dictionary(3)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert shapes == {"W_enc": (H, 512), "b_enc": (512,), "W_dec": (512, H), "b_dec": (H,)}
    assert not saved["b_dec"].any()


def test_state_loaded_into_a_new_ensemble_continues_with_the_same_bits(specs):
    xs = batches(12)
    straight = Ensemble(specs, H, lr=LR, device=CPU)
    for x in xs[:7]:
        straight.step_(x)
    state = {name: tensor.clone() for name, tensor in straight.state().items()}
    resumed = Ensemble(specs, H, lr=LR, device=CPU)
    resumed.load_state_(state)
    for x in xs[7:]:
        straight.step_(x)
        resumed.step_(x)
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


@pytest.mark.parametrize("engine", ["compiled", "dense"])
@pytest.mark.parametrize("n_dicts", [[64] * 3, [512, 2048], [64, 512, 512, 1024]])
def test_memory_plan_covers_what_the_ensemble_allocates(n_dicts, engine, monkeypatch):
    if engine == "dense":
        monkeypatch.setattr("sparse_coding.sae.ensemble.has_kernels", lambda: False)
    ensemble = Ensemble([spec(n, 0.3) for n in n_dicts], H, lr=LR, device=CPU)
    x = batches(1)[0]
    ensemble.step_(x)
    for stack in ensemble.stacks:  # as evaluations do
        stack.forward(x)
    held = [t for name, t in ensemble.state().items() if "step" not in name]
    held += ensemble.scratch.flat.values()
    allocated = sum(t.numel() * t.element_size() for t in held)
    kinds = [("relu", n) for n in n_dicts]
    if engine == "compiled":
        scratch = Scratch(kinds, len(x), H, density=DENSITY)
        scratch.works(("relu", max(n_dicts)))
        allocated += scratch.n_bytes * min(torch.get_num_threads(), len(n_dicts))
        allocated += 3 * 4 * x.numel() * ensemble.engine.steps_at_a_time
    assert allocated == ensemble_bytes(kinds, H, len(x), CPU)


def test_dense_steps_are_taken_one_at_a_time():
    """They may take seconds: signals and checkpoints are looked for after each."""
    ensemble = Ensemble([spec(8, 0.3)], H, lr=LR, device=CPU, dtype=torch.float64)
    assert ensemble.engine.steps_at_a_time == 1


class FullReference(nn.Module):
    """With b_dec and gradient projection, in plain autograd and float64."""

    def __init__(self, start: dict[str, torch.Tensor], b_dec: torch.Tensor):
        super().__init__()
        for name, tensor in {**start, "b_dec": b_dec}.items():
            setattr(self, name, nn.Parameter(tensor.double().clone()))
        self.normalise_()

    def normalise_(self) -> None:
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)

    def backward(self, x: torch.Tensor, l1: float) -> None:
        codes = self.codes(x)
        x_hat = codes @ self.W_dec + self.b_dec
        (((x - x_hat) ** 2).mean() + l1 * codes.sum(dim=1).mean()).backward()
        with torch.no_grad():
            along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_b_dec_projection_and_schedule_equal_autograd(dtype):
    h, n_dict, n_steps = 24, 40, 60
    rng = torch.Generator().manual_seed(5)
    x = [torch.rand(32, h, generator=rng, dtype=torch.float64) ** 3 for _ in range(n_steps)]
    b_dec = torch.cat(x).mean(dim=0)
    specs = [SAESpec(n_dict, l1, seed=i, tied=True) for i, l1 in enumerate((0.001, 0.02))]
    schedule = Schedule(n_steps=n_steps, lr_warmup=5, l1_warmup=10, decay_start=40)
    options = dict(b_dec=b_dec, project=True, schedule=schedule)
    ensemble = Ensemble(specs, h, lr=3e-3, device=CPU, dtype=dtype, **options)
    for batch in x:
        ensemble.step_(batch.to(dtype))
    for i, m in enumerate(specs):
        sae = FullReference(initial_autoencoder(h, n_dict, m.seed, tied=True), b_dec)
        adam = torch.optim.Adam(sae.parameters(), lr=3e-3, foreach=False, fused=False)
        for step, batch in enumerate(x):
            # written out, not by Schedule: rises over 5 and 10 steps, falls from step 40 to 60
            lr_factor = min(1, (step + 1) / 6) * min(1, (60 - step) / 20)
            adam.param_groups[0]["lr"] = 3e-3 * lr_factor
            adam.zero_grad()
            sae.backward(batch, m.l1 * min(1, step / 10))
            adam.step()
            sae.normalise_()
        expected = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec}
        for name, parameter in {**expected, "b_dec": sae.b_dec}.items():
            found = ensemble.dictionary(i)[name]
            assert distance(found, parameter.detach()) < (
                1e-9 if dtype == torch.float64 else 2e-3
            ), name


def test_the_controller_brings_l0_to_its_target_and_resumes_with_the_same_bits():
    stream = ToyStream(DATA, make_world(DATA, 0), batch_seed=1, device=CPU)
    schedule = Schedule(n_steps=1500, l1_warmup=50, decay_start=1200)
    specs = [SAESpec(64, 1e-3, seed=3, tied=True, target_l0=t) for t in (4.0, 0.0, 12.0)]
    ensemble = Ensemble(specs, H, lr=3e-3, device=CPU, b_dec=torch.zeros(H), schedule=schedule)
    for step in range(700):
        ensemble.step_(stream.batch(step))
    resumed = Ensemble(specs, H, lr=3e-3, device=CPU, b_dec=torch.zeros(H), schedule=schedule)
    resumed.load_state_({name: tensor.clone() for name, tensor in ensemble.state().items()})
    for step in range(700, 1500):
        ensemble.step_(stream.batch(step))
        resumed.step_(stream.batch(step))
    for name, tensor in ensemble.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    x = torch.cat([stream.batch(step) for step in range(2000, 2020)])
    l0 = (ensemble.stacks[0].forward(x)[0] > 0).sum(dim=1).float().mean(dim=1).tolist()
    assert l0[0] == pytest.approx(4, rel=0.15)
    assert l0[2] == pytest.approx(12, rel=0.15)
    assert ensemble.l1(1) == pytest.approx(1e-3)
    assert ensemble.l1(0) > ensemble.l1(2)


@pytest.mark.parametrize("arch", ["jumprelu", "matryoshka_refined"])
def test_an_autoencoder_that_scales_x_is_that_of_scaled_x_in_units_of_x(arch):
    """Beside one that does not, whose bits stay."""
    scale, plain = 0.25, SAESpec(16, 0.01, 2, target_l0=3, arch="topk")
    spec = SAESpec(16, 0.01, 1, target_l0=3, arch=arch)
    rng = torch.Generator().manual_seed(0)
    xs = 4 * torch.randn(20, 32, 8, generator=rng)
    options = dict(lr=1e-2, device=CPU, b_dec=torch.ones(8))
    together = Ensemble([plain, replace(spec, x_scale=scale)], 8, **options)
    together.steps_(xs)
    alone = Ensemble([plain], 8, **options)
    alone.steps_(xs)
    of_scaled = Ensemble([spec], 8, **options | {"b_dec": torch.full((8,), scale)})
    of_scaled.steps_(xs * scale)
    for name, tensor in alone.dictionary(0).items():
        assert torch.equal(together.dictionary(0)[name], tensor)
    ours, theirs = together.dictionary(1), unscaled(of_scaled.dictionary(0), scale)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert not torch.equal(theirs["b_dec"], of_scaled.dictionary(0)["b_dec"])
    codes, x_hat = (t.clone() for t in together.stacks[together.place[1][0]].forward(xs[0]))
    expected = (t.clone() for t in of_scaled.stacks[0].forward(xs[0] * scale))
    for found, scaled in zip((codes, x_hat), expected, strict=True):
        assert torch.allclose(found, scaled / scale)
    if arch == "jumprelu":
        own = SparseAutoencoder(**ours, metadata={})
        assert torch.allclose(own.encode(xs[0]).T, codes[0], atol=1e-5)


def test_free_rows_start_short_with_their_transpose_as_encoder():
    (free,) = Ensemble([SAESpec(16, 0.01, 1, tied=True, rows="free")], 8, lr=1, device=CPU).stacks
    (unit,) = Ensemble([SAESpec(16, 0.01, 1, tied=True)], 8, lr=1, device=CPU).stacks
    assert torch.allclose(free.W_dec, 0.1 * unit.W_dec)
    assert torch.equal(free.W_enc, free.W_dec)
    assert torch.allclose(unit.W_enc, 0.5 * unit.W_dec)
