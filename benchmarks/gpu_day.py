"""All that is measured on a GPU, one part after another, in --minutes at most. See gpu_day.sh.

Each part is a process of its own under its own limit; one that fails or is stopped leaves the
others as they are. What all of them print goes to gpu_day.txt in the folder, with the tables of
results and the figure of the toy world; last comes a table: part, verdict, seconds, what it shows.
Exit code 1 where a part failed; being stopped at a limit is no failure.
"""

import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from sparse_coding.config import one_line, parse_flags, require, run_as_script

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "numpy", "tyro", "docstring_parser", "typeguard", "tqdm", "safetensors",
          "matplotlib", "jinja2", "transformers", "psutil", "scipy")  # fmt: skip
LEAST_S = 5.0  # a part that has less left is not begun
GRACE_S = 10.0  # for a part to save and end, once it is told to
SLOW = 10  # times longer limits for a trial on a CPU, which may be shared
SYNTH = ("--preset", "synth16k", "--n-seeds", "1", "--wandb-mode", "disabled")


@dataclass(frozen=True)
class Config:
    cpu_smoke: bool = False  # all parts at tiny sizes, on a CPU
    minutes: float = 9.0  # for all of it
    only: tuple[str, ...] = ()  # parts; (): all
    model: str = ""  # that the language model's parts take; "": models/smollm2, else a random one
    output_dir: str = ""  # "": $OUT, else results/DATE_gpu_day


class Part(NamedTuple):
    """limit_s: seconds that it may take; command: after python; shows: from what it printed and
    its run folder, what it found, or ""; needs: a module without which it is skipped"""

    name: str
    limit_s: float
    command: list[str]
    shows: Callable[[str, Path], str]
    needs: str = ""


class Result(NamedTuple):
    """verdict: ok, failed (its exit code), timed out, or skipped (why)"""

    name: str
    verdict: str
    seconds: float
    shows: str


def number(text: str) -> float:
    return float(text.replace(",", ""))


# --- what each part shows ---


def last_line(output: str, _: Path) -> str:
    return output.strip().splitlines()[-1].strip("= ") if output.strip() else ""


def of_families(output: str, _: Path) -> str:
    """gpt2's TopK, run.py's grid, and the least number of times that dense steps take."""
    row = re.compile(
        r"^(\S+) +(\w+) +(\d+) +([\d.]+) +([\d,]+) +[\d,]+ +([\d,]+) .*?(?:\(([\d.]+)\))? +[\d.]+$"
    )
    rows = [found.groups() for line in output.splitlines() if (found := row.match(line))]
    shows, grid = [], {}
    speeds = [number(r[5]) for r in rows if r[:3] == ("gpt2", "topk", "1")]
    if speeds:
        shows.append(f"gpt2 topk {max(speeds):,.0f} activations/s")
    costs = re.findall(r"^gpt2 +topk +4 cost ([\d.]+)", output, re.MULTILINE)
    shows += [f"four cost {min(costs, key=float)}"] * bool(costs)
    for shape, _arch, _n, l0, us, *_ in rows:
        if shape == "smollm2":
            grid[float(l0)] = min(number(us) / 1e3, grid.get(float(l0), float("inf")))
    times = [f"{ms:.1f} at l0 {l0:.0f}" for l0, ms in sorted(grid.items())]
    shows += [f"run.py's grid in ms: {', '.join(times)}"] * bool(times)
    ratios = [(float(r[6]), f"{r[0]} {r[1]}") for r in rows if r[6]]
    shows += ["dense takes at least {:.2f} times as long ({})".format(*min(ratios))] * bool(ratios)
    return "; ".join(shows)


def of_peers(output: str, _: Path) -> str:
    """How many times faster ours is; or who isn't there."""
    found = re.findall(r"^\S+ +(\w+) +ours ([\d.]+) times the best other, (.*)$", output, re.M)
    shows = [f"{arch} {ratio} times {who}" for arch, ratio, who in found]
    return "; ".join([*shows, *re.findall(r"^\w+ is not installed", output, re.M)])


def trained(folder: Path) -> tuple[int, float, float] | None:
    """(steps, seconds of them without logging, SAE-steps/s of the last record) of a run folder."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    done, seconds, rate = 0, 0.0, 0.0
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # it was stopped in the middle of a line
            break
        step, rate = record["step"], record["perf/sae_steps_per_s"]
        n_saes = sum(key.startswith("train/l0/") for key in record)
        before = done if step > done else 0  # of another group
        seconds, done = seconds + (step - before) * n_saes / rate, step
    return (done, seconds, rate) if done else None


def of_run(output: str, folder: Path) -> str:
    """Steps, their time, and the verdict's numbers."""
    shows = []
    if known := trained(folder):
        steps, seconds, rate = known
        shows.append(f"{steps:,} steps in {seconds:.1f} s, last {rate:,.0f} SAE-steps/s")
    best = re.findall(r"^Best mmcs [\d.]+|fvu [\d.]+ at l0 [\d.]+, ce", output, re.M)
    best = [text.removesuffix(", ce") for text in best]
    return "; ".join([*shows, *best[:1]])


def of_synth(output: str, folder: Path) -> str:
    """Samples/s of the last record, which says how long 200M samples take; and the verdict."""
    known, batch = trained(folder), json.loads((folder / "config.json").read_text())["constants"]
    if not known:
        return ""
    steps, seconds, _ = known
    speed = steps * batch["batch_size"] / seconds
    f1 = re.findall(r"f1 [\d.]+, mcc [\d.]+", output)
    return "; ".join(
        [f"{steps:,} steps, {speed:,.0f} samples/s: 200M in {2e8 / speed:,.0f} s", *f1[:1]]
    )


def of_harvest(output: str, _: Path) -> str:
    found = re.findall(r"^(\S.*?) {2,}([\d,]+) (tokens/s|SAE-steps/s)", output, re.M)
    return "; ".join(f"{name} {rate} {unit}" for name, rate, unit in found)


def of_speed(output: str, _: Path) -> str:
    figure = re.findall(r"^the figure: [\d.,]+ s, \w+", output, re.M)
    return "; ".join([*figure, *re.findall(r"^[\d,]+ times as fast as.*$", output, re.M)])


# --- the parts ---


def parts(cfg: Config, work: Path, model: str) -> list[Part]:
    """The most valuable first; work: the folder of run folders, model: a folder that may be still
    to be made."""
    tiny, world = cfg.cpu_smoke, str(work / "world.npz")
    at_gpt2 = ["--shapes", "gpt2", "--families", "topk", "batchtopk", "matryoshka", "--no-dense"]
    again = ["--families", "topk", "relu", "--no-peers", "--no-dense"]
    batchtopk = ["--arch", "batchtopk"]
    found = [
        Part("kernels", 80, kernels("gpu", tiny), last_line, needs="pytest"),
        Part("families", 140, families("bf16", tiny, "--no-peers"), of_families),
        Part("figure", 110, figure(work, tiny), of_run),
        Part("peers", 70, families("bf16", tiny, *at_gpt2), of_peers),
        Part("model", 40, stand_in("--model", model, tiny), lambda *_: Path(model).name),
        Part("run", 80, run_on(model, work, tiny), of_run),
        Part("harvest", 50, harvest_of(model, tiny), of_harvest),
        Part("agreement", 70, agreement(tiny), last_line),
        Part("world", 40, stand_in("--world", world, tiny, *on_cpu(tiny)), lambda *_: ""),
        Part("synth_cell", 45, synth("synth_cell", 20_000, work, tiny, *batchtopk), of_synth),
        Part("tf32", 50, families("tf32", tiny, *again), of_families),
        Part("speed", 90, ["benchmarks/gpu_speed.py"], of_speed),
        Part("synth_table", 60, synth("synth_table", 5000, work, tiny), of_synth),
        Part("gemm_kernels", 90, kernels("gpu_gemm", tiny), last_line, needs="pytest"),
    ]
    if tiny:  # gpu_speed.py's are kernels, and a test interprets them
        found = [
            part._replace(limit_s=SLOW * part.limit_s) for part in found if part.name != "speed"
        ]
    return [part for part in found if part.name != "model" or not Path(model).exists()]


def on_cpu(tiny: bool) -> list[str]:
    return ["--device", "cpu"] if tiny else []


def kernels(of: str, tiny: bool) -> list[str]:
    """Without those tests that compile for other GPUs, which any machine can do."""
    command = ["-m", "pytest", f"tests/sae/engines/test_{of}.py", "-k"]
    if tiny:
        return [*command, "without_triton or without_tf32"]
    several = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    return [*command, "not kernels_compile", *several]


def families(precision: str, tiny: bool, *more: str) -> list[str]:
    command = ["benchmarks/gpu_families.py", *more, *on_cpu(tiny)]
    small = ["--tiny", "--seconds", "0.01", "--no-compile-peers"]
    return [*command, *(small if tiny else ["--precision", precision])]


def figure(work: Path, tiny: bool) -> list[str]:
    command = ["replicate_toy_models.py", "--wandb-mode", "disabled", *on_cpu(tiny)]
    command += ["--output-dir", str(work / "figure"), "--preset"]
    return [*command, *(["smoke", "--n-steps=40", "--log-every=20"] if tiny else ["full"])]


def agreement(tiny: bool) -> list[str]:
    """bf16 needs a new CPU, so there float32 is compared with itself."""
    same = ["--tiny", "--precisions", "float32", "float32"]
    return ["benchmarks/precision_agreement.py", *on_cpu(tiny), *(same if tiny else [])]


def synth(name: str, n_steps: int, work: Path, tiny: bool, *more: str) -> list[str]:
    """Of the world that stand_ins.py made."""
    command = ["replicate_toy_models.py", *SYNTH, *on_cpu(tiny), *more]
    sizes = {"world": work / "world.npz", "output-dir": work / name, "n-eval-samples": 200_000}
    if tiny:
        n_steps = 20
        sizes |= {"n-true-features": 256, "activation-dim": 32, "target-l0": 4}
        sizes |= {"n-eval-samples": 2048}
    sizes |= {"n-steps": n_steps, "log-every": n_steps // 10}
    return [*command, *(f"--{flag}={value}" for flag, value in sizes.items())]


def stand_in(flag: str, path: str, tiny: bool, *more: str) -> list[str]:
    return ["benchmarks/stand_ins.py", flag, path, *["--tiny"] * tiny, *more]


def run_on(model: str, work: Path, tiny: bool) -> list[str]:
    """run.py on 21 autoencoders: 7 values of l1_alpha x 3 sizes."""
    flags = {"preset": "full", "model": model, "dataset": "stdlib", "arch": "relu",
             "l1-exp-low": -22, "l1-exp-high": -15, "wandb-mode": "disabled",
             "activations-dir": f"{model}-activations", "output-dir": work / "run"}  # fmt: skip
    if tiny:
        flags |= {"n-tokens": 2048, "batch-size": 64, "n-eval-tokens": 256, "n-page-tokens": 512,
                  "expansion-exp-high": 1, "context-length": 64, "log-every": 10,
                  "max-text-tokens": 20_000, "device": "cpu"}  # fmt: skip
    else:
        flags |= {"n-tokens": 2_000_000, "n-eval-tokens": 20_000, "n-page-tokens": 50_000}
    return ["run.py", *(f"--{flag}={value}" for flag, value in flags.items())]


def harvest_of(model: str, tiny: bool) -> list[str]:
    """Of the layer in the middle, to disk and into memory; the sweep is another part's."""
    flags = {"model": model, "n-tokens": 1_000_000, "n-repeats": 3, "seconds": 30}
    if tiny:
        flags |= {"context-length": 64, "n-tokens": 2000, "n-repeats": 1, "seconds": 2}
    command = ["benchmarks/activation_speed.py", "--no-training", *on_cpu(tiny)]
    return [*command, *(f"--{flag}={value}" for flag, value in flags.items())]


# --- running them ---


def run_part(part: Part, limit_s: float, log: Path) -> tuple[int | None, float]:
    """(exit code, None if it was stopped at its limit; seconds). What it prints goes to the log."""
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where this process is being stopped
            for how in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, how)
                    wait_for(process, GRACE_S)
    return code, time.monotonic() - start


def wait_for(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def result_of(part: Part, deadline: float, work: Path) -> tuple[Result, str]:
    """What came of the part, and what it printed."""
    if part.needs and not importlib.util.find_spec(part.needs):
        return Result(part.name, f"skipped: {part.needs} is not installed", 0, ""), ""
    left = deadline - time.monotonic() - GRACE_S
    if left < LEAST_S:
        return Result(part.name, "skipped: no time left", 0, ""), ""
    log, limit_s = work / f"{part.name}.log", min(part.limit_s, left)
    code, seconds = run_part(part, limit_s, log)
    lines = log.read_bytes().decode(errors="replace").split("\n")
    output = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)  # last of a bar
    verdict = {0: "ok", None: f"timed out after {limit_s:.0f} s"}.get(code, f"failed ({code})")
    try:
        shows = part.shows(output, work / part.name)
    except (OSError, ValueError, LookupError) as error:  # it ended before it wrote what is read
        shows = f"nothing to be read: {type(error).__name__}"
    if code not in (0, None):
        shows = "; ".join(filter(None, (shows, last_line(output, work))))
    return Result(part.name, verdict, seconds, one_line(shows)), output


def keep(work: Path, folder: Path) -> None:
    """Copies tables of results and the toy figure out of the run folders."""
    for path in sorted(work.glob("*/results.csv")):
        shutil.copy(path, folder / f"{path.parent.name}.csv")
    if (figure := work / "figure" / "figures" / "mmcs.png").exists():
        shutil.copy(figure, folder / "figure.png")


def table(results: list[Result]) -> list[str]:
    lines = [f"{'part':12} {'verdict':22} {'s':>5}  what it shows"]
    return lines + [f"{r.name:12} {r.verdict:22} {r.seconds:5.0f}  {r.shows}" for r in results]


def main(argv: list[str]) -> int:
    start = time.monotonic()
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    require(not missing, f"missing: {', '.join(missing)}; WHEELS=FOLDER brings them (gpu_day.sh)")
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    default = ROOT / "results" / f"{datetime.date.today()}_gpu_day"
    folder = Path(cfg.output_dir or os.environ.get("OUT") or default).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    deadline, results = start + 60 * cfg.minutes * (SLOW if cfg.cpu_smoke else 1), []
    with tempfile.TemporaryDirectory() as name, (folder / "gpu_day.txt").open("w") as file:
        work, local = Path(name), ROOT / "models" / "smollm2"
        model = cfg.model or str(local if local.exists() and not cfg.cpu_smoke else work / "model")
        todo = parts(cfg, work, model)
        for wrong in set(cfg.only) - {part.name for part in todo}:
            require(False, f"--only {wrong}: parts are {', '.join(part.name for part in todo)}")
        for part in todo:
            if cfg.only and part.name not in (*cfg.only, "model", "world"):
                continue
            shown = shlex.join(["python", *part.command]).replace(name, "WORK")
            print(f"== {part.name}: {shown}", file=file, flush=True)
            result, output = result_of(part, deadline, work)
            results.append(result)
            print(output.replace(name, "WORK"), *table([result])[1:], sep="\n", file=file)
            file.flush()
            print(*table([result])[1:], sep="\n", flush=True)
        keep(work, folder)
        print("", *table(results), sep="\n", file=file)
    print(f"\n{time.monotonic() - start:.0f} s in all", *table(results), sep="\n")
    return 1 if any(result.verdict.startswith("failed") for result in results) else 0


if __name__ == "__main__":
    run_as_script(main)
