"""Checks overrides of nanoGPT's train.py before it runs, and prints what they come to.

    python nanogpt_config/check.py --overrides supertiny --gpus 4 -- --batch_size=32

What stands after -- are options of train.py; the data are those of dataset, a folder of prepare.py,
which is looked for in data/ here as nanoGPT does there. nanoGPT itself takes a misspelt name in a
file without a word, and stops on other mistakes with a bare AssertionError.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any directory

import torch

from sparse_coding.config import UserError, parse_flags, require, require_flag, run_as_script
from sparse_coding.lm.tokenizer import read_bin_manifest

DESCRIPTION = __doc__.split("\n\n")[0]
HERE = Path(__file__).resolve().parent
# other files here are overrides
NO_OVERRIDES = {"prepare", "bin_writer", "corpus", "convert", "check", "train_supertiny"}
# defaults of nanoGPT's train.py at commit 3adf61e1 (2025-11-12): all keys that may be overridden
NANOGPT = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200,
    "eval_only": False, "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False,
    "wandb_project": "owt", "wandb_run_name": "gpt2", "dataset": "openwebtext",
    "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024, "n_layer": 12,
    "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4,
    "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5,
    "backend": "nccl", "device": "cuda", "dtype": "bfloat16", "compile": True,
}  # fmt: skip
PADDED_GPT2 = 50_304  # nanoGPT's vocabulary without a meta.pkl: GPT-2's 50,257 up to a round number


@dataclass(frozen=True)
class Config:
    """The constants: each is a flag."""

    overrides: str = "supertiny"  # a file of this folder (without .py), or the path of one of yours
    gpus: int = 1  # processes of torchrun


def main(argv: list[str]) -> int:
    """Runs the command line `argv`; the exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    cfg = parse_flags(Config(), argv[:cut], description=DESCRIPTION)
    require_flag(cfg, "gpus", cfg.gpus >= 1, "at least 1")
    values = NANOGPT | read_overrides(find(cfg.overrides)) | read_options(argv[cut + 1 :])
    data = Path("data", values["dataset"])
    manifest = read_bin_manifest(data)
    check(values, manifest, gpus=cfg.gpus)
    print(summary(values, manifest) if manifest else f"no text in {data} yet")
    n_seen = torch.cuda.device_count()
    require(
        not values["device"].startswith("cuda") or n_seen >= cfg.gpus,
        f"{cfg.gpus} CUDA GPUs are asked for, torch sees {n_seen}: on a CPU add --device=cpu "
        "--compile=False (supertiny then takes days)",
    )
    return 0


def find(overrides: str) -> Path:
    """The file of these overrides. Raises UserError if there is none."""
    ours = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NO_OVERRIDES)
    path = HERE / f"{overrides}.py" if overrides in ours else Path(overrides)
    require(
        path.is_file(), f"no overrides {overrides}: choose {', '.join(ours)} or a file of yours"
    )
    return path


def read_overrides(path: Path) -> dict:
    """What the file assigns, run as nanoGPT's configurator runs it.

    Raises:
        UserError: a name that nanoGPT lacks, or a value of another type.
    """
    values: dict = {}
    try:
        exec(compile(path.read_text(), path, "exec"), values)
    except Exception as error:
        raise UserError(f"{path} fails: {type(error).__name__}: {error}") from None
    plain = (int, float, bool, str)
    values = {k: v for k, v in values.items() if k[0] != "_" and isinstance(v, plain)}
    for name, value in values.items():
        check_value(name, value, where=str(path))
    return values


def read_options(options: list[str]) -> dict:
    """--key=value as nanoGPT reads it. Raises UserError as read_overrides."""
    values = {}
    for option in options:
        name, equals, text = option.removeprefix("--").partition("=")
        good = option.startswith("--") and equals and "=" not in text
        require(good, f"{option}: an option of train.py is --name=value, with no other =")
        try:
            values[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            values[name] = text
        check_value(name, values[name], where=option)
    return values


def check_value(name: str, value: int | float | bool | str, *, where: str) -> None:
    """Raises UserError for a name that nanoGPT lacks, or a value of another type."""
    require(name in NANOGPT, f"{where}: nanoGPT has no {name}; it has {', '.join(NANOGPT)}")
    kind, wanted = type(value).__name__, type(NANOGPT[name]).__name__
    dot = f": write {value}.0" if (kind, wanted) == ("int", "float") else ""
    require(kind == wanted, f"{where}: {name} must be {wanted}, {value!r} is {kind}{dot}")


def check(values: dict, manifest: dict, *, gpus: int) -> None:
    """Raises UserError for settings with which train.py would stop, or lose its last steps."""
    v = values
    for name in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "eval_interval"):
        require(v[name] >= 1, f"{name}={v[name]} must be at least 1")
    divides = v["n_embd"] % v["n_head"] == 0
    require(divides, f"n_head={v['n_head']} must divide n_embd={v['n_embd']}")
    require(
        v["gradient_accumulation_steps"] % gpus == 0,
        f"{gpus} GPUs must divide gradient_accumulation_steps={v['gradient_accumulation_steps']}",
    )
    require(gpus == 1 or v["device"] != "cpu", "nanoGPT runs torchrun on CUDA only: --gpus 1")
    require(
        v["max_iters"] % v["eval_interval"] == 0,
        f"max_iters={v['max_iters']} must be a multiple of eval_interval={v['eval_interval']}: "
        "checkpoints are written at evaluations only",
    )
    for split in ("train", "val") if manifest else ():
        n_tokens = manifest[split]["tokens"]
        require(
            n_tokens > v["block_size"],
            f"{split}.bin has {n_tokens} tokens, a block {v['block_size']}: give more text, or "
            "--block_size",
        )


def summary(values: dict, manifest: dict) -> str:
    """Weights, tokens and memory, in lines."""
    v = values
    is_gpt2 = manifest["constants"]["tokenizer"] == "gpt2"
    vocabulary = PADDED_GPT2 if is_gpt2 else manifest["vocab_size"]
    width, context = v["n_embd"], v["block_size"]
    blocks = v["n_layer"] * (12 * width**2 + 2 * width) + width  # matrices and norms, no biases
    per_step = v["gradient_accumulation_steps"] * v["batch_size"] * context
    total = per_step * v["max_iters"]
    n_epochs = total / manifest["train"]["tokens"]
    logits = v["batch_size"] * context * vocabulary * 12  # bytes: twice in bfloat16, in float32
    return (
        f"model: {v['n_layer']} layers, width {width}, {v['n_head']} heads, context {context}, "
        f"vocabulary {vocabulary:,}: {vocabulary * width + context * width + blocks:,} weights, "
        f"{blocks:,} of them in the layers\n"
        f"training: {v['max_iters']:,} steps of {per_step:,} tokens = {total / 1e6:,.0f}M tokens, "
        f"{n_epochs:.1f} times the text; logits take {logits / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    run_as_script(main)
