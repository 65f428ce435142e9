"""Kernels of the CPU with factors in bf16, and where that is refused."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_coding.sae.engines import cpu, cpu_bf16, cpu_compile
from sparse_coding.sae.engines.cpu import CpuEngine
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.families import FAMILIES, TRAINED
from sparse_coding.sae.spec import SAESpec, Schedule
from sparse_coding.toy.data import ToyData, ToyStream, make_world

CPU = torch.device("cpu")
H, BATCH, LR = 64, 128, 1e-3
DATA = ToyData("post", H, 128, n_active=3, feature_prob_decay=0.97, noise_std=0.0, batch_size=BATCH)
SCHEDULE = Schedule(200, lr_warmup=5, l1_warmup=10, anneal=range(30, 150), dead_steps=20)
ALWAYS, NEVER = 1.0, -1.0  # densities up to which steps are sparse
PRECISIONS = ("bf16", "bf16x3")

needs_bf16 = pytest.mark.usefixtures("bf16_on_any_cpu")


@pytest.fixture
def bf16_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AMX and AVX512_BF16 MKL multiplies bf16, too: slowly, to the same products."""
    monkeypatch.setattr(cpu_bf16, "NEEDED", ("avx2",))
    if cpu_bf16.missing():
        pytest.skip(cpu_bf16.missing())


@pytest.fixture(scope="module")
def xs() -> torch.Tensor:
    stream = ToyStream(DATA, make_world(DATA, 0), batch_seed=1, device=CPU)
    return torch.stack([stream.batch(step) for step in range(200)])


@pytest.fixture(scope="module")
def product():
    """gemm, to be called from Python."""
    from numba import njit

    from sparse_coding.sae.engines.cpu_blas import gemm

    assert cpu_compile.has_kernels()

    @njit
    def call(transposed, a, a_parts, b, b_parts, out):
        gemm(transposed[0], transposed[1], (a, a_parts), (b, b_parts), out)

    def multiply(a: torch.Tensor, b: torch.Tensor, transposed: tuple, n_parts: int) -> torch.Tensor:
        a, b = (t.T.contiguous() if flip else t for t, flip in zip((a, b), transposed, strict=True))
        parts = [cpu_bf16.parts_of(t, n_parts).numpy() for t in (a, b)]
        out = torch.full((rows_of(a, transposed[0]), rows_of(b, not transposed[1])), torch.nan)
        call(transposed, a.numpy(), parts[0], b.numpy(), parts[1], out.numpy())
        return out

    return multiply


def rows_of(t: torch.Tensor, transposed: bool) -> int:
    return t.shape[int(transposed)]


@needs_bf16
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("shape", [(128, 256, 256), (64, 512, 96), (7, 33, 5), (1, 1, 1)])
def test_products_are_those_of_rounded_factors_or_nearly_those_of_float32(
    product, shape, transposed
):
    """Off by float32's sums, 2^-24 at each addition at most; and, with two parts, by low · low and
    what two parts leave over, 2^-16 of each product at most."""
    rng, (m, k, n) = torch.Generator().manual_seed(0), shape
    a, b = (torch.randn(*s, generator=rng) for s in ((m, k), (k, n)))
    of_sums = k**0.5 * 2**-23
    for n_parts, round_, most in ((1, torch.bfloat16, of_sums), (2, torch.float32, 2**-16)):
        out = product(a, b, transposed, n_parts)
        exact, size = (f(a.to(round_).double()) @ f(b.to(round_).double()) for f in (same, abs))
        assert float(((out - exact).abs() / size).max()) < most, n_parts
    assert float(((product(a, b, transposed, 1) - exact).abs() / size).max()) > 2**-12  # not so


def same(t: torch.Tensor) -> torch.Tensor:
    return t


def test_the_parts_of_a_row_are_those_that_torch_rounds_to():
    from numba import njit

    from sparse_coding.sae.engines.cpu_blas import split_

    @njit
    def split(row, parts):
        split_(row, parts, 0)

    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=rng).to(torch.int32)
    ties = torch.arange(256, dtype=torch.int32) * 2**16 + 2**15 + 0x3F800000
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, 1e-40])
    row = torch.cat([bits.view(torch.float32), ties.view(torch.float32), odd])
    for n_parts in (0, 1, 2):
        expected = cpu_bf16.parts_of(row[None], n_parts)[0]
        found = np.zeros(expected.shape, np.uint16)
        split(row.numpy(), found)
        found, expected = (
            t.view(torch.bfloat16).float() for t in (torch.from_numpy(found), expected)
        )
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def specs(arch: str, sizes: tuple[int, ...] = (192, 256)) -> list[SAESpec]:
    l1 = {"none": 0.0, "l0_step": 1e-4, "l0_tanh": 1e-5}.get(FAMILIES[arch].penalty, 1e-3)
    return [SAESpec(n, l1, seed, tied=True, target_l0=4, arch=arch) for seed, n in enumerate(sizes)]


def build(
    of: list[SAESpec], precision: str, *, density: float | None = None, n_threads: int = 2
) -> Ensemble:
    options = dict(b_dec=torch.full((H,), 0.02), project=True, schedule=SCHEDULE)
    ensemble = Ensemble(of, H, lr=LR, device=CPU, **options)
    choices = dict(n_threads=n_threads, density=density, precision=precision)
    ensemble.engine = CpuEngine(ensemble.stacks, **choices)
    return ensemble


def train(ensemble: Ensemble, xs: torch.Tensor, at_a_time: int = 16) -> Ensemble:
    for some in xs.split(at_a_time):
        ensemble.steps_(some)
    return ensemble


def same_bits(a: Ensemble, b: Ensemble) -> bool:
    others = b.state()
    return all(torch.equal(tensor, others[name]) for name, tensor in a.state().items())


def as_bf16(t: torch.Tensor) -> torch.Tensor:
    return t.bfloat16().double()


def gradients(ensemble: Ensemble, x: torch.Tensor, of_factor, *, sparse: bool) -> dict:
    """∂W_enc and ∂W_dec of the first autoencoder in float64, whose GEMMs see of_factor(factor)."""
    stack, l1 = ensemble.stacks[0], ensemble.specs[0].l1
    W_enc, W_dec, b_dec = stack.W_enc[0], stack.W_dec[0], stack.b_dec[0].double()
    of_sparse = torch.Tensor.double if sparse else of_factor
    pre = of_factor(x) @ of_factor(W_enc).T + stack.b_enc[0].double() - W_enc.double() @ b_dec
    codes = pre.relu()
    g = (of_sparse(codes.float()) @ of_sparse(W_dec) + b_dec - x.double()) * (2 / x.numel())
    delta = (of_sparse(g.float()) @ of_sparse(W_dec).T + l1 / len(x)) * (codes > 0)
    d_enc = of_sparse(delta.float()).T @ of_sparse(x) - delta.sum(0)[:, None] * b_dec
    d_dec = of_sparse(codes.float()).T @ of_sparse(g.float())
    rows = W_dec.double()
    return {"W_enc": d_enc, "W_dec": d_dec - (d_dec * rows).sum(1, keepdim=True) * rows}


@needs_bf16
@pytest.mark.parametrize("density", [ALWAYS, NEVER])
def test_gradients_are_those_of_rounded_factors(xs, density):
    """Tight, but for a number here and there that rounding in float32 puts to the other side of a
    tie; the same factors unrounded are ten times as far off at least."""
    of = [SAESpec(256, 1e-3, 0, tied=True)]
    ensemble = Ensemble(of, H, lr=LR, device=CPU, b_dec=torch.full((H,), 0.02), project=True)
    ensemble.engine = CpuEngine(ensemble.stacks, n_threads=1, density=density, precision="bf16")
    sparse = density == ALWAYS
    rounded = gradients(ensemble, xs[0], as_bf16, sparse=sparse)
    exact = gradients(ensemble, xs[0], torch.Tensor.double, sparse=sparse)
    ensemble.step_(xs[0])
    for name, parameter in list(ensemble.stacks[0].parameters.items()):
        if name in rounded:
            found = ensemble.stacks[0].adam.state[parameter]["exp_avg"][0].double() / 0.1
            off, off_exact = (
                float((found - of[name]).norm() / of[name].norm()) for of in (rounded, exact)
            )
            assert off < 1e-4, name
            assert off_exact > 1e-3, name


@needs_bf16
@pytest.mark.parametrize("density", [ALWAYS, NEVER, None])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", TRAINED)
def test_bits_are_the_same_for_threads_grids_and_resumed_runs(xs, arch, precision, density):
    xs, of = xs[:64], specs(arch)
    together = train(build(of, precision, density=density), xs)
    shared = train(build(of[1:], precision, density=density, n_threads=2), xs)
    alone = train(build(of[1:], precision, density=density, n_threads=1), xs)
    assert same_bits(shared, alone)
    for name, tensor in alone.dictionary(0).items():
        assert torch.equal(tensor, together.dictionary(1)[name]), name
    first = train(build(of, precision, density=density), xs[:32])
    resumed = build(of, precision, density=density)
    resumed.steps_(xs[:2])  # weights that a checkpoint replaces
    resumed.load_state_({name: tensor.clone() for name, tensor in first.state().items()})
    assert same_bits(train(resumed, xs[32:]), together)


def fvu_of(ensemble: Ensemble, xs: torch.Tensor) -> float:
    """Mean over autoencoders, on samples that were not trained on."""
    x, found = xs.flatten(0, 1), []
    for stack in ensemble.stacks:
        x_hat = stack.forward(x)[1]
        found += [((x - one).square().sum() / (x - x.mean(0)).square().sum()) for one in x_hat]
    return float(torch.stack(found).mean())


@needs_bf16
@pytest.mark.parametrize("arch", TRAINED)
def test_training_ends_where_that_in_float32_does(xs, arch):
    """Within 1 % of the fvu after 190 steps; two parts within half a percent."""
    fvu = {
        precision: fvu_of(train(build(specs(arch), precision), xs[:190]), xs[190:])
        for precision in ("float32", *PRECISIONS)
    }
    assert fvu["float32"] < 0.7
    assert fvu["bf16"] == pytest.approx(fvu["float32"], rel=0.01)
    assert fvu["bf16x3"] == pytest.approx(fvu["float32"], rel=0.005)


def test_memory_plan_counts_the_parts(monkeypatch):
    kinds, sizes = [("relu", 96), ("topk", 300)], {}
    for precision in cpu_bf16.N_PARTS:
        monkeypatch.setitem(cpu_bf16._of_process, "precision", precision)
        n_parts = cpu_bf16.N_PARTS[precision]
        scratch = cpu.Scratch(kinds, 32, H, density=cpu.OF_PARTS[n_parts], n_parts=n_parts)
        for kind in kinds:
            assert scratch.works(kind)[0].codes_parts.shape == (kind[1], n_parts, 32)
        rows = 2 * n_parts * H * (96 + 300 + cpu.steps_at_a_time([96, 300], H) * 32)
        batches = 3 * cpu.steps_at_a_time([96, 300], H) * 4 * 32 * H
        planned = cpu.engine_bytes(kinds, H, 32, n_threads=1)
        assert planned == scratch.n_bytes + batches + rows
        sizes[precision] = ensemble_bytes(kinds, H, 32, CPU)
    assert sizes["float32"] < sizes["bf16"] < sizes["bf16x3"]


def test_a_cpu_or_library_without_bf16_is_told_why(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert "neither AMX nor AVX512_BF16" in cpu_bf16.missing()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(cpu_bf16, "has_kernels", lambda: False)
    assert "numba" in cpu_bf16.missing()
    monkeypatch.setattr(cpu_bf16, "has_kernels", lambda: True)
    monkeypatch.setattr(cpu_bf16, "libtorch", lambda: types.SimpleNamespace())
    assert "no gemm_bf16bf16f32_" in cpu_bf16.missing()


@needs_bf16
def test_a_library_that_multiplies_wrongly_is_not_used(monkeypatch):
    library = {cpu_compile.BF16_GEMM: lambda *arguments: None}
    fake = types.SimpleNamespace(__getitem__=None, **library)
    monkeypatch.setattr(cpu_bf16, "libtorch", lambda: Library(fake))
    assert "wrong products" in cpu_bf16.missing()


class Library:
    """As ctypes has one."""

    def __init__(self, functions: types.SimpleNamespace):
        self.__dict__ |= vars(functions)

    def __getitem__(self, name: str):
        return getattr(self, name)


@needs_bf16
@pytest.mark.parametrize("arch", ["relu", "topk", "matryoshka"])
def test_transcoders_end_where_those_in_float32_do(xs, arch):
    """The products of W_skip are float32 in any precision."""
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(6)) / H**0.5
    pairs = torch.stack([xs, (xs @ mix).relu()], dim=1)
    of = [replace(spec, transcodes=True, skip=True) for spec in specs(arch)]
    x, y = pairs[190:].transpose(0, 1).flatten(1, 2)
    fvu = {}
    for precision in ("float32", *PRECISIONS):
        stacks = train(build(of, precision), pairs[:190]).stacks
        off = [(y - one).square().sum() for stack in stacks for one in stack.forward(x)[1]]
        fvu[precision] = float(sum(off) / len(off) / (y - y.mean(0)).square().sum())
    assert fvu["float32"] < 0.7
    assert fvu["bf16"] == pytest.approx(fvu["float32"], rel=0.01)
    assert fvu["bf16x3"] == pytest.approx(fvu["float32"], rel=0.005)
