"""benchmarks/family_speed.py without the others: a tiny run of all families."""

import subprocess
import sys
from pathlib import Path

from sparse_coding.sae.families import TRAINED

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "family_speed.py"


def test_a_tiny_run_prints_a_line_for_each_family_and_the_share_of_its_gemm(tmp_path):
    command = [sys.executable, str(SCRIPT), "--no-peers", "--output", str(tmp_path / "speed.txt")]
    sizes = {"width": 16, "n-dict": 64, "batch": 32, "k": 4, "n-dead": 8}
    command += [word for name, n in sizes.items() for word in (f"--{name}", str(n))]
    command += ["--n-repeats", "1", "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert (tmp_path / "speed.txt").read_text() == "".join(
        f"{line}\n" for line in lines[-(len(TRAINED) + 5) :]
    )
    ours = [line.split() for line in lines if " ours " in line]
    assert [words[0] for words in ours] == [*TRAINED, "grid"]
    for words in ours:
        assert float(words[2]) > 0  # ms
        assert words[-1].endswith("%")
