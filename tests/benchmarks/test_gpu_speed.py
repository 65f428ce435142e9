"""benchmarks/gpu_speed.py without a GPU: its arithmetic, and a tiny run of interpreted kernels."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_coding.sae.engines.cpu import kernels_compile
from sparse_coding.sae.engines.cpu_compile import has_kernels

pytest.importorskip("triton", reason="Triton is for Linux only")
FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY = dict(device="cpu", n_steps=5, warm_steps=2, check_steps=1, loop_steps=2, seconds=0.0,
            at_a_time=1, check_dict=32, copy_gb=0.001, gemm_size=64, l1_exp_low=0, l1_exp_high=1,
            dict_ratio_exp_low=-3, dict_ratio_exp_high=-2)  # fmt: skip


@pytest.fixture(scope="module")
def script():
    """The script for x of width 32, which are interpreted sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        peers = importlib.import_module("peers")
        for name in ("H", "BATCH"):
            patch.setattr(peers, name, 32)
        spec = importlib.util.spec_from_file_location("gpu_speed", FOLDER / "gpu_speed.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_ends_with_one_line():
    command = [sys.executable, str(FOLDER / "gpu_speed.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "no usable CUDA GPU" in line


def test_what_a_step_needs_is_counted_by_what_fired_and_moved(script):
    work = SimpleNamespace(n_fired=torch.tensor([3, 5]), n_resting=torch.tensor([10, 0]))
    engine = SimpleNamespace(ready=(None, work, None), sizes=[64, 128])
    n_bytes, flop = script.needs(SimpleNamespace(engine=engine))
    # 192 rows of W_enc read, 18 rows of six matrices read and written, 8 of codes and δ twice each
    assert n_bytes == 4 * 32 * (192 + 12 * 18 + 4 * 8)
    assert flop == 2 * 32 * 32 * (192 + 4 * 8)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")
@pytest.mark.usefixtures("quick_interpreter")
def test_a_tiny_run_measures_everything_and_writes_it(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "TILES", ({"list_f": 16},))
    assert has_kernels()
    assert kernels_compile()
    capsys.readouterr()  # it may have been said that they are compiled
    say = script.Report(str(tmp_path / "results" / "speed.txt"))
    cfg = script.Config(**TINY)
    assert script.check(cfg, CPU, "float32", say)
    peak = script.limits(cfg, CPU, say)
    theirs = script.rows(cfg, CPU, say)
    ours = script.grid(cfg, CPU, say, peak)
    script.tune(cfg, CPU, say)
    assert theirs > 0
    assert ours > 0
    said = capsys.readouterr().out
    assert (tmp_path / "results" / "speed.txt").read_text() == said
    for words in (
        "kernels agree",
        "GB/s",
        "loop of 2023 takes",
        "the grid: 1 SAEs",
        "extrapolated",
    ):
        assert words in said, words


def test_numbers_that_differ_from_dense_ones_are_not_measured(script, monkeypatch, capsys):
    class Off(script.DenseEngine):
        ready = "is"

        def steps_(self, xs, **options):
            super().steps_(-xs, **options)

    monkeypatch.setattr(script.gpu, "GpuEngine", Off)
    monkeypatch.setattr(script, "print_conditions", lambda *arguments: None)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
    assert script.main(flags) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_kernels_that_do_not_work_are_not_measured(script, monkeypatch):
    monkeypatch.setattr(script.gpu, "fault_of", lambda *arguments: "no compiler")
    assert not script.check(script.Config(**TINY), CPU, "float32", print)
