"""benchmarks/gpu_families.py and measuring.py without a GPU: arithmetic, limits, a tiny run."""

import math
import re
import subprocess
import sys
import time
from types import ModuleType

import pytest
import torch
from builders.scripts import ROOT

from sparse_coding.sweep.metrics import reconstruction

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script(benchmark_script) -> ModuleType:
    return benchmark_script("gpu_families")


def shape(script, n_dicts=(40, 80), width=24):
    return script.Shape("made", width, 100, n_dicts, (0.005,), ("topk",))


def test_what_a_step_needs_where_few_codes_are_gathered(script):
    """120 features of width 24, a batch of 100: 0.005 of the codes are 60."""
    work = script.least_work(shape(script), (40, 80), 0.005)
    weights, x, codes = (4 + 2 * 6 * 4) * 24 * 120, 4 * 100 * 24, 2 * 8 * 60
    assert work.n_bytes == pytest.approx(weights + x + codes)
    assert work.flop == pytest.approx(2 * 24 * (100 * 120 + 4 * 60))


@pytest.mark.parametrize(("l0", "share"), [(0.02, 0.02), (0.0, 0.5)])
def test_above_a_hundredth_of_the_codes_five_dense_gemms_are_needed(script, l0, share):
    work = script.least_work(shape(script), (40, 80), l0)
    assert work.flop == pytest.approx(10 * 100 * 24 * 120)
    assert work.n_bytes == pytest.approx(52 * 24 * 120 + 9600 + 16 * share * 12_000)


def test_the_grid_of_run_takes_the_flop_that_were_counted_by_hand(script):
    (grid,) = (s for s in script.SHAPES if s.name == "smollm2")
    work = script.least_work(grid, grid.n_dicts, grid.l0s[0])
    assert work.flop == pytest.approx(2.37e12, rel=0.002)  # LOG.md, 2026-11-28


def test_shares_are_those_of_the_limits_in_the_time_taken(script):
    limits = script.Limits(bandwidth=1000, gemm=50)
    assert script.Work(500, 100).shares(limits, 4.0) == (0.125, 0.5)


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "topk"])
def test_autoencoders_have_the_l0_that_is_asked_for_and_keep_it(script, arch):
    xs = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0))
    ensemble = script.still_ensemble(script.specs_of([(arch, 128, 3.0), (arch, 128, 7.0)]), xs[0])
    before = reconstruction(ensemble, [xs[0]])["l0"]
    ensemble.steps_(xs)
    assert before == pytest.approx([3, 7], abs=0.1)
    assert reconstruction(ensemble, [xs[0]])["l0"] == pytest.approx(before, abs=0.1)


def bench(script, said: list[str], **options):
    cfg = script.Config(device="cpu", seconds=0.0, **options)
    return script.Bench(cfg, CPU, script.Limits(1e9, 1e9), said.append)


def test_what_takes_too_long_or_fails_is_a_line_and_what_is_wrong_with_ours_is_raised(script):
    def raising(error: Exception):
        def measure() -> float:
            raise error

        return measure

    said: list[str] = []
    one = bench(script, said, limit_s=0.05)
    assert one.guarded("fine", lambda: 2.0, ours=True) == 2.0
    assert one.guarded("slow", lambda: time.sleep(5), ours=True) == math.inf
    assert one.guarded("full", raising(RuntimeError("out of memory\nmore")), ours=True) == math.inf
    assert one.guarded("theirs", raising(TypeError("k")), ours=False) == math.inf
    assert one.failed == ["slow", "full"]
    assert said == [
        "slow  FAILED: OutOfTime: more than 0.05 s",
        "full  FAILED: RuntimeError: out of memory",
        "theirs  FAILED: TypeError: k",
    ]
    with pytest.raises(TypeError):
        one.guarded("ours", raising(TypeError("k")), ours=True)
    time.sleep(0.06)  # no alarm is left


def test_the_fastest_way_of_the_fastest_other_is_what_ours_is_compared_with(script, monkeypatch):
    """Two made ones that say what a step takes, and one way of the first that fails."""
    takes: list[float] = []

    def made(seconds: float, fails: bool):
        def make(width, n_dict, k, n_dead, device, *, compiled):
            assert (width, n_dict, k, n_dead, device) == (24, 40, 1, 0, CPU)
            if compiled and fails:
                raise AttributeError("no compiler")
            return lambda i, x: takes.append(seconds / (1 + torch.is_autocast_enabled("cpu")))

        return make

    def seconds_per_call(step, *_: object) -> float:
        step()
        return takes[-1]

    others = {"json": {"topk": made(0.04, True)}, "csv": {"topk": made(0.06, False)}}
    monkeypatch.setattr(script, "FAMILIES_OF", others | {"not_there": {"topk": None}})
    monkeypatch.setattr(script, "seconds_per_call", seconds_per_call)
    said: list[str] = []
    script.peers(bench(script, said), shape(script, (40,)), {"topk": 0.008, "relu": 1.0})
    assert [line.split()[3:5] for line in said[:-1]] == [
        ["json", "40,000"], ["json", "bf16"], ["json", "bf16"],
        ["csv", "60,000"], ["csv", "bf16"], ["csv", "bf16"],
    ]  # fmt: skip
    assert said[2].endswith("FAILED: AttributeError: no compiler")
    assert "5,000 activations/s" in said[1]  # 100 in 20 ms
    assert said[-1].endswith("ours 2.50 times the best other, json bf16")


def test_a_tiny_run_prints_a_line_for_each_measurement(tmp_path):
    flags = ["--device", "cpu", "--tiny", "--seconds", "0", "--no-peers", "--families", "topk",
             "relu", "--shapes", "gpt2", "smollm2",
             "--output", str(tmp_path / "out.txt")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_families.py", *flags],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    written = (tmp_path / "out.txt").read_text()
    assert [line for line in done.stdout.splitlines() if "compil" not in line] == [
        line for line in written.splitlines() if "compil" not in line
    ]
    rows = [line.split() for line in written.splitlines() if re.match(r"(gpt2|smollm2) .*%", line)]
    assert [row[:3] for row in rows] == [
        *(["gpt2", arch, n] for arch in ("topk", "relu") for n in ("1", "4")),
        *[["smollm2", "relu", "21"]] * 3,
    ]
    assert [float(row[3]) for row in rows[:4]] == pytest.approx([2, 2, 2, 2], abs=0.1)
    for row in rows:
        us, steps, activations = (float(text.replace(",", "")) for text in row[4:7])
        assert steps == pytest.approx(int(row[2]) / us * 1e6, rel=0.05)
        assert activations == pytest.approx(64 / us * 1e6, rel=0.05)
        assert float(row[-1]) > 0.05  # GB
    costs = re.findall(r"4 cost ([\d.]+) times one", written)
    first, four = (float(row[4].replace(",", "")) for row in rows[:2])
    assert float(costs[0]) == pytest.approx(four / first, rel=0.05)


def test_an_unknown_shape_is_refused_in_one_line():
    command = [sys.executable, "benchmarks/gpu_families.py", "--device", "cpu", "--shapes", "gpt3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--shapes gpt3: there are gpt2, smollm2" in done.stderr
