"""Compiled kernels of all families against the dense engine in float64, and against themselves."""

import dataclasses
import statistics

import pytest
import torch
from torch import Tensor, nn

from sparse_coding.sae.engines import cpu, cpu_bf16, cpu_compile
from sparse_coding.sae.engines.cpu import CpuEngine
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.families import FAMILIES
from sparse_coding.sae.spec import SAESpec, Schedule
from sparse_coding.sae.stack import Scratch, Stack

CPU = torch.device("cpu")
H, LR = 24, 3e-3
SCHEDULE = Schedule(
    200, lr_warmup=5, l1_warmup=10, decay_start=160, anneal=range(40, 120), dead_steps=3
)
ALWAYS, NEVER = 1.0, -1.0  # densities up to which steps are sparse
TRANSCODING = [arch for arch, family in FAMILIES.items() if not family.refined]
WITH_K = [arch for arch, family in FAMILIES.items() if family.has_k and not family.refined]

k = pytest.importorskip("sparse_coding.sae.engines.cpu_kernels")
cpu_codes = pytest.importorskip("sparse_coding.sae.engines.cpu_codes")
pytestmark = pytest.mark.skipif(
    not cpu_compile.has_kernels(), reason="needs numba and a torch built with MKL"
)


def batches(n: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sparse non-negative mixtures of 60 directions, of a mean square norm of about 1."""
    rng = torch.Generator().manual_seed(5)
    directions = nn.functional.normalize(torch.randn(60, H, generator=rng, dtype=torch.float64))
    active = torch.rand(n, batch, 60, generator=rng) < 0.08
    amounts = torch.rand(n, batch, 60, generator=rng, dtype=torch.float64) * active * 0.8
    return (amounts @ directions).to(dtype)


def spec(arch: str, n_dict: int, seed: int = 0, rows: str = "unit") -> SAESpec:
    l1 = {"l1": 2e-3, "lp": 2e-3, "l0_step": 1e-4, "l0_tanh": 3e-4, "none": 0.0}
    weight = l1[FAMILIES[arch].penalty]
    return SAESpec(n_dict, weight, seed, tied=True, target_l0=4.3 + seed, arch=arch, rows=rows)


def pairs(n: int, batch: int) -> Tensor:
    """(n, 2, batch, H): x, and a y that a ReLU layer makes of it."""
    mix = torch.randn(H, H, generator=torch.Generator().manual_seed(6)) / H**0.5
    xs = batches(n, batch)
    return torch.stack([xs, (xs @ mix).relu() + 0.1], dim=1)


def transcoders(arch: str, n_dict: int) -> list[SAESpec]:
    """Two of them, with a skip connection."""
    more = dict(transcodes=True, skip=True)
    return [dataclasses.replace(spec(arch, n_dict, seed), **more) for seed in (0, 1)]


def build(
    specs: list[SAESpec], *, density: float | None, n_threads: int = 1, dtype=torch.float32, **other
) -> Ensemble:
    """density: None for the dense engine of torch."""
    options = dict(b_dec=torch.full((H,), 0.02), project=True, schedule=SCHEDULE) | other
    ensemble = Ensemble(specs, H, lr=LR, device=CPU, dtype=dtype, **options)
    ensemble.engine = (
        DenseEngine(ensemble.stacks)
        if density is None
        else CpuEngine(ensemble.stacks, n_threads=n_threads, density=density)
    )
    return ensemble


def train(ensemble: Ensemble, xs: Tensor, at_a_time: int = 50) -> Ensemble:
    for some in xs.to(ensemble.stacks[0].W_enc.dtype).split(at_a_time):
        ensemble.steps_(some)
    return ensemble


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def same_bits(a: Ensemble, b: Ensemble) -> bool:
    others = b.state()
    return all(torch.equal(tensor, others[name]) for name, tensor in a.state().items())


@pytest.mark.parametrize(
    ("arch", "n_dict", "rows"),
    [(arch, n_dict, "unit") for arch in FAMILIES for n_dict in (40, 300)]
    + [(arch, 40, "raw") for arch in WITH_K],
)
def test_parameters_and_counts_equal_dense_training_in_float64(arch, n_dict, rows):
    """Where a pre-activation is at 0, or at a threshold or the edge of its window, but for
    rounding, runs part: dense ones in float32 too, as far as these. So after 20 steps only the
    families with a k are held closely, others by the median over parameters, and those with
    thresholds to step 60."""
    xs, family = batches(200, 75), FAMILIES[arch]
    specs = [spec(arch, n_dict, seed, rows) for seed in (0, 1)]
    expected = build(specs, density=None, dtype=torch.float64)
    ours = {d: build(specs, density=d) for d in (ALWAYS, NEVER, cpu.DENSITY)}
    for end, most in ((1, 1e-6), (20, 1e-5), (60, 1e-5), (200, 1e-4)):
        if end == 200 and family.selection == "jump":
            continue
        train(expected, xs[expected.n_steps_done : end])
        for density, compiled in ours.items():
            train(compiled, xs[compiled.n_steps_done : end])
            distances = [
                distance(compiled.dictionary(i)[name], tensor)
                for i in (0, 1)
                for name, tensor in expected.dictionary(i).items()
            ]
            if end <= 20 or family.has_k:
                assert max(distances) < most, (end, density)
                assert torch.equal(compiled.stacks[0].silent, expected.stacks[0].silent)
                assert torch.equal(compiled.stacks[0].n_revived, expected.stacks[0].n_revived)
            assert statistics.median(distances) < max(most, 1e-2), (end, density)
            for i in (0, 1):
                assert compiled.l1(i) == pytest.approx(expected.l1(i), rel=1e-4)
    if family.aux:
        assert expected.n_revived(0) > 0  # the auxiliary loss was at work


@pytest.mark.parametrize("n_dict", [40, 300])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("arch", TRANSCODING)
def test_transcoders_equal_dense_training_in_float64(arch, skip, n_dict):
    xs, family = pairs(60, 75), FAMILIES[arch]
    specs = [dataclasses.replace(m, skip=skip) for m in transcoders(arch, n_dict)]
    expected = build(specs, density=None, dtype=torch.float64)
    ours = {d: build(specs, density=d) for d in (ALWAYS, NEVER, cpu.DENSITY)}
    for end in (1, 20, 60):
        train(expected, xs[expected.n_steps_done : end])
        for density, compiled in ours.items():
            train(compiled, xs[compiled.n_steps_done : end])
            distances = {  # of W_skip by a tenth: from 0 on Adam's steps are signs of gradients
                (i, name): distance(compiled.dictionary(i)[name], tensor)
                * (0.1 if name == "W_skip" else 1)
                for i in (0, 1)
                for name, tensor in expected.dictionary(i).items()
            }
            if end <= 20:  # later a code at the edge is chosen by rounding: see above
                assert max(distances.values()) < 1e-5, (end, density, distances)
            assert statistics.median(distances.values()) < 1e-2, (end, density)
    assert skip == ("W_skip" in expected.dictionary(0))
    if family.aux:
        assert expected.n_revived(0) > 0  # the auxiliary loss was at work


@pytest.mark.parametrize("density", [ALWAYS, NEVER])
@pytest.mark.parametrize("arch", TRANSCODING)
def test_bits_of_transcoders_depend_neither_on_threads_nor_on_a_resume(arch, density):
    specs, xs = transcoders(arch, 600), pairs(16, 75)
    alone = train(build(specs, density=density), xs)
    for n_threads, at_a_time in ((2, 5), (16, 12)):
        other = build(specs, density=density, n_threads=n_threads)
        assert same_bits(train(other, xs, at_a_time), alone), n_threads
    half = train(build(specs, density=density), xs[:9])
    resumed = build(specs, density=density)
    resumed.load_state_(half.state())
    assert same_bits(train(resumed, xs[9:]), alone)
    assert alone.stacks[0].W_skip.abs().min() > 0


@pytest.mark.parametrize("density", [ALWAYS, NEVER])
@pytest.mark.parametrize("arch", FAMILIES)
def test_without_b_dec_and_projection_too(arch, density):
    xs, options = batches(8, 33), dict(b_dec=None, project=False)
    expected = train(build([spec(arch, 131)], density=None, dtype=torch.float64, **options), xs)
    found = train(build([spec(arch, 131)], density=density, **options), xs).dictionary(0)
    for name, tensor in expected.dictionary(0).items():
        if name != "b_dec":
            assert distance(found[name], tensor) < 1e-5, name


def codes_of(stack: Stack, x: Tensor, *, density: float, hint: float = 0.0) -> tuple[Tensor, bool]:
    """(codes (n_dict, batch) that the kernels choose, whether from candidates)."""
    kind = (stack.specs[0].arch, stack.n_dict)
    scratch = cpu.Scratch([kind], len(x), x.shape[1], density=density)
    (sae,), (work, first) = cpu.views(stack), scratch.works(kind)
    sae.hint[:] = hint
    numbers = cpu.step_numbers(stack, 0, [SCHEDULE.at(0)])
    todo = k.ENCODE | k.BOUND | k.LIST | k.CHOOSE
    data = x[None].numpy(), cpu_bf16.parts_of(x[None], 0).numpy(), x[None].numpy()
    k.steps(sae, (work, first), scratch.gradients, data, numbers, todo, (0, cpu.NO_END))
    codes = torch.zeros(work.codes.shape)
    for f in range(stack.n_dict):
        if work.sparse[0]:
            where = torch.from_numpy(work.where[f, : work.count[f]].astype(int))
            codes[f, where] = torch.from_numpy(work.codes[f])[where]
            assert (where.diff() > 0).all()
        else:
            codes[f] = torch.from_numpy(work.codes[f])
            assert work.count[f] == codes[f].count_nonzero()
    return codes, bool(work.listed[0]) and bool(work.sparse[0])


def of_integers(
    arch: str, l0: float, *, n_dict: int = 96, highest: int = 3
) -> tuple[Stack, Tensor]:
    """A stack and an x that give pre-activations which are whole numbers, mostly equal ones."""
    rng = torch.Generator().manual_seed(1)
    m = SAESpec(n_dict, 0.0, 0, tied=True, target_l0=l0, arch=arch)
    stack = Ensemble([m], 8, lr=LR, device=CPU).stacks[0]
    stack.W_enc.copy_(torch.randint(-2, highest, stack.W_enc.shape, generator=rng))
    return stack, torch.randint(0, 3, (50, 8), generator=rng).float()


@pytest.mark.parametrize("l0", [0.5, 1.0, 3.7, 11.0, 40.0, 96.0])
@pytest.mark.parametrize("arch", WITH_K)
def test_of_equal_codes_the_same_are_chosen_as_by_the_dense_engine(arch, l0):
    stack, x = of_integers(arch, l0)
    expected = stack.forward(x)[0][0].clone()
    chosen = [codes_of(stack, x, density=ALWAYS, hint=hint) for hint in (0.0, 0.5, 2.0, 7.0, 99.0)]
    chosen.append(codes_of(stack, x, density=NEVER))
    for codes, _ in chosen:
        assert torch.equal(codes, expected)
    if l0 in (1.0, 3.7):
        assert {few for _, few in chosen} == {True, False}  # from candidates, and from all


@pytest.mark.parametrize("arch", WITH_K)
def test_candidates_do_where_codes_differ_and_give_what_all_codes_give(arch):
    stack = Ensemble([spec(arch, 300)], H, lr=LR, device=CPU).stacks[0]
    for x in batches(4, 75):
        expected = stack.forward(x)[0][0].clone()
        hint = float(expected[expected > 0].min()) * cpu_codes.HINT
        for density, from_candidates in ((cpu.DENSITY, True), (NEVER, False)):
            codes, few = codes_of(stack, x, density=density, hint=hint)
            assert few is from_candidates
            assert torch.equal(codes > 0, expected > 0)


@pytest.mark.parametrize("hint", [0.0, 1e-3, 1e3, float("inf")])
@pytest.mark.parametrize("arch", WITH_K)
def test_where_fewer_are_positive_than_k_all_of_them_are_chosen(arch, hint):
    stack, x = of_integers(arch, 30, highest=0)
    stack.W_enc[:, :, 0] = 3.0
    expected = stack.forward(x)[0][0]
    assert 0 < (expected > 0).sum() < 30 * len(x)
    for density in (ALWAYS, NEVER):
        assert torch.equal(codes_of(stack, x, density=density, hint=hint)[0], expected)


def test_a_hint_that_is_too_high_is_replaced_by_one_below_the_smallest_code_chosen():
    ensemble = build([spec("batchtopk", 300)], density=ALWAYS)
    (sae,) = ensemble.engine.saes
    for x in batches(3, 75):
        sae.hint[:] = 1e9
        ensemble.step_(x)
        codes = ensemble.stacks[0].forward(x)[0]
        assert 0.5 * codes[codes > 0].min() < sae.hint[0] < codes[codes > 0].min()


@pytest.mark.parametrize("density", [ALWAYS, NEVER])
@pytest.mark.parametrize("arch", FAMILIES)
def test_bits_depend_neither_on_threads_nor_on_steps_at_a_time_nor_on_neighbours(arch, density):
    """16 threads share each of these autoencoders of 5 tiles, one thread takes them alone. Some
    hundred features are dead at times, more than half the width in a sample: they are chosen."""
    specs, xs = [spec(arch, 600, seed) for seed in (0, 1)], batches(16, 75)
    dead_steps = 1 if FAMILIES[arch].refined else 3  # more fire where k is higher at first
    options = dict(density=density, schedule=dataclasses.replace(SCHEDULE, dead_steps=dead_steps))
    alone = train(build(specs, **options), xs)
    for n_threads, at_a_time in ((2, 5), (3, 1), (16, 12)):
        other = build(specs, **options, n_threads=n_threads)
        assert same_bits(train(other, xs, at_a_time), alone), n_threads
    single = train(build(specs[1:], **options, n_threads=16), xs)
    for name, tensor in single.dictionary(0).items():
        assert torch.equal(tensor, alone.dictionary(1)[name]), name
    if FAMILIES[arch].aux:
        assert (alone.stacks[0].silent >= dead_steps).sum() > 2 * 128


def test_bits_are_the_same_alone_as_in_a_grid_of_all_families_and_two_sizes():
    specs = [spec(arch, n, seed) for n in (48, 300) for arch in FAMILIES for seed in (0, 1)]
    xs = batches(60, 33)
    together = train(build(specs, density=cpu.DENSITY, n_threads=2), xs)
    for i, one in enumerate(specs):
        alone = train(build([one], density=cpu.DENSITY, n_threads=1 + i % 3), xs, 7)
        for name, tensor in together.dictionary(i).items():
            assert torch.equal(tensor, alone.dictionary(0)[name]), (one, name)
        assert together.l1(i) == alone.l1(0)
        assert together.n_revived(i) == alone.n_revived(0)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_resume_has_the_same_bits_although_hints_are_not_kept(arch):
    specs, xs, checkpoints = [spec(arch, 96, seed) for seed in (0, 1)], batches(120, 33), {}
    straight = build(specs, density=0.1)
    for step in range(0, 120, 10):
        checkpoints[step] = {name: t.clone() for name, t in straight.state().items()}
        train(straight, xs[step : step + 10])
    for step in (10, 50, 110):
        resumed = build(specs, density=0.1)
        resumed.load_state_(checkpoints[step])
        assert same_bits(train(resumed, xs[step:]), straight), step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("density", [ALWAYS, NEVER, cpu.DENSITY])
@pytest.mark.parametrize("arch", FAMILIES)
def test_an_autoencoder_that_diverges_does_so_visibly_and_raises_nothing(arch, density, value):
    ensemble = build([spec(arch, 96)], density=density)
    xs = batches(8, 33)
    xs[1, 5, 3] = value
    train(ensemble, xs)
    if value != 3e38:
        assert ensemble.dictionary(0)["W_enc"].isnan().any()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("batch", [32, 75])
@pytest.mark.parametrize("arch", FAMILIES)
def test_memory_plan_is_what_an_engine_of_this_family_allocates(arch, batch, skip):
    kinds = [(arch, 96), (arch, 300), ("relu", 300)]
    scratch = cpu.Scratch(kinds, batch, H, density=cpu.DENSITY, skip=skip)
    for kind in kinds:
        work, first = scratch.works(kind)
        assert work.codes.shape == first.codes.shape == (kind[1], batch)
        assert (first is not work) == FAMILIES[kind[0]].refined
        assert len(work.n_window) == kind[1] * (FAMILIES[kind[0]].selection == "jump")
    batches_bytes = (1 + skip) * 3 * cpu.steps_at_a_time([96, 300, 300], H) * 4 * batch * H
    planned = cpu.engine_bytes(kinds, H, batch, n_threads=2, transcodes=skip)
    assert planned == 2 * scratch.n_bytes + batches_bytes
    n_threads = torch.get_num_threads()
    planned = cpu.engine_bytes(kinds, H, batch, n_threads=n_threads, transcodes=skip)
    assert ensemble_bytes(kinds, H, batch, CPU, transcodes=skip) > planned


@pytest.mark.parametrize(
    ("like", "choices"),
    [  # Matryoshka over jumps, with an auxiliary loss and the penalty l1; codes of a sample's k
        ("jumprelu_tanh", dict(penalty="l1", nested=True, aux=True)),
        ("matryoshka_refined", dict(selection="topk", nested=False)),
    ],
)
def test_a_family_made_of_other_choices_trains_as_the_dense_engine_does(monkeypatch, like, choices):
    monkeypatch.setitem(FAMILIES, "new", dataclasses.replace(FAMILIES[like], **choices))
    l0 = 5.0 * FAMILIES["new"].has_k
    xs, m = batches(20, 33), SAESpec(131, 2e-3, 0, tied=True, target_l0=l0, arch="new")
    scratch = {d: Scratch(CPU, d) for d in (torch.float32, torch.float64)}
    found = {}
    for density, dtype in ((None, torch.float64), (ALWAYS, torch.float32), (NEVER, torch.float32)):
        options = dict(b_dec=torch.zeros(H), project=True, dead_steps=3)
        stack = Stack([m], H, lr=LR, scratch=scratch[dtype], **options)
        factors = [SCHEDULE.at(i) for i in range(20)]
        engine = (
            DenseEngine([stack])
            if density is None
            else CpuEngine([stack], n_threads=1, density=density)
        )
        engine.steps_(xs.to(dtype), n_done=0, factors=factors)
        found[density] = stack.parameters
    for name, tensor in found[None].items():
        for density in (ALWAYS, NEVER):
            assert distance(found[density][name], tensor) < 1e-4, (density, name)
