"""Steps of library GEMMs and kernels against dense ones in float64: on a GPU, else interpreted."""

import os
import subprocess
import sys

import pytest
import torch
from builders.scripts import ROOT
from torch import Tensor

from sparse_coding.config import UserError
from sparse_coding.sae import ensemble as ensembles
from sparse_coding.sae.engines import gpu
from sparse_coding.sae.engines.dense import DenseEngine
from sparse_coding.sae.engines.gpu_gemm import precision
from sparse_coding.sae.ensemble import Ensemble, _gpu_engines, ensemble_bytes
from sparse_coding.sae.families import FAMILIES, TRAINED
from sparse_coding.sae.spec import BETAS, DORMANT, REMAINING, SAESpec, Schedule
from sparse_coding.sae.stack import Scratch, Stack

pytest.importorskip("triton", reason="Triton is for Linux only")
from sparse_coding.sae.engines.gpu_gemm import engine as gemm
from sparse_coding.sae.engines.gpu_gemm.codes import spread
from sparse_coding.sae.engines.gpu_gemm.engine import Choices, GemmEngine, Tried, trial_error

pytestmark = pytest.mark.usefixtures("quick_interpreter", "no_cpu_kernels")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
H, BATCH, N = 12, 8, 20
STEPPED = [arch for arch in TRAINED if not FAMILIES[arch].refined]
MODES = pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])


@pytest.fixture
def no_cpu_kernels(monkeypatch) -> None:
    """They are not compiled for ensembles that get another engine at once."""
    monkeypatch.setattr(ensembles, "has_kernels", lambda: False)


@pytest.fixture
def untried(monkeypatch) -> None:
    """Kernels that are tested anyway are not tried first."""
    monkeypatch.setattr(gemm, "fault_of", lambda of, device: "")


def spec(arch: str, seed: int = 0, n: int = N, l0: float = 3.0) -> SAESpec:
    return SAESpec(n, 1e-3, seed, tied=True, target_l0=l0, arch=arch)


def batches(n: int, seed: int = 0) -> Tensor:
    """The second of one direction: most features are silent."""
    rng = torch.Generator().manual_seed(seed)
    xs = torch.randn(n, BATCH, H, generator=rng) * H**-0.5
    xs[1:2] = xs[1:2, :1] * torch.linspace(0.5, 1.5, BATCH)[:, None]
    return xs.to(DEVICE)


def build(specs: list[SAESpec], *, share: float | None = None, dtype=torch.float32) -> Ensemble:
    """With what run.py has; features die soon."""
    schedule = Schedule(100, l1_warmup=1, anneal=range(1, 20), dead_steps=2)
    options = dict(b_dec=torch.full((H,), 0.02), project=True, schedule=schedule)
    ensemble = Ensemble(specs, H, lr=1e-3, device=DEVICE, dtype=dtype, **options)
    stacks = ensemble.stacks
    dense = dtype == torch.float64
    ensemble.engine = (
        DenseEngine(stacks)
        if dense
        else GemmEngine(stacks, factor="float32", share=share, graph=False)
    )
    return ensemble


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def require_same_training(ours: Ensemble, reference: Ensemble, most: float = 2e-5) -> None:
    found = ours.state()
    for name, tensor in reference.state().items():
        if name.endswith("idle"):  # dense steps count none
            continue
        if tensor.dtype.is_floating_point:
            assert distance(found[name], tensor) < most, name
        else:
            assert torch.equal(found[name], tensor), name


# ---- steps


@MODES
@pytest.mark.parametrize("arch", ["relu", "batchtopk"])
def test_what_is_tried_first_on_a_machine_is_near_float64(monkeypatch, arch, share):
    monkeypatch.setattr(gemm, "SIZES", (40,))
    of = Tried(arch, "unit", H, BATCH, b_dec=True, project=True, factor="float32")
    assert trial_error(of, DEVICE, share=share) < 1e-4


def test_kernels_that_are_off_are_said_and_left(monkeypatch, capsys):
    monkeypatch.setattr(gemm, "trial_error", lambda of, device, share: 0.5 * share)
    gemm.fault_of.cache_clear()
    specs = [spec("relu")]
    ours, reference = build(specs, share=0.1), build(specs, share=0.1)
    reference.engine = DenseEngine(reference.stacks)
    for ensemble in (ours, reference):
        ensemble.steps_(batches(2))
    gemm.fault_of.cache_clear()
    assert torch.equal(ours.stacks[0].W_dec, reference.stacks[0].W_dec)
    assert "they are off by 50%" in capsys.readouterr().out


@pytest.mark.usefixtures("untried")
@MODES
@pytest.mark.parametrize("arch", STEPPED)
def test_steps_of_each_family_equal_dense_ones_in_float64(arch, share):
    """Gradients of every parameter, of features that fire, rest and are dead."""
    specs, xs = [spec(arch, 0), spec(arch, 1, l0=5.0)], batches(3)
    ours, reference = build(specs, share=share), build(specs, dtype=torch.float64)
    for ensemble in (ours, reference):
        ensemble.steps_(xs.to(ensemble.stacks[0].W_dec.dtype))
    require_same_training(ours, reference)
    assert all(choice.sparse.all() == bool(share) for choice in ours.engine.choices)
    if FAMILIES[arch].aux:
        assert (reference.stacks[0].silent >= 2).any()  # some are dead
        assert ours.engine.choices[0].near_dead.all()  # so short is the run


@pytest.mark.usefixtures("untried")
@MODES
@pytest.mark.parametrize("arch", ["topk_frozen", "batchtopk"])
def test_rows_that_stay_or_have_any_length(arch, share):
    rows = "unit" if arch.endswith("_frozen") else "raw"
    specs = [SAESpec(N, 1e-3, 0, tied=True, target_l0=3.0, arch=arch, rows=rows)]
    ours, reference = build(specs, share=share), build(specs, dtype=torch.float64)
    before = ours.stacks[0].W_dec.clone()
    for ensemble in (ours, reference):
        ensemble.steps_(batches(2).to(ensemble.stacks[0].W_dec.dtype))
    require_same_training(ours, reference)
    assert torch.equal(ours.stacks[0].W_dec, before) == arch.endswith("_frozen")


@pytest.mark.usefixtures("untried")
@MODES
@pytest.mark.parametrize("arch", ["relu", "jumprelu"])
def test_a_feature_that_rests_makes_its_last_moves_in_one_step_and_is_left_alone(arch, share):
    """Three features rest: their last step but one, their last one, none any more."""
    ensemble = build([spec(arch)], share=share)
    stack, names = ensemble.stacks[0], ("W_enc", "W_dec", "b_enc")
    ensemble.steps_(batches(3))
    stack.b_enc[0, :3] = -9.0  # these do not fire
    stack.idle[0, :3] = torch.tensor([DORMANT - 2, DORMANT - 1, DORMANT], dtype=torch.int32)
    before = {name: t.double() for name, t in ensemble.state().items()}
    ensemble.steps_(batches(1))
    if arch == "jumprelu" and not share:  # whose dense steps leave no feature out
        assert stack.idle[0, :3].tolist() == [0, 0, 0]
        return
    after = ensemble.state()
    assert stack.idle[0, :3].tolist() == [DORMANT - 1, DORMANT, DORMANT + 1]
    for name in names:
        p, m, v = (before[f"0.{name}{end}"][0, :3] for end in ("", ".exp_avg", ".exp_avg_sq"))
        move = 1e-3 * m * BETAS[0] / (1 - BETAS[0] ** 4)
        move /= (v * BETAS[1] / (1 - BETAS[1] ** 4)).sqrt() + 1e-8
        steps = torch.tensor([1, REMAINING, 0], dtype=torch.float64, device=DEVICE)
        p = p - move * steps.view(3, *[1] * (p.dim() - 1))
        p[:2] /= p[:2].norm(dim=1, keepdim=True) if name == "W_dec" else 1
        assert distance(after[f"0.{name}"][0, :3], p) < 1e-6, name
        left = after[f"0.{name}.exp_avg"][0, :3]
        assert torch.equal(left[1], 0 * left[1])
        assert torch.equal(left[2].double(), m[2])


@MODES
@pytest.mark.parametrize("factor", ["fp16", "bf16"])
def test_factors_of_16_bits_move_parameters_nearly_as_float64(monkeypatch, factor, share):
    monkeypatch.setattr(gemm, "SIZES", (20,))
    of = Tried("relu", "unit", H, BATCH, b_dec=True, project=True, factor=factor)
    assert 1e-5 < trial_error(of, DEVICE, share=share) < 0.04


@pytest.mark.usefixtures("untried")
def test_a_penalty_that_seeks_an_l0_makes_steps_sparse_after_a_look(monkeypatch):
    """And features may be dead only after one, or they are looked for in vain."""
    monkeypatch.setattr(gemm, "CHECK_EVERY", 2)
    specs, xs = [spec("relu", 0, l0=2.0), SAESpec(N, 0.0, 1)], batches(6)
    ours, reference = build(specs, share=0.3), build(specs, dtype=torch.float64)
    for ensemble in (ours, reference):
        ensemble.stacks[0].b_enc[0] -= 0.5  # the first codes little
        ensemble.steps_(xs.to(ensemble.stacks[0].W_dec.dtype))
    assert ours.engine.choices[0].sparse.tolist() == [True, False]
    assert [(s.first, s.end, s.sparse) for s in ours.engine.plan[0]] == [
        (0, 1, True),
        (1, 2, False),
    ]
    require_same_training(ours, reference)


@pytest.mark.usefixtures("untried")
def test_a_resume_between_two_looks_has_the_same_bits(monkeypatch):
    monkeypatch.setattr(gemm, "CHECK_EVERY", 2)
    monkeypatch.setattr(gemm, "LEAST_NEAR", 1)
    specs, xs = [spec("batchtopk", 0), spec("relu", 1)], batches(5)
    straight, begun, resumed = (build(specs, share=0.2) for _ in range(3))
    straight.steps_(xs)
    for x in xs[:3]:
        begun.step_(x)
    resumed.load_state_({name: tensor.clone() for name, tensor in begun.state().items()})
    resumed.steps_(xs[3:])
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name


@pytest.mark.usefixtures("untried")
def test_a_checkpoint_of_another_engine_is_taken():
    specs, xs = [spec("topk")], batches(4)
    reference = build(specs, dtype=torch.float64)
    reference.steps_(xs[:2].double())
    ours = build(specs, share=0.0)
    ours.load_state_({name: t.float() if t.is_floating_point() else t for name, t in
                      reference.state().items()})  # fmt: skip
    for ensemble in (ours, reference):
        ensemble.steps_(xs[2:].to(ensemble.stacks[0].W_dec.dtype))
    require_same_training(ours, reference)


@pytest.mark.usefixtures("untried")
def test_what_is_no_number_is_seen_and_stays_with_its_autoencoder():
    ensemble = build([spec("topk", 0), spec("topk", 1)], share=1.0)
    ensemble.stacks[0].W_dec[0] = float("nan")
    ensemble.steps_(batches(2))
    assert ensemble.dictionary(0)["W_enc"].isnan().any()
    assert not ensemble.dictionary(1)["W_enc"].isnan().any()


# ---- selection


def chosen(arch: str, pre: Tensor, k: float, hint: float = 0.0) -> tuple[Tensor, GemmEngine]:
    """Codes that kernels select of pre-activations (batch, n_dict), whose biases are 0."""
    batch, n = pre.shape
    stack = Stack([spec(arch, n=n, l0=k)], H, lr=0.0, scratch=Scratch(DEVICE, torch.float32))
    engine = GemmEngine([stack], factor="float32", share=0.0, graph=False)
    engine.choices[0].hint.fill_(hint)
    engine._begin(batch, first=True)
    (step,) = engine.steps
    step.work.pre.copy_(pre)
    step._select(batch)
    step._launch(spread, -(-n // step.shape.tile_f))
    return step.work.codes[0].clone(), engine


CASES = {
    "all differ": lambda rng: torch.randn(BATCH, 90, generator=rng),
    "many are equal": lambda rng: torch.randint(-2, 4, (BATCH, 90), generator=rng).float(),
    "few are above 0": lambda rng: torch.randn(BATCH, 90, generator=rng) - 2.5,
    "none is": lambda rng: -torch.rand(BATCH, 90, generator=rng),
    "all are the same": lambda rng: torch.ones(BATCH, 90),
    "of all sizes": lambda rng: 10 ** (20 * torch.rand(BATCH, 90, generator=rng) - 15),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("arch", "k", "hint"), [("topk", 4.0, 0.0), ("batchtopk", 3.7, 0.0),
                                                 ("batchtopk", 3.7, 2.5)])  # fmt: skip
def test_the_k_largest_are_selected_as_by_the_reference(arch, k, hint, name):
    """A hint that is too high costs time alone."""
    pre = CASES[name](torch.Generator().manual_seed(1)).to(DEVICE)
    found, engine = chosen(arch, pre, k, hint)
    expected = engine.stacks[0].select_(pre.T[None].contiguous())[0].T
    assert torch.equal(found, expected)
    n_expected = (expected > 0).sum(dim=1).int()
    work = engine.steps[0].work
    assert torch.equal(work.n_of_sample[0], n_expected)
    for b, n in enumerate(n_expected.tolist()):
        listed = (expected[b] > 0).nonzero().flatten().int()
        assert torch.equal(work.by_sample[0, b, :n], listed)
    assert torch.equal(work.count[0], (expected > 0).sum(dim=0).int())


# ---- around them


def test_features_that_may_be_dead_before_the_next_look_are_found():
    stack = Stack([spec("topk", i, n=300) for i in range(2)], H, lr=0.0, dead_steps=1000,
                  scratch=Scratch(DEVICE, torch.float32))  # fmt: skip
    stack.silent[0, 7], stack.silent[0, 9], stack.silent[1, 5] = 2000, 937, 936
    choice = Choices(stack, torch.float32)
    near = choice.candidates()
    assert near.shape == (2, 64)
    assert {7, 9} <= set(near[0].tolist())
    assert choice.near_dead.sum().item() == 2  # 936 + 63 steps are no 1000
    for row in near:
        assert len(set(row.tolist())) == 64
        assert row.tolist() == sorted(row.tolist())
    stack.silent.zero_()
    choice.look(share=0.0, batch=1)
    assert choice.candidates().shape == (2, 0)


def test_stacks_get_the_engine_of_their_kind(monkeypatch):
    scratch = Scratch(DEVICE, torch.float32)

    def stack(arch: str, h: int, rows: str = "unit") -> Stack:
        return Stack([SAESpec(8, 0.0, 0, target_l0=2.0, arch=arch, rows=rows)], h, lr=0.0,
                     scratch=scratch)  # fmt: skip

    kinds = {
        ("relu", 16): gpu.GpuEngine,
        ("relu", 1024): GemmEngine,
        ("topk", 16): GemmEngine,
        ("relu_frozen", 16): GemmEngine,
        ("matryoshka_refined", 16): DenseEngine,
    }
    for (arch, h), kind in kinds.items():
        assert [type(engine) for engine in _gpu_engines([stack(arch, h)])] == [kind]
    assert [type(e) for e in _gpu_engines([stack("topk", 16, "free")])] == [DenseEngine]
    assert [type(e) for e in _gpu_engines([stack("batchtopk", 16, "raw")])] == [GemmEngine]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert [type(e) for e in _gpu_engines([stack("relu", 16)])] == [GemmEngine]


@pytest.mark.usefixtures("untried")
@MODES
def test_memory_plan_covers_what_the_engine_allocates(share):
    specs = [spec("matryoshka", i, n=40) for i in range(3)] + [spec("jumprelu")]
    ensemble = build(specs, share=share)
    ensemble.steps_(batches(1))
    held = sum(t.numel() * t.element_size() for t in ensemble.engine.buffers.flat.values())
    small = 3 * 2 * 8 * 16 * 32 * 4 + 40_000  # of searches and features, whatever the sizes
    kinds = [(stack.family, stack.n_dict, len(stack.specs)) for stack in ensemble.stacks]
    assert held < gemm.engine_bytes(kinds, H, BATCH) + small
    planned = ensemble_bytes([("topk", 24_576)] * 4, 768, 2048, torch.device("cuda"))
    state = 4 * 12 * 2 * 24_576 * 768
    assert state < planned < 5 * state


def test_a_gpu_without_tf32_takes_fp16_and_says_so(capsys):
    try:
        assert precision.use("auto", (8, 0)) == precision.in_use() == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
        assert capsys.readouterr().out == ""
        assert precision.use("auto", (7, 5)) == precision.in_use() == "fp16"
        assert torch.get_float32_matmul_precision() == "highest"
        assert "fp16" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"bf16: a GPU of compute capability 7\.5 lacks it"):
            precision.use("bf16", (7, 5))
    finally:
        precision.use("float32", (8, 0))


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from sparse_coding.sae.engines.gpu_gemm import engine, step
from sparse_coding.sae.engines.gpu_gemm.parts import Work
from sparse_coding.sae.spec import SAESpec
from sparse_coding.sae.stack import Scratch, Stack

class Driver:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
driver.set_active(Driver())
h, batch, arch, sparse, factor = int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
scratch, factor = Scratch(torch.device("cpu"), torch.float32), getattr(torch, factor)
stack = Stack([SAESpec(64, 1e-3, 0, arch=arch, target_l0=4.0)], h, lr=1e-3, scratch=scratch,
              b_dec=torch.zeros(h), project=True)
of = step.Slice(0, 0, 1, sparse == "sparse", 16 if stack.family.aux else 0)
shape = step.shape_of(stack, batch, of, factor)
shapes = step.work_shapes(shape, 64, of, factor)
work = Work(torch.zeros(batch, h), torch.zeros(10),
            **{name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shapes.items()})
stepped = step.Step(stack, engine.Choices(stack, factor).rows(0, 1), work, shape, torch.zeros(1, 0))
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

def compile_(kernel, n, **options):
    done = kernel.warmup(stepped.rows, work, 64, shape, grid=(1,), num_warps=step.WARPS, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"]); file.flush()
        used = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    print(kernel.__name__, re.search(r"STACK:(\\d+)", used)[1], done.metadata.shared)

stepped._launch = compile_  # all that a step launches
stepped._auxiliary = lambda: None
stepped()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's compiler is for Linux")
@pytest.mark.parametrize(
    ("capability", "h", "batch", "arch", "mode", "factor"),
    [
        (90, 768, 2048, "topk", "sparse", "bfloat16"),
        (90, 1536, 2048, "relu", "dense", "bfloat16"),
        (75, 512, 2048, "jumprelu", "sparse", "float16"),
        pytest.param(75, 256, 2048, "batchtopk", "dense", "float16", marks=pytest.mark.long),
        pytest.param(86, 768, 2048, "jumprelu_tanh", "dense", "float32", marks=pytest.mark.long),
        pytest.param(90, 4096, 2048, "matryoshka", "sparse", "bfloat16", marks=pytest.mark.long),
        pytest.param(100, 768, 2048, "p_anneal", "sparse", "float32", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(
    "version",
    ["ours", *(pytest.param(v, marks=pytest.mark.long) for v in ("3.4.0", "3.6.0"))],
)
def test_kernels_compile_without_spilled_registers(
    triton_of, version, capability, h, batch, arch, mode, factor
):
    path = [str(ROOT)] if version == "ours" else [triton_of(version), str(ROOT)]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    arguments = [str(a) for a in (capability, h, batch, arch, mode, factor)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert {"spread", "adapt", "residual", "slopes", "update", "update_b_dec"} <= used.keys()
    assert ("decode" in used) == (mode == "sparse")
    for name, (spilled, shared) in used.items():
        assert int(spilled) <= 8, name  # bytes of stack; by some versions a kernel has one number
        assert int(shared) <= 64 * 1024, name  # of a T4
