"""benchmarks/gpu_day.sh and .py without a GPU: what parts show, limits, wheels, all parts tiny."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from builders.scripts import ROOT

from sparse_coding.config import UserError

FAMILIES = """\
gpt2          topk           1    32.0         780       1,282     2,625,641  1.965     80.5     61%   45%        8,031 (10.30)     1.20
gpt2          topk           4    32.0       2,418       1,654       846,981  7.855    322.1     78%   58%       33,000 (13.65)     4.61
gpt2          topk        4 cost 3.10 times one
smollm2       relu          21   140.0       7,900       2,658       259,240  6.069   2368.2     18%   75%       14,600 (1.85)     9.90
smollm2       relu          21  1792.0       9,100       2,307       225,054  6.281   2368.2     16%   65%       14,610 (1.61)     9.90

tf32: copy 4,154 GB/s, GEMM 411.00 TFLOP/s
gpt2          topk           1    32.0         900       1,111     2,275,555  1.965     80.5     61%   45%     1.20
smollm2       relu          21   140.0      15,100       1,390       135,629  6.069   2368.2     18%   75%       14,600 (0.97)     9.90
"""  # noqa: E501
PEERS = """\
sparsify is not installed: left out
gpt2          topk           1 sae_lens bf16                          9,000 us    227,555 activations/s     3.10 GB
gpt2          topk        ours 3.41 times the best other, dictionary_learning bf16 compiled
gpt2          batchtopk   ours 5.02 times the best other, sae_lens bf16
"""  # noqa: E501


@pytest.fixture(scope="module")
def script(benchmark_script) -> ModuleType:
    return benchmark_script("gpu_day")


def test_families_show_the_targets_numbers_in_the_faster_precision(script):
    assert script.of_families(FAMILIES, Path()) == (
        "gpt2 topk 2,625,641 activations/s; four cost 3.10; run.py's grid in ms: 7.9 at l0 140, "
        "9.1 at l0 1792; dense takes at least 0.97 times as long (smollm2 relu)"
    )


def test_peers_show_who_is_best_and_who_is_not_there(script):
    assert script.of_peers(PEERS, Path()) == (
        "topk 3.41 times dictionary_learning bf16 compiled; batchtopk 5.02 times sae_lens bf16; "
        "sparsify is not installed"
    )


def test_speed_and_harvest_show_what_their_scripts_print(script):
    speed = (
        "the figure: 19.2 s, extrapolated from 3000 steps, data\n201 times as fast as the loop\n"
    )
    assert script.of_speed(speed, Path()) == (
        "the figure: 19.2 s, extrapolated; 201 times as fast as the loop"
    )
    harvest = "harvest to disk                1,086 tokens/s   ratio 0.81 (0.78-0.88)\n"
    assert script.of_harvest(harvest, Path()) == "harvest to disk 1,086 tokens/s"


def metrics(folder: Path, *records: tuple[int, float], cut: str = "") -> Path:
    """Two autoencoders: (step, SAE-steps/s)"""
    folder.mkdir(exist_ok=True)
    cells = {"train/l0/a": 1.0, "train/l0/b": 1.0, "train/mse/a": 1.0}
    lines = [json.dumps({"step": s, "perf/sae_steps_per_s": r, **cells}) for s, r in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + cut)
    return folder


def test_time_of_training_is_that_of_the_steps_of_all_groups(script, tmp_path):
    folder = metrics(tmp_path / "run", (100, 200.0), (300, 400.0), (100, 100.0), cut='{"step": 4')
    steps, seconds, rate = script.trained(folder)
    assert (steps, rate) == (100, 100.0)
    assert seconds == pytest.approx(2 * (100 / 200 + 200 / 400 + 100 / 100))
    assert script.trained(tmp_path) is None


def test_runs_show_steps_time_and_what_is_best(script, tmp_path):
    folder = metrics(tmp_path / "run", (100, 200.0))
    best = "Best at l0 <= 32: fvu 0.303 at l0 29.1, ce_recovered 0.9 (relu, n_dict 6144)\n"
    assert script.of_run(best, folder) == (
        "100 steps in 1.0 s, last 200 SAE-steps/s; fvu 0.303 at l0 29.1"
    )
    dense = "No cell has l0 <= 32: ask for less; the sparsest: fvu 0.2 at l0 50.3, ce_recovered 1\n"
    assert script.of_run(dense, tmp_path) == "fvu 0.2 at l0 50.3"
    toy = "Best mmcs 0.997 at relu, l1_alpha 1, dict_ratio 4 (n_dict 2048): 512 true features\n"
    assert script.of_run(toy, tmp_path) == "Best mmcs 0.997"
    (folder / "config.json").write_text(json.dumps({"constants": {"batch_size": 1000}}))
    found = "True features are found best by x (f1 0.600, mcc 0.700, explained variance 0.8)"
    assert script.of_synth(found, folder) == (
        "100 steps, 100,000 samples/s: 200M in 2,000 s; f1 0.600, mcc 0.700"
    )


def outcome(script, tmp_path, code: str, limit_s: float = 60.0, left: float = 100.0, **options):
    part = script.Part("made", limit_s, ["-c", code], script.last_line, **options)
    return script.result_of(part, time.monotonic() + left, tmp_path)


def test_parts_end_well_or_badly_without_an_exception(script, tmp_path):
    result, output = outcome(script, tmp_path, "print('a\\rb'); print('12 passed')")
    assert (result.verdict, result.shows, output) == ("ok", "12 passed", "b\n12 passed\n")
    result, _ = outcome(script, tmp_path, "import sys; print('why'); sys.exit(3)")
    assert (result.verdict, result.shows) == ("failed (3)", "why; why")
    result, _ = outcome(script, tmp_path, "", needs="not_there")
    assert result.verdict == "skipped: not_there is not installed"
    result, _ = outcome(script, tmp_path, "", left=script.GRACE_S + script.LEAST_S / 2)
    assert result.verdict == "skipped: no time left"


def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "GRACE_S", 1.0)
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, signal, time; signal.signal(15, signal.SIG_IGN)\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    result, output = outcome(script, tmp_path, code, limit_s=8.0)
    assert time.monotonic() - start < 40
    assert result.verdict == "timed out after 8 s"
    pid = int(output.split()[0])
    for _ in range(100):  # init may take a moment to bury it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


def test_a_missing_package_is_named_with_the_remedy(script, monkeypatch):
    monkeypatch.setattr(script, "NEEDED", ("torch", "not_there", "nor_this"))
    with pytest.raises(UserError, match="missing: not_there, nor_this; WHEELS=FOLDER"):
        script.main([])


def test_wheels_bring_what_is_missing_and_replace_nothing(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("made_up_package", "tqdm"):
        with zipfile.ZipFile(wheels / f"{name}-9.9-py3-none-any.whl", "w") as file:
            file.writestr(f"{name}/__init__.py", "where = 'wheel'\n")
    python = tmp_path / "python"  # in the place of gpu_day.py it says what it finds
    says = "import made_up_package, tqdm; print(made_up_package.where, hasattr(tqdm, 'where'))"
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = benchmarks/gpu_day.py ]; then\n'
        f'  exec {sys.executable} -c "{says}"\nfi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    known = os.environ | {"PYTHON": str(python), "WHEELS": str(wheels)}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_day.sh")],
        env=known, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("wheel False\n", "")


def test_an_unknown_part_is_refused_in_one_line(tmp_path):
    command = [sys.executable, "benchmarks/gpu_day.py", "--only", "figures"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "--only figures: parts are kernels, families, figure" in line


@pytest.mark.long
def test_all_parts_run_tiny_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_day.sh"), "--cpu-smoke"],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(out)},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    table = done.stdout.split("part ")[1].splitlines()[1:]
    rows = {line.split()[0]: line for line in table}
    assert list(rows) == ["kernels", "families", "figure", "peers", "model", "run", "harvest",
                          "agreement", "world", "synth_cell", "tf32", "synth_table",
                          "gemm_kernels"]  # fmt: skip
    for name, line in rows.items():
        assert line.split()[1] == "ok", line
        assert name in ("world", "model") or len(line.split()) > 4, line
    assert "samples/s" in rows["synth_table"]
    assert "agrees" in rows["agreement"]
    assert "run.py's grid in ms" in rows["families"]
    assert {"gpu_day.txt", "figure.csv", "run.csv", "synth_cell.csv", "synth_table.csv"} <= {
        path.name for path in out.iterdir()
    }
    assert len((out / "synth_table.csv").read_text().splitlines()) == 6  # a line of heads
    log = (out / "gpu_day.txt").read_text()
    assert log.count("\n== ") + 1 == len(rows)
    assert str(tmp_path) not in log.replace(str(out), "")
