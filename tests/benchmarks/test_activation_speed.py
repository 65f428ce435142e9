"""benchmarks/activation_speed.py on a tiny random model: all its lines, and where its time ends."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "activation_speed.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("activation_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_prints_every_rate_and_its_ratios(tmp_path):
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"document {n}: " + "ab cd " * 40}) for n in range(100))
    text.write_text("\n".join(lines))
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--dataset", str(text), "--device",
               "cpu", "--n-tokens", "2000", "--context-length", "32", "--n-steps", "2",
               "--n-repeats", "1", "--batch-sizes", "4", "8", "--seconds", "5",
               "--folder", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rates = re.findall(r"^(\S.*?) {2,}([\d,]+) (\S+)   ratio (.*)$", done.stdout, re.M)
    names = [name for name, *_ in rates]
    assert names == [
        *(f"bare forward pass, {n} rows of text" for n in (4, 8, 16)),
        "harvest to disk, 16 rows of text",
        "harvest into memory (cpu), 16 rows of text",
        "the disk alone, files synced",
        "9 cells one after another, plain autograd",
        "9 cells one after another, this engine",
        "9 cells together",
    ]
    assert [unit for _, _, unit, _ in rates] == ["tokens/s"] * 6 + ["SAE-steps/s"] * 3
    assert all(float(rate.replace(",", "")) > 0 for _, rate, *_ in rates)
    n_ratios = [ratios.count("(") for *_, ratios in rates]
    assert n_ratios == [1, 1, 1, 3, 2, 1, 1, 1, 1]
    assert max(float(ratios.split()[0]) for *_, ratios in rates[:3]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_repeats_end_when_the_time_is_over_but_for_the_first(script, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 2.0, 3.5, 99.0])
    monkeypatch.setattr(script.time, "monotonic", lambda: next(clock))
    calls: list[str] = []
    works = {name: lambda n=name: calls.append(n) or float(len(calls)) for name in ("a", "b")}
    assert script.repeated(works, 9, 3.0) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == ["a", "b"] * 3
    assert "3 of 9 repeats in 3 s" in capsys.readouterr().out
    monkeypatch.setattr(script.time, "monotonic", iter([0.0, 50.0]).__next__)
    assert script.repeated(works, 2, 3.0) == {"a": [7], "b": [8]}


def test_a_line_has_the_median_rate_and_the_ratio_pair_by_pair(script, capsys):
    script.line("x", [1.0, 2.0, 4.0], [[2.0, 2.0, 2.0], [1.0, 4.0, 2.0]], 10, "tokens/s")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" 5 tokens/s   ratio 1.00 (0.50-2.00), 1.00 (0.50-2.00)")


@pytest.mark.parametrize(
    ("shape", "n_weights", "width"), [("smollm2-135m", 134.5e6, 1536), ("pythia-70m", 70.4e6, 2048)]
)
def test_the_shapes_are_those_of_the_models_that_they_are_named_after(
    script, shape, n_weights, width
):
    """By their numbers of weights, which their model cards round to 135M and 70M."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = script.SHAPES[shape]
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(w.numel() for w in model.parameters()) == pytest.approx(n_weights, rel=2e-3)
    assert config.intermediate_size == width
