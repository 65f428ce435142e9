"""The comparison of benchmarks/precision_agreement.py, on planted runs."""

from types import ModuleType

import pytest

from sparse_coding.config import UserError
from sparse_coding.files import write_record


@pytest.fixture(scope="module")
def script(benchmark_script) -> ModuleType:
    return benchmark_script("precision_agreement")


def rows(script, fvu: dict[str, list[float]], metric: str = "fvu", arch: str = "relu") -> list:
    return [
        script.Row(arch, cell, seed, {metric: value})
        for cell, values in fvu.items()
        for seed, value in enumerate(values)
    ]


def test_differences_are_relative_and_their_noise_is_pooled_over_cells_and_precisions(script):
    first = rows(script, {"a": [0.9, 1.1], "b": [2.0, 2.0]})
    second = rows(script, {"a": [1.0, 1.2], "b": [2.2, 2.2]})
    ((lines, found),) = script.compare(first, second)
    assert len(lines) == 2
    assert (found.arch, found.metric) == ("relu", "fvu")
    assert found.difference == pytest.approx((0.1 + 0.1) / 2)
    # variances of a, relative to 1: .02 each; of b 0: their mean .01, of a difference of two means
    # of two seeds that times 2 / 2
    assert found.noise == pytest.approx(0.1)
    assert found.holds


def test_mmcs_is_compared_as_it_is(script):
    first, second = ({"a": [0.4, 0.6]}, {"a": [0.5, 0.6]})
    ((_, found),) = script.compare(rows(script, first, "mmcs"), rows(script, second, "mmcs"))
    assert found.difference == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("second", "holds"),
    [([1.01, 1.03], True), ([1.06, 1.08], False), ([0.94, 0.96], False), ([0.99, 1.01], True)],
)
def test_what_agrees(script, second, holds):
    """The noise is .014: of twice that is .05 beyond, .02 within."""
    ((_, found),) = script.compare(rows(script, {"a": [0.99, 1.01]}), rows(script, {"a": second}))
    assert found.noise == pytest.approx(0.0141, abs=1e-3)
    assert found.holds == holds


def test_without_any_noise_a_thousandth_is_allowed(script):
    first = rows(script, {"a": [32.0, 32.0]}, "l0")
    for l0, holds in ((32.02, True), (32.1, False)):
        ((_, found),) = script.compare(first, rows(script, {"a": [l0, l0]}, "l0"))
        assert found.holds == holds


def test_dead_ones_and_single_seeds_are_left_out(script):
    first = rows(script, {"dead": [0.0, 0.0], "alone": [1.0], "a": [1.0, 1.2]}, "l0")
    ((lines, _),) = script.compare(first, first)
    assert len(lines) == 1
    with pytest.raises(UserError, match="nothing to compare"):
        script.report(first[:3], first[:3], ("tf32", "bf16"))


def made_run(folder, precision: str, fvu: list[float]):
    folder.mkdir()
    write_record(folder / "config.json", {"constants": {"precision": precision}})
    lines = [f"{seed},relu,,0.1,64,{value},20" for seed, value in enumerate(fvu)]
    head = "seed,arch,target_l0,l1_alpha,n_dict,fvu,l0"
    (folder / "results.csv").write_text("\n".join([head, *lines]) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("fvu", "code", "last"),
    [
        (
            [0.21, 0.22, 0.21],
            0,
            "bf16 agrees with tf32 within noise; largest mean difference 1.59%",
        ),
        ([0.31, 0.32, 0.31], 1, "bf16 DIFFERS from tf32 in relu fvu"),
    ],
)
def test_finished_runs_are_compared(script, tmp_path, capsys, fvu, code, last):
    folders = [
        made_run(tmp_path / "a", "tf32", [0.20, 0.22, 0.21]),
        made_run(tmp_path / "b", "bf16", fvu),
    ]
    assert script.main(["--runs", *folders]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_folder_without_results_is_refused(script, tmp_path):
    with pytest.raises(UserError, match=r"it has no results.csv"):
        script.main(["--runs", str(tmp_path), str(tmp_path)])


def test_the_same_precision_gives_the_same_numbers_in_a_tiny_run(script, capsys):
    flags = ["--tiny", "--device", "cpu", "--precisions", "float32", "float32", "--n-seeds", "2"]
    assert script.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "float32 agrees with float32 within noise; largest mean difference 0.00%"
    verdicts = [line.split() for line in lines if line.endswith(": agrees")]
    found = {(*words[: words.index("mean")], words[words.index("mean") + 1]) for words in verdicts}
    assert found == {
        *((arch, metric) for arch in ("relu", "batchtopk") for metric in ("fvu", "l0")),
        *(("toy", "relu", metric) for metric in ("fvu", "l0", "mmcs")),
    }
