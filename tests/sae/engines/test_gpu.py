"""The kernels of a GPU against dense steps in float64: on a GPU if there is one, else interpreted.

Whatever needs a GPU itself (graphs, streams) is at the end and skipped without one.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from builders.scripts import ROOT
from torch import Tensor

from sparse_coding.sae.engines import cpu, cpu_compile, gpu
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.engines.gpu import GpuEngine, launcher, make_work, shape_of, trial_error
from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes
from sparse_coding.sae.spec import (
    BETAS,
    DORMANT,
    PLACE,
    REMAINING,
    Factors,
    SAESpec,
    Schedule,
)
from sparse_coding.sae.stack import PARAMETERS
from sparse_coding.sweep.grid import make_grid
from sparse_coding.toy.data import LAWS, ToyData, ToyStream, make_world

pytest.importorskip("triton", reason="Triton is for Linux only")
pytestmark = pytest.mark.usefixtures("quick_interpreter")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
H, BATCH, LR = 24, 40, 1e-3  # multiples of no tile
DATA = ToyData("post", H, 48, n_active=3, feature_prob_decay=0.97, noise_std=0.0, batch_size=BATCH)
SMALL = dict(encode_f=32, encode_b=32, encode_k=16, choose_f=32, list_f=16, decode_b=16,
             decode_h=16, decode_k=16, backward_b=16, backward_k=16, update_h=32,
             update_k=16)  # fmt: skip
WHOLE = dict(list_f=64)  # an autoencoder of 48 features per tile: fast in the interpreter
RUN = dict(b_dec=torch.full((H,), 0.02), project=True)  # as run.py trains
CONSTANT = Factors(1.0, 1.0, True)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """An Ensemble on a CPU compiles its kernels first; what that says is no test's here."""
    if cpu_compile.has_kernels():
        cpu.kernels_compile()


@pytest.fixture(scope="module")
def xs() -> Tensor:
    stream = ToyStream(DATA, make_world(DATA, 0), batch_seed=1, device=torch.device("cpu"))
    return torch.stack([stream.batch(step) for step in range(120)]).to(DEVICE)


def specs(n_dict: int = 48) -> list[SAESpec]:
    alphas = (0.3, 0.03, 3.0)
    return [SAESpec(n_dict, alpha / n_dict, seed) for seed, alpha in enumerate(alphas)]


def build(of: list[SAESpec], *, dense: bool = False, dtype=torch.float32, h: int = H,
          graph: bool = False, tiles: dict | None = None, **options) -> Ensemble:  # fmt: skip
    ensemble = Ensemble(of, h, lr=LR, device=DEVICE, dtype=dtype, **options)
    stacks = ensemble.stacks
    ensemble.engine = (
        DenseEngine(stacks) if dense else GpuEngine(stacks, graph=graph, **(tiles or WHOLE))
    )
    return ensemble


def in_float64(of: list[SAESpec], **options) -> Ensemble:
    return build(of, dense=True, dtype=torch.float64, **options)


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


def copied(ensemble: Ensemble) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in ensemble.state().items()}


# ---- kernel by kernel


@pytest.mark.parametrize("options", [{}, RUN], ids=["toy", "run"])
def test_each_kernel_computes_its_formula_on_ragged_sizes(xs, options):
    """Of one step from the start, after which all that the kernels handed on still stands there."""
    of = [SAESpec(40, 1e-3, 0), SAESpec(70, 1e-3, 1), SAESpec(70, 1e-2, 2)]
    ensemble = build(of, tiles=SMALL, **options)
    start = {i: {k: t.double() for k, t in ensemble.dictionary(i).items()} for i in range(3)}
    engine, x = ensemble.engine, xs[0].cpu().double()
    ensemble.step_(xs[0])
    _, work, _ = engine.ready
    work, first = type(work)(*(t.cpu() for t in work)), 0
    for i, (m, sae) in enumerate((m, start[k]) for k, m in enumerate(of)):
        rows = slice(first, first + m.n_dict)
        first += m.n_dict
        codes = torch.relu((x - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]).T  # (n_dict, batch)
        fired = codes.bool().any(dim=1)
        blocks = torch.stack([b.bool().sum(dim=1) for b in codes.split(32, dim=1)], dim=1)
        assert torch.equal(work.count[rows], blocks.int())
        written = (blocks > 0).repeat_interleave(32, dim=1)[:, :BATCH]
        assert distance(torch.where(written, work.codes[rows], 0), codes) < 1e-6
        assert work.n_fired[i] == fired.sum()
        assert work.n_resting[i] == 0  # without moments nothing moves
        listed = work.feature[rows][: work.n_fired[i]]
        assert torch.equal(listed, fired.nonzero().flatten().int())
        r = codes.T @ sae["W_dec"] + sae["b_dec"] - x  # all below is in units of 2 / (BATCH * H)
        assert distance(work.r[i], r) < 1e-6
        through = sae["W_dec"] @ r.T  # (n_dict, batch)
        delta = torch.where(codes > 0, through + m.l1 * H / 2, 0)
        assert distance(work.delta[rows][fired], delta[fired]) < 1e-5
        assert distance(work.bias_grad[rows][fired], delta.sum(dim=1)[fired]) < 1e-5
        along = ((codes @ r) * sae["W_dec"]).sum(dim=1)
        assert distance(work.along[rows][fired], along[fired]) < 1e-5


def test_silent_steps_and_revivals_are_counted_as_by_the_dense_engine(xs):
    of = [SAESpec(40, 1e-3, 0), SAESpec(70, 1e-3, 1), SAESpec(70, 1e-2, 2)]
    options = RUN | {"schedule": Schedule(dead_steps=1)}
    some = xs[:6].clone()
    some[1:4] = some[1:4, :1]  # one sample many times: most features are silent
    found, expected = build(of, tiles=SMALL, **options), in_float64(of, **options)
    for x in some:
        train(found, x[None])
        train(expected, x[None])
        for ours, dense in zip(found.stacks, expected.stacks, strict=True):
            assert torch.equal(ours.silent, dense.silent)
        assert [found.n_revived(i) for i in range(3)] == [expected.n_revived(i) for i in range(3)]
    assert all(found.n_revived(i) > 5 for i in range(3))


SHAPES = [  # h, batch, b_dec and project, tiles
    (16, 16, False, SMALL),  # tiles fit
    (H, BATCH, False, SMALL),
    (72, BATCH, True, SMALL),  # rows in three tiles: lengths from parts
    (40, 72, True, {}),  # tiles as on a GPU, cut to what there is
]


@pytest.mark.parametrize(("h", "batch", "run", "tiles"), SHAPES)
def test_steps_move_parameters_as_dense_ones_in_float64(h, batch, run, tiles):
    """Features that fire and features that rest, in autoencoders of several tiles."""
    shape = shape_of(h, batch, b_dec=run, project=run, dot="ieee", **tiles)
    assert trial_error(shape, DEVICE) < 1e-4


@pytest.mark.skipif(not ON_GPU, reason="the interpreter multiplies bfloat16 as if it were integers")
@pytest.mark.parametrize(
    ("dot", "most"), [("tf32", 0.03), ("tf32x3", 1e-3), ("fp16", 0.03), ("bf16", 0.06)]
)
def test_steps_with_shorter_factors_move_them_less_exactly(dot, most):
    shape = shape_of(256, 256, b_dec=True, project=True, dot=dot)
    assert trial_error(shape, DEVICE) < most


def test_lists_hold_who_fired_from_the_front_and_who_rests_from_the_back():
    from sparse_coding.sae.engines.gpu_kernels import LAST, choose

    sizes, rng = [5, 90, 64], torch.Generator().manual_seed(0)
    engine = build([SAESpec(n, 1e-3, n, target_l0=3.0) for n in sizes], tiles=SMALL).engine
    sizes = engine.sizes  # by width
    shape = shape_of(H, BATCH, b_dec=False, project=False, dot="ieee", **SMALL)
    work = make_work(sizes, shape, DEVICE)
    count = torch.randint(0, 5, (sum(sizes), 2), generator=rng) * torch.randint(
        0, 2, (sum(sizes), 1), generator=rng
    )
    idle = torch.randint(DORMANT - 3, DORMANT + 3, (sum(sizes),), generator=rng)
    work.count.copy_(count)
    work.numbers.copy_(torch.ones(len(PLACE)))
    work.missed.fill_(-9)
    engine.rows.idle.copy_(idle)
    choose[(3,)](engine.rows, work, shape)
    fired, first = count.sum(dim=1) > 0, 0
    resting = ~fired & (idle < DORMANT)
    assert torch.equal(engine.rows.idle.cpu(), torch.where(fired, 0, idle + 1).int())
    last = torch.where(idle == DORMANT - 1, LAST.value, 0)
    missed = torch.where(fired, (idle - DORMANT).clamp(min=0), torch.where(resting, last, -9))
    assert torch.equal(work.missed.cpu(), missed.int())
    for i, n in enumerate(sizes):
        rows = slice(first, first + n)
        first += n
        at_front, at_back = (mask[rows].nonzero().flatten().tolist() for mask in (fired, resting))
        listed = work.feature[rows].tolist()
        assert listed[: len(at_front)] == at_front
        assert listed[n - len(at_back) :] == at_back[::-1]
        assert (work.n_fired[i], work.n_resting[i]) == (len(at_front), len(at_back))
        off = min(max(int(count[rows].sum()) / BATCH / 3.0, 0.5), 2)
        assert float(engine.rows.l1[i]) == pytest.approx(1e-3 * off**0.016, rel=1e-6)


# ---- whole steps


def test_parameters_equal_dense_training_in_float64_after_110_steps(xs):
    """With all that run.py has: b_dec, projection, a schedule, an l0 that is sought."""
    of = [SAESpec(30, 1e-3, 5, tied=True, target_l0=4.0)]
    schedule = Schedule(200, lr_warmup=20, l1_warmup=40, decay_start=90)
    expected, ours = (make(of, **RUN, schedule=schedule) for make in (in_float64, build))
    train(expected, xs[:110])
    train(ours, xs[:110])
    for name, tensor in expected.dictionary(0).items():
        assert distance(ours.dictionary(0)[name], tensor) < 1e-3, name
    assert ours.l1(0) == pytest.approx(expected.l1(0), rel=1e-3)
    assert ours.l1(0) != pytest.approx(1e-3, rel=0.05)


def test_the_toy_replication_equals_dense_training_in_float64_after_110_steps(xs):
    of = specs()[2:]
    expected, ours = (train(make(of), xs[:110]) for make in (in_float64, build))
    for name in PARAMETERS:
        assert distance(ours.dictionary(0)[name], expected.dictionary(0)[name]) < 1e-3, name
    assert ours.stacks[0].idle.max() > 10  # some features rest
    assert ours.l1(0) == pytest.approx(of[0].l1)


def firing(n: int, second_only: bool, seed: int) -> Tensor:
    """Batches on which of `two_features` both fire, or the second one only."""
    rng = torch.Generator().manual_seed(seed)
    first, second = torch.eye(8)[0], torch.eye(8)[1]
    amplitudes = torch.rand(n, 16, 1, generator=rng) + 0.5
    x = amplitudes * second
    if not second_only:
        x[:, :8] += amplitudes[:, :8] * first
    return x.to(DEVICE)


def two_features(**options) -> Ensemble:
    """Feature 0 codes dimension 0, feature 1 dimension 1; b_enc is small, so they fire by these."""
    ensemble = build([SAESpec(8, 1e-3, 0)], h=8, **options)
    stack = ensemble.stacks[0]
    stack.W_enc.copy_(torch.eye(8)).mul_(0.8)
    stack.W_dec.copy_(torch.eye(8))
    stack.b_enc.fill_(-0.2)
    return ensemble


def test_a_dormant_feature_that_fires_again_continues_as_under_dense_adam():
    dense, ours = two_features(dense=True, dtype=torch.float64), two_features()
    train(dense, firing(30, False, 0))
    train(dense, firing(DORMANT, True, 1))
    asleep = copied(dense)
    train(dense, firing(800, True, 2))
    ours.load_state_(copied(dense))
    rows = [f"0.{name}{end}" for name in PARAMETERS for end in ("", ".exp_avg", ".exp_avg_sq")]
    for name in PARAMETERS:  # as kernels leave it, which the next test holds
        ours.state()[f"0.{name}.exp_avg"][0, 0] = 0
        ours.state()[f"0.{name}.exp_avg_sq"][0, 0] = asleep[f"0.{name}.exp_avg_sq"][0, 0]
    ours.stacks[0].idle[0, 0] = DORMANT + 800
    for n in (1, 9):
        again = firing(n, False, 3 + n)
        train(dense, again)
        train(ours, again)
        for name in rows:
            assert distance(ours.state()[name][0, 0], dense.state()[name][0, 0]) < 1e-5, (n, name)
    assert ours.stacks[0].idle[0, 0] == 0


def test_a_feature_that_stops_firing_moves_on_until_it_is_dormant():
    dense = two_features(dense=True, dtype=torch.float64)
    train(dense, firing(30, False, 0))
    ours = two_features()
    ours.load_state_(copied(dense))
    for rest in (firing(5, True, 1), firing(2, True, 2)):
        train(dense, rest)
        train(ours, rest)
        for name in PARAMETERS:
            theirs = dense.state()[f"0.{name}"]
            assert distance(ours.state()[f"0.{name}"][0, 0], theirs[0, 0]) < 1e-5, name
    assert ours.stacks[0].idle[0, 0] == 7
    ours.stacks[0].idle[0, 0] = DORMANT - 1  # its last move is next
    states = [copied(ours)]
    for _ in range(2):
        train(ours, firing(1, True, 3))
        states.append(copied(ours))
    assert ours.stacks[0].idle[0, 0] == DORMANT + 1
    for name in PARAMETERS:
        expected = after_last_moves(states[0], f"0.{name}", n_steps=38)
        for end, values in zip(("", ".exp_avg", ".exp_avg_sq"), expected, strict=True):
            last, after = (state[f"0.{name}{end}"][0, 0] for state in states[1:])
            assert (last - values).norm() <= 1e-6 * values.norm(), (name, end)
            assert torch.equal(last, after), (name, end)


def after_last_moves(state: dict[str, Tensor], name: str, n_steps: int) -> tuple[Tensor, ...]:
    """Feature 0 of a parameter and its moments after all moves that are left, made in a step."""
    p, m, v = (state[f"{name}{end}"][0, 0].double() for end in ("", ".exp_avg", ".exp_avg_sq"))
    m, v = m * BETAS[0], v * BETAS[1]
    unbiased = (m / (1 - BETAS[0] ** n_steps)) / ((v / (1 - BETAS[1] ** n_steps)).sqrt() + 1e-8)
    moved = p - LR * unbiased * REMAINING
    return moved / moved.norm() if name.endswith("W_dec") else moved, 0 * m, v


def test_features_that_never_fired_are_never_touched():
    ensemble = two_features()
    before = copied(ensemble)
    train(ensemble, -torch.rand(3, 16, 8, device=DEVICE))  # nothing fires
    for name in PARAMETERS:
        assert torch.equal(ensemble.state()[f"0.{name}"], before[f"0.{name}"])
    assert (ensemble.stacks[0].idle == DORMANT + 3).all()


@pytest.mark.parametrize("options", [{}, RUN], ids=["toy", "run"])
def test_bits_depend_neither_on_steps_at_a_time_nor_on_neighbours_and_a_resume_has_them(
    xs, options
):
    of, x = [SAESpec(20, 1e-3, 7), *specs()[:2]], xs[:6]
    together = train(build(of, **options), x)
    resumed = train(build(of, **options), x[:4], 3)
    gone_on = build(of, **options)
    gone_on.load_state_(copied(resumed))
    assert same_bits(train(gone_on, x[4:]), together)
    single = train(build(of[2:], **options), x)
    for name, tensor in single.dictionary(0).items():
        assert torch.equal(tensor, together.dictionary(2)[name]), name


def test_each_engine_goes_on_from_the_others_state(xs):
    expected = train(in_float64(specs()), xs[:9])
    ensemble = train(build(specs()), xs[:3])
    for engine in (DenseEngine(ensemble.stacks), GpuEngine(ensemble.stacks, graph=False, **WHOLE)):
        ensemble.engine = engine
        train(ensemble, xs[ensemble.n_steps_done :][:3])
    assert ensemble.n_steps_done == 9
    assert int(ensemble.state()["0.W_dec.step"]) == 9
    for i in range(3):
        for name in PARAMETERS:
            assert distance(ensemble.dictionary(i)[name], expected.dictionary(i)[name]) < 1e-4


def test_an_autoencoder_that_diverges_does_so_visibly_and_alone_on_finite_data(xs):
    x = xs[:2].clone()
    x[0, 5, 3] = float("nan")
    assert train(build(specs()[:1]), x).dictionary(0)["W_enc"].isnan().any()
    ensemble = build(specs()[:2])
    ensemble.stacks[0].W_dec[0] = float("nan")
    train(ensemble, xs[:2])
    assert ensemble.dictionary(0)["W_enc"].isnan().any()
    assert not ensemble.dictionary(1)["W_enc"].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, which interprets
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_kernel_writes_beside_its_tensors(xs, bad):
    """Each of them between two strips of a value that must stay, then with NaN or inf too."""
    of, strip, whole = [SAESpec(n, 1e-2, n) for n in (5, 48, 70)], 300, []

    def fenced(values: tuple) -> tuple:
        found = []
        for tensor in values:
            whole.append(torch.full((tensor.numel() + 2 * strip,), 77, dtype=tensor.dtype))
            whole[-1] = whole[-1].to(DEVICE)
            found.append(whole[-1][strip : strip + tensor.numel()].view_as(tensor))
            found[-1].copy_(tensor)
        return type(values)(*found)

    engine = build(of, tiles=SMALL, **RUN).engine
    shape = shape_of(H, BATCH, b_dec=True, project=True, dot="ieee", **SMALL)
    rows, work = fenced(engine.rows), fenced(make_work(engine.sizes, shape, DEVICE))
    launch = launcher(rows, work, shape)
    work.numbers.copy_(torch.tensor([1e-3, 1.0, 1e-8, *[1.0] * (len(PLACE) - 3)]))
    work.x.copy_(xs[0])
    launch()
    work.x[5, 3] = bad
    launch()
    for tensor, name in zip(whole, [*rows._fields, *work._fields], strict=True):
        ends = torch.cat([tensor[:strip], tensor[-strip:]])
        assert (ends == 77).all(), name


# ---- around the kernels


def test_the_stacks_tensors_become_parts_of_one_matrix_and_keep_their_values():
    of = [SAESpec(n, 1e-3, n, target_l0=t) for n, t in ((70, 3.0), (40, 0.0), (70, 5.0))]
    ensemble = Ensemble(of, H, lr=LR, device=DEVICE, b_dec=torch.arange(float(H)))
    before, objects = copied(ensemble), list(ensemble.state().values())
    dictionaries = [ensemble.dictionary(i) for i in range(3)]
    rows = GpuEngine(ensemble.stacks).rows
    assert all(torch.equal(t, before[name]) for name, t in ensemble.state().items())
    assert all(a is b for a, b in zip(objects, ensemble.state().values(), strict=True))
    for i, expected in enumerate(dictionaries):
        assert all(torch.equal(t, expected[k]) for k, t in ensemble.dictionary(i).items())
    assert rows.W_enc.shape == (180, H)
    assert rows.target_l0.tolist() == [0.0, 3.0, 5.0]
    rows.W_dec_v.fill_(7)
    rows.idle.fill_(8)
    for stack in ensemble.stacks:
        assert (stack.adam.state[stack.W_dec]["exp_avg_sq"] == 7).all()
        assert (stack.idle == 8).all()


def test_the_full_grid_plans_for_less_than_16_gb_on_a_gpu():
    cells = make_grid(512, seeds=range(1), l1_exps=range(-8, 9), size_exps=range(-3, 6))
    planned = ensemble_bytes([c.kind for c in cells], 256, 256, torch.device("cuda"))
    state = 12 * 17 * 32_704 * 513
    assert state < planned < 1.6 * state < 16e9


def test_memory_plan_covers_what_the_engine_allocates(xs):
    of = [SAESpec(n, 1e-3, n) for n in (5, 48, 70, 70)]
    ensemble = build(of, **RUN)
    ensemble.engine.tiles = {}
    train(ensemble, xs[:1])
    work = sum(t.numel() * t.element_size() for t in ensemble.engine.ready[1])
    batches = 3 * 4 * ensemble.engine.steps_at_a_time * BATCH * H
    assert work + batches == gpu.engine_bytes([m.n_dict for m in of], H, BATCH)
    # where batches are small, most is held while parameters are being joined
    assert gpu.engine_bytes([4096], 1024, 1) == 4 * 4096 * 1024


def broken(kind: str):
    def trial(*arguments: object) -> float:
        if kind == "does not compile":
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(300_000, 232_448, "shared memory")
        if kind == "is of another Triton":
            from triton.errors import TritonError

            raise TritonError("at 16:14:\n    acc = matmul(W, x)\n          ^\n'str' has no type\n")
        return float("nan") if kind == "gives NaN" else 0.3

    return trial


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("does not compile", "shared memory"),
        ("is of another Triton", "'str' has no type"),
        ("gives NaN", "nan"),
        ("is off", "30%"),
    ],
)
def test_kernels_that_do_not_work_are_said_once_and_left(xs, capsys, monkeypatch, kind, said):
    monkeypatch.setattr(gpu, "trial_error", broken(kind))
    gpu.fault_of.cache_clear()
    expected = train(build(specs(), dense=True), xs[:3])
    ours = train(build(specs()), xs[:3], 1)
    gpu.fault_of.cache_clear()
    assert same_bits(ours, expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert "trains densely" in line
    assert said in line


def test_wrong_numbers_are_noticed(monkeypatch):
    """What the trial is for: here a kernel that forgets half of a GEMM."""
    real = gpu.make_work

    def make_work(sizes: list[int], shape: object, device: torch.device) -> object:
        work = real(sizes, shape, device)
        return work._replace(list_tiles=work.list_tiles[:-1])

    monkeypatch.setattr(gpu, "make_work", make_work)
    shape = shape_of(16, 16, b_dec=False, project=False, dot="ieee", **SMALL)
    assert not trial_error(shape, DEVICE) < gpu.TRIAL_ERROR


def test_without_triton_a_line_says_that_a_gpu_trains_densely():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sparse_coding.sae.ensemble import ensemble_bytes\n"
        "print([ensemble_bytes([('relu', 8)], 8, 4, torch.device('cuda')) for _ in range(2)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line, planned = done.stdout.splitlines()
    assert "Triton kernels can't be used" in line
    assert planned == str([12 * (2 * 64 + 8) + 8 * 8 + 8 + 4 * (8 * 2 * (4 + 8) + 4 * 8)] * 2)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("version", "usable"), [("3.2.0", False), ("3.3.1", False), ("3.4.0", True), ("3.10.0", True)]
)
def test_a_triton_that_is_too_old_is_left_and_named(monkeypatch, capsys, version, usable):
    """As torch 2.6 brings: its errors are of types that would end the run."""
    monkeypatch.setattr("triton.__version__", version)
    gpu.has_triton.cache_clear()
    assert gpu.has_triton() == usable
    gpu.has_triton.cache_clear()
    said = capsys.readouterr().out
    assert (f"trains densely, slower: Triton {version} is older than 3.4" in said) != usable


def test_a_graph_that_cannot_be_captured_is_said_and_steps_are_launched(xs, capsys):
    if ON_GPU:
        pytest.skip("it can be captured")
    expected, ours = (build(specs()[:1]) for _ in range(2))
    ours.engine.graph = True
    train(ours, xs[:2], 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "no CUDA graph" in line
    assert same_bits(ours, train(expected, xs[:2]))


COMPILE = """
import sys, tempfile, subprocess, re
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from sparse_coding.sae.engines import gpu, gpu_kernels

class Driver:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
driver.set_active(Driver())
h, batch, run, most_kb = (int(a) for a in sys.argv[2:])
shape = gpu.shape_of(h, batch, b_dec=bool(run), project=bool(run), dot="tf32")
work = gpu.make_work([64, 128], shape, torch.device("cpu"))
integers = dict.fromkeys(("idle", "silent", "dead_steps"), torch.int32) | {"n_revived": torch.int64}
rows = gpu_kernels.Rows(*(torch.zeros(16, dtype=integers.get(name, torch.float32))
                          for name in gpu_kernels.Rows._fields))
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
for name, (warps, stages) in gpu.LAUNCH.items():
    kernel = getattr(gpu_kernels, name)
    done = kernel.warmup(rows, work, shape, grid=(1,), num_warps=warps, num_stages=stages)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"]); file.flush()
        used = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    spilled = int(re.search(r"STACK:(\\d+)", used)[1])
    tensor_cores = bool(re.search(r"wgmma.mma_async|mma.sync", done.asm["ptx"]))
    fits = done.metadata.shared <= 1024 * most_kb
    print(name, spilled, int(tensor_cores), int(fits))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    ("capability", "h", "batch", "run", "most_kb"),
    [(90, 256, 256, 0, 227), (86, 3072, 1024, 1, 99)],
    ids=["H100, toy", "RTX 3090, run.py"],
)
@pytest.mark.parametrize(
    "version",
    ["ours", *(pytest.param(v, marks=pytest.mark.long) for v in ("3.4.0", "3.6.0"))],
)
def test_kernels_compile_for_gpus_without_spilled_registers(
    triton_of, version, capability, h, batch, run, most_kb
):
    """To machine code, on any machine: the compiler and the assembler come with Triton. 3.6 is what
    common images have, 3.4 the oldest that can compile these kernels."""
    path = [str(ROOT)] if version == "ours" else [triton_of(version), str(ROOT)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    numbers = [str(n) for n in (capability, h, batch, run, most_kb)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *numbers], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert used.keys() == gpu.LAUNCH.keys()
    for name, (spilled, tensor_cores, fits) in used.items():
        assert spilled == "0", name
        assert fits == "1", name
        multiplies = name in ("encode", "decode", "backward", "update_encoder", "update_decoder")
        assert tensor_cores == str(int(multiplies)), name


# ---- what only a GPU can show

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("options", [{}, RUN], ids=["toy", "run"])
def test_replayed_graphs_give_the_bits_of_launched_kernels_and_of_another_run(xs, options):
    launched = train(build(specs(), tiles={"list_f": 32}, **options), xs)
    for at_a_time in (50, 7):
        replayed = build(specs(), graph=True, tiles={"list_f": 32}, **options)
        assert same_bits(train(replayed, xs, at_a_time), launched)


@needs_gpu
def test_an_ensemble_on_a_gpu_takes_the_kernels_and_resumes_with_the_same_bits(xs):
    def fresh() -> Ensemble:
        return Ensemble(specs(), H, lr=LR, device=DEVICE, **RUN)

    straight, begun, resumed = fresh(), fresh(), fresh()
    assert isinstance(straight.engine, GpuEngine)
    assert gpu.fault_of(shape_of(H, BATCH, b_dec=True, project=True, dot="ieee"), xs.device) == ""
    train(straight, xs, 16)
    train(begun, xs[:64], 16)
    resumed.load_state_(copied(begun))
    assert same_bits(train(resumed, xs[64:], 16), straight)


@needs_gpu
@pytest.mark.parametrize("law", LAWS)
def test_toy_batches_are_drawn_without_waiting_for_the_gpu(law):
    data = dataclasses.replace(DATA, law=law)
    stream = ToyStream(data, make_world(data, 0), batch_seed=1, device=DEVICE)
    first = stream.batch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = stream.batch(0)
        stream.batch(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
