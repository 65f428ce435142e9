"""Compiled kernels against the dense engine in float64, and against themselves in other threads."""

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.scripts import ROOT

from sparse_coding.sae.engines import cpu, cpu_compile
from sparse_coding.sae.engines.cpu import CpuEngine, kernels_compile
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import BETAS, DORMANT, REMAINING, SAESpec, Schedule
from sparse_coding.sae.stack import PARAMETERS
from sparse_coding.toy.data import ToyData, ToyStream, make_world

CPU = torch.device("cpu")
H, LR = 64, 1e-3
DATA = ToyData("post", H, 128, n_active=3, feature_prob_decay=0.97, noise_std=0.0, batch_size=128)
OPTIONS = {  # of the toy replication, and of run.py
    "toy": {},
    "run": dict(b_dec=torch.full((H,), 0.02), project=True,
                schedule=Schedule(500, lr_warmup=20, l1_warmup=40, decay_start=400)),
}  # fmt: skip
ALWAYS, NEVER = 1.0, -1.0  # densities up to which steps are sparse

pytestmark = pytest.mark.skipif(
    not cpu_compile.has_kernels(), reason="needs numba and a torch built with MKL"
)


@pytest.fixture(scope="module")
def xs() -> torch.Tensor:
    stream = ToyStream(DATA, make_world(DATA, 0), batch_seed=1, device=CPU)
    return torch.stack([stream.batch(step) for step in range(500)])


def specs(n_dict: int = 256) -> list[SAESpec]:
    alphas = (0.03, 0.3, 3.0, 0.1, 1.0)
    return [SAESpec(n_dict, alpha / n_dict, seed) for seed, alpha in enumerate(alphas)]


def build(
    of: list[SAESpec], *, density: float | None = None, n_threads: int = 2, dtype=torch.float32,
    h: int = H, **options,
) -> Ensemble:  # fmt: skip
    """density: None for the dense engine of torch."""
    ensemble = Ensemble(of, h, lr=LR, device=CPU, dtype=dtype, **options)
    ensemble.engine = (
        DenseEngine(ensemble.stacks)
        if density is None
        else CpuEngine(ensemble.stacks, n_threads=n_threads, density=density)
    )
    return ensemble


def train(ensemble: Ensemble, xs: torch.Tensor, at_a_time: int = 50) -> Ensemble:
    for some in xs.to(ensemble.stacks[0].W_enc.dtype).split(at_a_time):
        ensemble.steps_(some)
    return ensemble


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def same_bits(a: Ensemble, b: Ensemble) -> bool:
    others = b.state()
    return all(torch.equal(tensor, others[name]) for name, tensor in a.state().items())


@pytest.fixture(scope="module", params=OPTIONS)
def options(request) -> dict:
    return OPTIONS[request.param]


@pytest.fixture(scope="module")
def in_float64(xs, options) -> dict[int, Ensemble]:
    """Steps -> dense in float64."""
    ensemble, found = build(specs(), dtype=torch.float64, **options), {}
    for steps in (100, 500):
        train(ensemble, xs[ensemble.n_steps_done : steps])
        found[steps] = build(specs(), dtype=torch.float64, **options)
        found[steps].load_state_(ensemble.state())
    return found


@pytest.mark.parametrize("density", [None, ALWAYS, NEVER, cpu.DENSITY])
def test_parameters_equal_dense_training_in_float64_after_500_steps(
    xs, options, in_float64, density
):
    """Where a pre-activation is 0 but for rounding, a code may be on in one run and off in the
    other. From then on they differ by some 1e-3, dense float32 (density None) as well: so after 500
    steps only the median over autoencoders can be held to 1e-3.
    """
    compiled = build(specs(), density=density, **options)
    for steps, most, middle in ((100, 2e-3, 1e-4), (500, 2e-2, 1e-3)):
        train(compiled, xs[compiled.n_steps_done : steps])
        distances = {
            (i, name): distance(compiled.dictionary(i)[name], expected)
            for i in range(len(compiled.specs))
            for name, expected in in_float64[steps].dictionary(i).items()
            if expected.any()
        }
        assert max(distances.values()) < most, (steps, distances)
        assert statistics.median(distances.values()) < middle, (steps, distances)


@pytest.mark.parametrize("density", [ALWAYS, NEVER])
def test_sizes_that_fit_no_tile_block_or_vector_equal_dense_training_too(density):
    n_dict, h, batch = 131, 7, 75
    x = torch.rand(40, batch, h, generator=torch.Generator().manual_seed(0)) - 0.4
    of = [SAESpec(n_dict, 1e-3, 0), SAESpec(5, 1e-3, 1)]
    options = dict(b_dec=x.mean(dim=(0, 1)), project=True, h=h)
    compiled = train(build(of, density=density, **options), x)
    expected = train(build(of, dtype=torch.float64, **options), x)
    for i in range(2):
        for name, tensor in expected.dictionary(i).items():
            assert distance(compiled.dictionary(i)[name], tensor) < 1e-5, (i, name)


def firing_again(dormant_steps: int) -> tuple[torch.Tensor, int]:
    """Batches on which feature 0 of `two_features` fires for 30 steps, then rests, then fires for
    20; and the step from which it fires again."""
    rng = torch.Generator().manual_seed(0)
    first, second = torch.eye(8)[0], torch.eye(8)[1]
    amplitudes = torch.rand(30 + dormant_steps + 20, 16, 1, generator=rng) + 0.5
    x = amplitudes * second
    for start, stop in ((0, 30), (30 + dormant_steps, len(x))):
        x[start:stop, :8] += amplitudes[start:stop, :8] * first
    return x, 30 + dormant_steps


def two_features(arch: str = "relu", **options) -> Ensemble:
    """Feature 0 codes dimension 0, feature 1 dimension 1; b_enc is small, so they fire by these."""
    ensemble = build([SAESpec(8, 1e-3, 0, target_l0=2, arch=arch)], h=8, **options)
    stack = ensemble.stacks[0]
    if stack.threshold is not None:
        stack.threshold.fill_(0.3)
    stack.W_enc.copy_(torch.eye(8)).mul_(0.8)
    stack.W_dec.copy_(torch.eye(8))
    stack.b_enc.fill_(-0.2)
    return ensemble


@pytest.mark.parametrize("arch", ["relu", "batchtopk", "jumprelu"])
def test_a_dormant_feature_that_fires_again_continues_as_under_dense_adam(arch):
    x, again = firing_again(dormant_steps=1000)
    dense, sparse = two_features(arch, dtype=torch.float64), two_features(arch, density=ALWAYS)
    asleep = {}
    for end in (30 + DORMANT, again, again + 1, again + 20):
        for ensemble in (dense, sparse):
            train(ensemble, x[ensemble.n_steps_done : end])
            row = ensemble.stacks[0].W_enc[0, 0].clone()
            if end == 30 + DORMANT:
                asleep[id(ensemble)] = row
            elif end == again:
                moved = (row - asleep[id(ensemble)]).abs().max()
                # dense Adam goes on to where sparse training has taken it before it left it alone
                assert (1e-5 < moved < 0.04 * LR) if ensemble is dense else moved == 0
        if end > again:
            for name in sparse.stacks[0].parameters:
                ours, theirs = (e.stacks[0].parameters[name] for e in (sparse, dense))
                # so early the correction of v's bias still grows: one move stands for unequal ones
                assert distance(ours[0, 0], theirs[0, 0]) < 1e-5, (end, name)
                for moment in ("exp_avg", "exp_avg_sq"):
                    ours, theirs = (
                        e.stacks[0].adam.state[e.stacks[0].parameters[name]][moment][0, 0]
                        for e in (sparse, dense)
                    )
                    least = torch.finfo(torch.float32).tiny  # float32 has nothing less
                    near = distance(ours, theirs) < 5e-5 or theirs.abs().max() < least
                    assert near, (end, name, moment)
    assert sparse.stacks[0].idle[0, 0] == 0


def test_it_would_not_if_its_moments_had_not_decayed(monkeypatch):
    """The test above can fail: 800 steps more or less of decay change what Adam does next."""
    x, again = firing_again(dormant_steps=1000)
    dense, forgetful = two_features(dtype=torch.float64), two_features(density=ALWAYS)
    for ensemble in (dense, forgetful):
        train(ensemble, x[:again])
    forgetful.stacks[0].idle.clamp_(max=DORMANT)
    for ensemble in (dense, forgetful):
        train(ensemble, x[again:])
    assert distance(forgetful.stacks[0].W_enc[0, 0], dense.stacks[0].W_enc[0, 0]) > 1e-4


def test_moves_left_at_dormancy_are_small_and_made_in_one():
    """The bound of cpu_adam.py, for one gradient after many steps without."""
    m, v, moves = 1 - BETAS[0], 1 - BETAS[1], []
    for _ in range(5000):
        m, v = m * BETAS[0], v * BETAS[1]
        moves.append(m / v**0.5)
    left = sum(moves[DORMANT:])
    assert left < 0.04
    assert left < 0.0013 * sum(moves)
    assert REMAINING * moves[DORMANT] == pytest.approx(left, rel=1e-9)


def test_features_that_never_fired_are_never_touched():
    x = -torch.rand(30, 16, 8)  # nothing fires
    ensemble = two_features(density=ALWAYS)
    before = {name: t.clone() for name, t in ensemble.state().items()}
    train(ensemble, x)
    for name in PARAMETERS:
        assert torch.equal(ensemble.state()[f"0.{name}"], before[f"0.{name}"])


@pytest.mark.parametrize("density", [ALWAYS, NEVER])
def test_bits_depend_neither_on_threads_nor_on_steps_at_a_time_nor_on_neighbours(
    xs, options, density
):
    """16 threads share each of these autoencoders of 8 tiles, one thread takes them alone."""
    of, x = specs(1024)[:2], xs[:12]
    alone = train(build(of, density=density, n_threads=1, **options), x)
    for n_threads, at_a_time in ((2, 5), (3, 1), (16, 12)):
        other = build(of, density=density, n_threads=n_threads, **options)
        assert same_bits(train(other, x, at_a_time), alone), n_threads
    single = train(build(of[1:], density=density, n_threads=16, **options), x)
    for name, tensor in single.dictionary(0).items():
        assert torch.equal(tensor, alone.dictionary(1)[name]), name


def test_a_resume_has_the_same_bits_across_the_switch_and_with_dormant_features(xs):
    def share_of_codes(ensemble: Ensemble, step: int) -> float:
        return float((ensemble.stacks[0].forward(xs[step])[0] > 0).float().mean())

    of, options = [SAESpec(256, 30 / 256, 0)], OPTIONS["run"]
    straight = build(of, density=0.1, **options)
    assert share_of_codes(straight, 0) > 0.2  # dense at first
    checkpoints = {}
    for step in range(0, 500, 10):
        checkpoints[step] = {name: t.clone() for name, t in straight.state().items()}
        train(straight, xs[step : step + 10], 10)
    assert share_of_codes(straight, 499) < 0.05  # sparse in the end
    for step in (30, 60, 100, 490):
        resumed = build(of, density=0.1, **options)
        resumed.load_state_(checkpoints[step])
        assert same_bits(train(resumed, xs[step:]), straight), step
    assert checkpoints[490]["0.idle"].max() > DORMANT


@pytest.mark.parametrize(("first", "second"), [(ALWAYS, None), (None, ALWAYS), (NEVER, None)])
@pytest.mark.parametrize("arch", ["relu", "jumprelu"])
def test_each_engine_goes_on_from_the_others_checkpoint_with_dormant_features(arch, first, second):
    x, again = firing_again(dormant_steps=1000)
    expected = train(two_features(arch, dtype=torch.float64), x)
    begun = train(two_features(arch, density=first), x[:again])
    gone_on = two_features(arch, density=second)
    gone_on.load_state_({name: t.clone() for name, t in begun.state().items()})
    train(gone_on, x[again:])
    for name in gone_on.stacks[0].parameters:
        assert distance(gone_on.dictionary(0)[name], expected.dictionary(0)[name]) < 1e-5


def test_a_checkpoint_from_before_there_were_kernels_is_read(xs):
    begun = train(build(specs()), xs[:50])
    old = {name: t.clone() for name, t in begun.state().items() if not name.endswith(".idle")}
    gone_on = build(specs(), density=0.35)
    gone_on.load_state_(old)
    train(gone_on, xs[50:100])
    train(begun, xs[50:100])
    assert distance(gone_on.dictionary(0)["W_dec"], begun.dictionary(0)["W_dec"]) < 1e-4


def test_the_controller_of_l0_is_that_of_the_dense_engine(xs):
    of = [SAESpec(64, 1e-3, 3, tied=True, target_l0=target) for target in (4.0, 0.0)]
    options = dict(b_dec=torch.zeros(H), schedule=Schedule(n_steps=500, l1_warmup=20))
    dense, compiled = (train(build(of, density=d, **options), xs[:200]) for d in (None, 0.35))
    assert compiled.l1(0) == pytest.approx(dense.l1(0), rel=1e-3)
    assert compiled.l1(0) != pytest.approx(1e-3, rel=0.1)
    assert compiled.l1(1) == dense.l1(1)


@pytest.mark.parametrize("density", [None, ALWAYS, NEVER])
def test_an_autoencoder_that_diverges_does_so_visibly(xs, density):
    ensemble = build(specs()[:1], density=density)
    x = xs[:3].clone()
    x[1, 5, 3] = float("nan")
    train(ensemble, x)
    assert ensemble.dictionary(0)["W_enc"].isnan().any()


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_numba_training_is_dense_and_one_line_says_so(missing, tmp_path: Path):
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "import torch; from sparse_coding.sae.ensemble import Ensemble, ensemble_bytes\n"
        "from sparse_coding.sae.spec import SAESpec\n"
        "cpu = torch.device('cpu')\n"
        "for _ in range(2):\n"
        "    ensemble = Ensemble([SAESpec(8, 1e-3, 0)], 8, lr=1e-3, device=cpu)\n"
        "    ensemble.step_(torch.ones(4, 8)); ensemble_bytes([('relu', 8)], 8, 4, cpu)\n"
        "print(type(ensemble.engine).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line, engine = done.stdout.splitlines()
    assert "no compiled kernels" in line
    assert missing in line
    assert engine == "DenseEngine"
    assert done.stderr == ""


def test_kernels_that_do_not_compile_are_said_and_left(capsys, monkeypatch):
    from numba.core.errors import TypingError

    from sparse_coding.sae.engines import cpu_kernels

    def steps(*arguments: object) -> None:
        raise TypingError("no such type\nin detail")

    monkeypatch.setattr(cpu_kernels, "steps", steps)
    monkeypatch.setattr(cpu_compile, "missing_in", lambda smallest: None)
    monkeypatch.setattr("sparse_coding.sae.ensemble.kernels_compile", kernels_compile.__wrapped__)
    ensemble = Ensemble(specs(), H, lr=LR, device=CPU)
    assert isinstance(ensemble.engine, DenseEngine)
    (line,) = capsys.readouterr().out.splitlines()
    assert "several times slower" in line
    assert "no such type" in line


def test_compiling_is_said_if_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(cpu_compile, "SAID_AFTER", 0.0)
    with cpu_compile._said_if_slow("compiling"):
        while not (said := capsys.readouterr().out):
            pass
    assert said == "compiling\n"
    monkeypatch.setattr(cpu_compile, "SAID_AFTER", 30.0)
    with cpu_compile._said_if_slow("compiling"):
        pass
    assert capsys.readouterr().out == ""


def test_kernels_are_kept_by_their_source_and_the_constants_compiled_into_them(tmp_path):
    """numba itself sees no change in a file that the kernels' file imports."""
    names = set()
    for name, edit in {"as it is": ("", ""), "edited": ("DORMANT = 64", "DORMANT = 32")}.items():
        shutil.copytree(ROOT / "sparse_coding", tmp_path / name / "sparse_coding")
        spec = tmp_path / name / "sparse_coding" / "sae" / "spec.py"
        assert edit[0] in spec.read_text()
        spec.write_text(spec.read_text().replace(*edit))
        where = "sparse_coding.sae.engines.cpu_kernels"
        code = f"from {where} import steps; print(steps._cache.cache_path)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path / name, stdout=subprocess.PIPE, text=True)
        names |= {part for part in Path(done.stdout).parts if part.startswith("kernels-")}
    assert len(names) == 2


BITS = """
import hashlib, torch
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.spec import SAESpec
ensemble = Ensemble([SAESpec(64, 1e-3, 0)], 32, lr=1e-3, device=torch.device("cpu"))
ensemble.steps_(torch.randn(100, 64, 32, generator=torch.Generator().manual_seed(0)))
values = torch.cat([p.flatten() for p in ensemble.stacks[0].parameters.values()])
print(hashlib.sha256(values.detach().numpy().tobytes()).hexdigest())
"""


@pytest.mark.long
def test_a_run_that_compiles_has_the_bits_of_those_that_load(tmp_path):
    """Two at once, of which one compiles, and one after them."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BITS]
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    first = [subprocess.Popen(command, **options) for _ in range(2)]
    lines = [process.communicate(timeout=300)[0].splitlines() for process in first]
    lines.append(subprocess.run(command, **options, check=True).stdout.splitlines())
    assert all("compiling" in said for said, _ in lines[:2])
    assert len({bits for *_, bits in lines}) == 1
    assert len(lines[2]) == 1  # nothing to compile
    assert len(list(tmp_path.rglob("cpu_kernels.steps-*.nbc"))) == 1
