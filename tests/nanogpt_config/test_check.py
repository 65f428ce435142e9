"""check.py and the override files: nanoGPT's keys and types; what it would stop at is refused."""

import json
import os
from pathlib import Path

import check
import pytest
import torch
from builders.models import bin_manifest
from builders.scripts import ROOT

from sparse_coding.config import UserError

OVERRIDES = ("demo_cpu", "supertiny", "supertiny_2023")


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_file_has_keys_and_types_of_nanogpt(name):
    values = check.read_overrides(check.find(name))  # refuses other keys and types
    assert len(values) >= 15
    assert values["n_embd"] % values["n_head"] == 0
    assert values["lr_decay_iters"] == values["max_iters"]
    assert values["max_iters"] % values["eval_interval"] == 0  # else the last steps are not saved


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_the_list_of_keys_is_that_of_the_real_nanogpt():
    """NANOGPT=folder, a checkout of karpathy/nanoGPT."""
    source = (Path(os.environ["NANOGPT"]) / "train.py").read_text()
    start, end = source.index("out_dir ="), source.index("config_keys =")
    values = {"torch": torch}
    exec(source[start:end], values)
    theirs = {k: v for k, v in values.items() if isinstance(v, (int, float, bool, str))}
    theirs["dtype"] = "bfloat16"  # it depends on the machine
    assert theirs == check.NANOGPT


@pytest.mark.parametrize("name", ["supertiny", "supertiny_2023"])
def test_the_very_small_transformer_is_the_published_one(name):
    values = check.read_overrides(check.find(name))
    shape = {k: values[k] for k in ("n_layer", "n_embd", "n_head", "block_size", "batch_size")}
    assert shape == dict(n_layer=6, n_embd=16, n_head=8, block_size=256, batch_size=64)
    assert values["wandb_project"] == "sparsecode"
    assert values["wandb_run_name"].startswith("supertiny-")
    assert values["dropout"] == (0.2 if name == "supertiny_2023" else 0.0)
    for gpus in (1, 2, 4, 8):  # nanoGPT asserts it, and divides: the tokens of a step stay
        assert values["gradient_accumulation_steps"] % gpus == 0


def test_the_small_transformer_has_the_sizes_that_its_comments_count_with():
    values = check.NANOGPT | check.read_overrides(check.find("supertiny"))
    manifest = {"constants": {"tokenizer": "gpt2"}, "vocab_size": 50_257}
    manifest |= {split: {"tokens": 500_000_000} for split in ("train", "val")}
    lines = check.summary(values, manifest)
    assert "vocabulary 50,304: 827,600 weights, 18,640 of them in the layers" in lines
    assert "8,000 steps of 131,072 tokens = 1,049M tokens, 2.1 times the text" in lines
    assert "logits take 9.9 GB" in lines
    check.check(values, manifest, gpus=8)


def test_the_demo_model_has_the_settings_that_its_comments_count_with():
    demo = check.NANOGPT | check.read_overrides(check.find("demo_cpu"))
    manifest = {"constants": {"tokenizer": "bpe"}, "vocab_size": 1024}
    manifest |= {split: {"tokens": 4_385_132} for split in ("train", "val")}
    lines = check.summary(demo, manifest)
    assert "172,352 weights" in lines
    assert "9,000 steps of 1,536 tokens = 14M tokens, 3.2 times the text" in lines
    config = json.loads((ROOT / "assets" / "demo" / "config.json").read_text())
    for theirs, ours in (("n_positions", "block_size"), ("n_layer",) * 2, ("n_embd",) * 2):
        assert config[theirs] == demo[ours]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--overrides tiny", "no overrides tiny: choose demo_cpu, supertiny, supertiny_2023"),
        ("--gpus 3", "3 GPUs must divide gradient_accumulation_steps=8"),
        ("--gpus 2 -- --device=cpu", "torchrun on CUDA only"),
        ("-- --dropout=0", "dropout must be float, 0 is int: write 0.0"),
        ("-- --drop_out=0.1", "nanoGPT has no drop_out; it has out_dir"),
        ("-- --compile=0", "compile must be bool, 0 is int"),
        ("-- --out_dir=a=b", "an option of train.py is --name=value, with no other ="),
        ("-- --n_head=3", "n_head=3 must divide n_embd=16"),
        ("-- --n_head=0", "n_head=0 must be at least 1"),
        ("-- --max_iters=250", "max_iters=250 must be a multiple of eval_interval=500"),
        ("--overrides {tmp}/bad.py", "bad.py: nanoGPT has no n_heads; it has"),
        ("--overrides {tmp}/torn.py", "torn.py fails: SyntaxError"),
        ("-- --device=cuda --dataset=none", "1 CUDA GPUs are asked for, torch sees 0: on a CPU"),
        ("-- --dataset={tmp}", r"val\.bin has 100 tokens, a block 256: give more text, or"),
    ],
)
def test_settings_with_which_nanogpt_would_stop_are_refused(tmp_path, monkeypatch, argv, reason):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "bad.py").write_text("n_heads = 8\n")
    (tmp_path / "torn.py").write_text("n_head = \n")
    val = {"documents": 1, "tokens": 100, "bytes": 99, "sha256": "0" * 64}
    bin_manifest(tmp_path, val=val)
    with pytest.raises(UserError, match=reason):
        check.main(argv.format(tmp=tmp_path).split())
