"""Trains the very small transformer within minutes of one GPU, into a folder that others load.

    python nanogpt_config/train_supertiny.py --output-dir assets/supertiny     12 minutes, one GPU
    python nanogpt_config/train_supertiny.py --tokenizer bpe                   without a hub
    python nanogpt_config/train_supertiny.py --steps 50 --eval-tokens 20000 -- --device=cpu \\
        --compile=False --batch_size=8 --gradient_accumulation_steps=1         a try on a CPU

What stands after -- are options of nanoGPT's train.py. In turn: text of package registries
(corpus.py), tokens (prepare.py), nanoGPT, 20 steps that tell how many fit into the time, training
(train.sh), a folder of transformers in float16, and its card, README.md. Killed, the same command
goes on. tiktoken fetches GPT-2's tokenizer; where nanoGPT can't be cloned, set NANOGPT to a folder.
"""

import dataclasses
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import check
import convert
import corpus
import numpy as np
import prepare
import torch

from sparse_coding.config import (
    UserError,
    fingerprint,
    parse_flags,
    require,
    require_flag,
    run_as_script,
)
from sparse_coding.files import held, read_json, write_atomic, write_json
from sparse_coding.lm.documents import open_documents
from sparse_coding.lm.model import load_language_model
from sparse_coding.lm.tokenizer import load_tokenizer, read_bin_manifest
from sparse_coding.sweep.hardware import pick_device

DESCRIPTION = __doc__.split("\n\n")[0]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TEXT = ROOT / "data" / "supertiny-text"  # of corpus.py, for every run
HELD_OUT = 0.02  # share of the documents: a million tokens
N_EVALUATIONS = 10  # and checkpoints, of a run
N_MEASURED = 20  # steps that tell how long one takes
SET_HERE = ("dataset", "out_dir", "init_from", "max_iters", "lr_decay_iters", "eval_interval")
AFTERWARDS_S = 90.0  # for what comes after training, on half a million held-out tokens; ours


@dataclass(frozen=True)
class Config:
    """The constants: each is a flag."""

    minutes: float = 12.0  # from the start of the command to the card; training takes what is left
    tokens: str = "500M"  # trained on at most, repeats counted
    steps: int = 0  # of training; 0: as many as --minutes and --tokens leave room for
    text: str = ""  # a file or folder as prepare.py reads it; default: what corpus.py fetches
    # gpt2: as published, fetched by tiktoken; bpe: learnt on the text, needs no hub
    tokenizer: Literal["gpt2", "bpe"] = "gpt2"
    vocab_size: int = 4096  # of bpe
    eval_tokens: int = 500_000  # held-out ones for the card, at most
    work_dir: str = ""  # tokens and checkpoints; default: models/supertiny-<hash of the constants>
    output_dir: str = ""  # the folder to write; default: hf in --work-dir


def main(argv: list[str]) -> int:
    """Runs the command line `argv`; the exit code."""
    began = time.monotonic()
    cut = argv.index("--") if "--" in argv else len(argv)
    cfg, options = parse_flags(Config(), argv[:cut], description=DESCRIPTION), argv[cut + 1 :]
    check_flags(cfg)
    ours = [name for name in SET_HERE if name in check.read_options(options)]
    require(
        not ours, f"--{', --'.join(ours)} after --: set by this script, see --steps, --work-dir"
    )
    work = Path(cfg.work_dir or ROOT / f"models/supertiny-{identity(cfg, options)}").resolve()
    folder, data = Path(cfg.output_dir or work / "hf").resolve(), work / "data"
    if (folder / "README.md").is_file():
        print(f"done before: {folder} (remove it to start again)")
        return 0
    # before anything is fetched
    check.main(["--overrides=supertiny", "--", f"--dataset={data}", *options])
    if cfg.tokenizer == "gpt2":
        require_gpt2()

    work.mkdir(parents=True, exist_ok=True)
    with held(work / "lock"):
        sources = text_of(cfg)
        prepare.main([f"--source={cfg.text or TEXT}", f"--output-dir={data}", "--tokens=all",
                      f"--tokenizer={cfg.tokenizer}", f"--vocab-size={cfg.vocab_size}",
                      f"--held-out={HELD_OUT}"])  # fmt: skip
        nanogpt = nanogpt_folder()
        plan = planned(cfg, work, nanogpt, options, began)
        train(work, nanogpt, [*plan["options"], *options], eval_tokens=cfg.eval_tokens)
        of_folder = convert.Config(checkpoint=str(work / "ckpt.pt"), data=str(data))
        convert.convert(of_folder, folder, read_bin_manifest(data))
        losses = losses_of(folder, data, cfg.eval_tokens)
        command = shlex.join(["python", "nanogpt_config/train_supertiny.py", *argv])
        made = dict(command=command, commit=commit_of(nanogpt), n_seen=plan["n_seen"])
        write_atomic(folder / "README.md", card(folder, data, sources, losses, made))
    print(f"done: {folder}, {weights_size(folder) / 1e6:.2f} MB of weights; "
          f"{losses['model']:.3f} nats a token, token frequencies {losses['unigram']:.3f}\n"
          f"python run.py --model {folder} --dataset {data / 'val.bin'}")  # fmt: skip
    return 0


def check_flags(cfg: Config) -> None:
    """Raises UserError for what is out of range."""
    require_flag(cfg, "minutes", cfg.minutes > 0, "above 0")
    tens = cfg.steps >= 0 and cfg.steps % N_EVALUATIONS == 0
    require_flag(cfg, "steps", tens, f"a multiple of {N_EVALUATIONS}, or 0")
    require_flag(cfg, "vocab_size", 257 <= cfg.vocab_size <= 65_535, "between 257 and 65535")
    require_flag(cfg, "eval_tokens", cfg.eval_tokens >= 1000, "at least 1000")
    require(cfg.tokens != "all", "--tokens all: give a number like 500M")
    prepare.read_count(cfg.tokens)
    there = not cfg.text or Path(cfg.text).exists()
    require(there, f"--text {cfg.text}: no such file or folder")


def require_gpt2() -> None:
    """Raises UserError if tiktoken neither has GPT-2's tokenizer nor can fetch it."""
    try:
        load_tokenizer("", choice="gpt2", vocab_size=prepare.GPT2_TOKENS)
    except UserError:
        raise UserError("--tokenizer gpt2 is out of reach: set TIKTOKEN_CACHE_DIR to a folder in "
                        "which tiktoken has kept it, or use --tokenizer bpe") from None  # fmt: skip


def identity(cfg: Config, options: list[str]) -> str:
    """A hash of what decides the model."""
    constants = dataclasses.asdict(cfg) | {"options": tuple(options)}
    return fingerprint({k: v for k, v in constants.items() if not k.endswith("_dir")})


def text_of(cfg: Config) -> list[dict]:
    """Fetches the text, unless it was given; what it is made of, for the card."""
    if not cfg.text:
        return corpus.build(TEXT)
    sizes = [len(text.encode()) for text in open_documents(cfg.text)]
    about = dict(name=Path(cfg.text).name, version="as given", licence="its own")
    return [about | dict(documents=len(sizes), bytes=sum(sizes))]


def nanogpt_folder() -> Path:
    """A checkout of nanoGPT. Raises UserError if there is none."""
    done = subprocess.run(["bash", HERE / "get_nanogpt.sh"], capture_output=True, text=True)
    reason = done.stderr.strip().rpartition("\n")[2].removeprefix("get_nanogpt.sh: error: ")
    require(done.returncode == 0, reason)
    return Path(done.stdout.strip()).resolve()


# --- how many steps fit, and the steps ---


def planned(
    cfg: Config, work: Path, nanogpt: Path, options: list[str], began: float
) -> dict[str, object]:
    """The options of train.py that make its schedule, and the tokens that it then sees. Kept in
    plan.json, so that a resumed run has the schedule that it began with.

    began: when the command did, by time.monotonic()
    Raises:
        UserError: --minutes leave no time to train.
    """
    path = work / "plan.json"
    if path.exists():
        return read_json(path, remedy="remove it, and run/ beside it")
    values = check.NANOGPT | check.read_overrides(check.find("supertiny"))
    values |= check.read_options(options)
    n_steps = cfg.steps or steps_that_fit(
        cfg, *measured(work, nanogpt, options), values=values, began=began
    )
    print(f"training: {n_steps:,} steps of {tokens_of_step(values):,} tokens", flush=True)
    schedule = [f"--max_iters={n_steps}", f"--lr_decay_iters={n_steps}",
                f"--eval_interval={n_steps // N_EVALUATIONS}",
                f"--warmup_iters={max(1, n_steps // 40)}"]  # fmt: skip
    plan = {"options": schedule, "n_seen": n_steps * tokens_of_step(values)}
    write_json(path, plan)
    return plan


def tokens_of_step(values: dict) -> int:
    """values: of train.py's constants."""
    return values["gradient_accumulation_steps"] * values["batch_size"] * values["block_size"]


def steps_that_fit(
    cfg: Config, step_s: float, start_s: float, *, values: dict, began: float
) -> int:
    """Steps for --tokens, or as many as end in time.

    Args:
        step_s, start_s: as measured
        values: of train.py's constants
        began: when the command did, by time.monotonic()
    Raises:
        UserError: none would.
    """
    used_s = time.monotonic() - began
    # a forward pass is a third of a step's work, and an evaluation has eval_iters for each bin
    passes = 2 * values["eval_iters"] * (N_EVALUATIONS + 1)
    evaluations_s = step_s * passes / (3 * values["gradient_accumulation_steps"])
    left_s = 60 * cfg.minutes - used_s - start_s - AFTERWARDS_S - evaluations_s
    fit = max(0, int(left_s / step_s))
    wanted = prepare.read_count(cfg.tokens) // tokens_of_step(values)
    n_steps = min(fit, wanted) // N_EVALUATIONS * N_EVALUATIONS
    require(
        n_steps > 0,
        f"--minutes {cfg.minutes:g}, of which {used_s / 60:.1f} are used: a step takes {step_s:.2f}"
        f" s, so {fit} fit, of {wanted} for --tokens {cfg.tokens}: give more of them (or --steps), "
        f"{N_EVALUATIONS} steps at least",
    )
    print(f"a step takes {step_s:.3f} s: {fit:,} fit into the time, {wanted:,} make the tokens")
    return n_steps


def measured(work: Path, nanogpt: Path, options: list[str]) -> tuple[float, float]:
    """(seconds of a step, of what comes before the first) by a short run of train.py.

    Raises:
        UserError: train.py fails.
    """
    short = ["--eval_iters=1", "--eval_interval=1000", "--log_interval=1",
             f"--max_iters={N_MEASURED}"]  # fmt: skip
    where = [f"--dataset={work / 'data'}", f"--out_dir={work / 'measured'}"]
    command = [sys.executable, "train.py", HERE / "supertiny.py", *where, *options, *short]
    print(f"{N_MEASURED} steps, to see how long one takes", flush=True)
    began = time.monotonic()
    done = subprocess.run(command, cwd=nanogpt, env=environment(), capture_output=True, text=True)
    last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    require(done.returncode == 0, f"nanoGPT's train.py fails: {last}")
    times = [float(ms) / 1000 for ms in re.findall(r"^iter .*time ([\d.]+)ms", done.stdout, re.M)]
    said = len(times) > N_MEASURED // 2
    require(said, f"{nanogpt}/train.py prints no times: use the commit of get_nanogpt.sh")
    step_s = statistics.median(times[len(times) // 2 :])
    return step_s, max(0.0, time.monotonic() - began - len(times) * step_s)


def train(work: Path, nanogpt: Path, options: list[str], *, eval_tokens: int) -> None:
    """train.sh; from its last checkpoint, if it was killed. Raises UserError if it fails."""
    settings = {"DATA": str(work / "data"), "OUT": str(work), "NANOGPT": str(nanogpt),
                "PY": sys.executable, "EVAL_TOKENS": str(eval_tokens), "GPUS": "1"}  # fmt: skip
    command = ["bash", HERE / "train.sh", "supertiny", *options]
    done = subprocess.run(command, env=environment() | settings)
    if done.returncode:
        raise UserError(f"train.sh ended with {done.returncode}, see above: run the command again "
                        "to go on from the last checkpoint")  # fmt: skip


def environment() -> dict[str, str]:
    """That of train.py: with one thread so small a model is fastest on a CPU."""
    return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"} | dict(os.environ)


# --- what became of it ---


def losses_of(folder: Path, data: Path, n_tokens: int) -> dict[str, float]:
    """Nats a held-out token: of the model in the folder (weights in float16, computed in float32)
    and of token frequencies in train.bin, one added to each count. n_tokens: at most, of val.bin"""
    lm = load_language_model(str(folder), device=pick_device("auto"), dtype=torch.float32)
    tokenizer = load_tokenizer(str(folder), vocab_size=lm.vocab_size)
    ids = convert.read_windows(data / "val.bin", n_tokens, lm.max_context, tokenizer)
    counts = np.ones(lm.vocab_size)
    tokens = np.memmap(data / "train.bin", np.uint16, "r")
    for start in range(0, len(tokens), 2**24):
        counts += np.bincount(tokens[start : start + 2**24], minlength=lm.vocab_size)
    unigram = -np.log(counts / counts.sum())[ids[:, 1:].numpy()].mean()
    n_predicted = ids[:, 1:].numel()
    return {"model": convert.mean_loss(lm, ids), "unigram": float(unigram), "n_tokens": n_predicted}


def weights_size(folder: Path) -> int:
    """Bytes of the weights' file."""
    return (folder / "model.safetensors").stat().st_size


def commit_of(nanogpt: Path) -> str:
    """Of the checkout; "unknown" for a folder that is none."""
    git = ["git", "-C", str(nanogpt), "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


TOKENIZERS = {
    "gpt2": "GPT-2's, its vocabulary padded as nanoGPT does it (OpenAI, modified MIT licence)",
    "bpe": "a byte-level BPE, learnt on the training text",
}
SOURCE = "| {name} | {version} | {licence} | {documents:,} | {bytes:,} |"
CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, interpretability]
---
# A very small transformer

GPT-2's architecture with exact GELU: {n_layer} layers, width {n_embd}, {n_head} heads, MLPs of
width {n_mlp}, context {n_positions}, {vocab_size:,} tokens; float16, {size:.2f} MB of weights. So
small that its features can be enumerated: for research on sparse autoencoders, for nothing else.

| on {n_tokens:,} held-out tokens | nats a token |
|---|---|
| this model | **{model:.3f}** |
| token frequencies of the training text | {unigram:.3f} |

**Data.** {n_train:,} tokens; the model saw {n_seen:,}, {n_epochs:.3g} times the text.
{n_held_out:,} more are held out, chosen by a hash of each document's text. The text:

| package | version | licence | documents | bytes |
|---|---|---|---|---|
{sources}

**Tokenizer.** {tokenizer}.

**Training.** nanoGPT's train.py (commit {commit}), {versions}, by

```
{command}
```

**Use.** `run.py --model FOLDER --dataset pydoc`, or `AutoModelForCausalLM.from_pretrained`.

**Licence.** The weights were made by us and may be used as our code may (MIT). The texts are under
the licences above and are not part of this.
"""


def card(folder: Path, data: Path, sources: list[dict], losses: dict, made: dict) -> str:
    """README.md of the folder, as the Hugging Face Hub reads it.

    made: command, commit and n_seen, the tokens that the model saw
    """
    config = read_json(folder / "config.json", remedy="convert it again")
    manifest = read_bin_manifest(data)
    n_train = manifest["train"]["tokens"]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers")]
    return CARD.format(
        **config | losses | made,
        n_mlp=4 * config["n_embd"],
        size=weights_size(folder) / 1e6,
        n_train=n_train,
        n_held_out=manifest["val"]["tokens"],
        n_epochs=made["n_seen"] / n_train,
        sources="\n".join(SOURCE.format(**source) for source in sources),
        tokenizer=TOKENIZERS[manifest["constants"]["tokenizer"]],
        versions=", ".join(versions),
    )


if __name__ == "__main__":
    run_as_script(main)
