"""What gpu_day.py trains on where nothing better is at hand: a random language model of the shape
of SmolLM2-135M, and SynthSAEBench's world made on a GPU.

    python benchmarks/stand_ins.py --model FOLDER
    python benchmarks/stand_ins.py --world FILE.npz --device cuda

The model has the demo's tokenizer, its weights are as transformers starts them. The world's law is
that of `--preset synth16k`, which draws it on the CPU in minutes, the same on all machines; here
features are made orthogonal where --device says, in seconds, so last digits are the device's.
"""

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from replicate_toy_models import PRESETS
from sparse_coding.config import parse_flags, require, run_as_script
from sparse_coding.sweep.hardware import pick_device
from sparse_coding.toy.synth_world import make_synth_world, orthogonalised, write_world

DEMO = Path(__file__).parent.parent / "assets" / "demo"
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json
SMOLLM2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
               num_attention_heads=9, num_key_value_heads=3, vocab_size=49_152,
               max_position_embeddings=8192, tie_word_embeddings=True)  # fmt: skip
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=2048)  # fmt: skip
SYNTH = PRESETS["synth16k"]


@dataclass(frozen=True)
class Config:
    model: str = ""  # a folder to write a model to
    world: str = ""  # an npz to write a world to
    tiny: bool = False  # small ones, for tests
    device: str = "auto"  # that makes the world
    seed: int = 42


def write_model(folder: Path, *, tiny: bool, seed: int) -> None:
    """A random model in float32, with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2 | (TINY if tiny else {}))).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def make_world(path: Path, *, tiny: bool, seed: int, device: torch.device) -> None:
    """A world whose features are made orthogonal on the device."""
    n, width = (256, 32) if tiny else (SYNTH["n_true_features"], SYNTH["activation_dim"])
    world = make_synth_world(n, width, seed, n_steps=0)
    features = orthogonalised(world.features.to(device)).cpu()
    write_world(dataclasses.replace(world, features=features), path)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config(), argv, description=__doc__.split("\n\n")[0])
    require(bool(cfg.model or cfg.world), "nothing to do: give --model or --world")
    if cfg.model:
        write_model(Path(cfg.model), tiny=cfg.tiny, seed=cfg.seed)
    if cfg.world:
        device = pick_device(cfg.device)
        make_world(Path(cfg.world), tiny=cfg.tiny, seed=cfg.seed, device=device)
    return 0


if __name__ == "__main__":
    run_as_script(main)
