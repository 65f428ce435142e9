"""convert.py: a checkpoint becomes a folder that loads, and is measured; train.sh runs it all."""

import email
import gzip
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import convert
import numpy as np
import prepare
import pytest
import tiktoken
import torch
from builders.models import bin_manifest, nanogpt_state, save_checkpoint, small_gpt2, write_jsonl
from builders.scripts import ROOT, clean_environment

from sparse_coding.config import UserError
from sparse_coding.lm.nanogpt import load_nanogpt
from sparse_coding.lm.tokenizer import load_tokenizer


def write_checkpoint(path: Path, *, scale: float, vocab_size: int = 257, context: int = 16) -> None:
    """As nanoGPT's train.py saves it, with random weights of this size."""
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=context, bias=False, dropout=0.0)
    args["vocab_size"] = vocab_size
    save_checkpoint(path, args, nanogpt_state(args, scale=scale))


def write_data(folder: Path, texts: dict[str, bytes]) -> None:
    """Bins of bytes as prepare.py writes them."""
    for name, text in texts.items():
        np.array([*text, 256], np.uint16).tofile(folder / f"{name}.bin")
    bin_manifest(folder)


def test_a_checkpoint_becomes_a_folder_with_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "ckpt.pt", scale=0.5)
    folder = tmp_path / "model"
    argv = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--output-dir", str(folder)]
    ids = torch.arange(16)[None] * 7
    for dtype, tolerance in (("float32", 0.0), ("float16", 0.02)):
        assert convert.main([*argv, "--dtype", dtype]) == 0
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = load_nanogpt(tmp_path / "ckpt.pt")(ids).logits
        assert torch.allclose(loaded(ids).logits, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe"])
def test_the_converted_folder_has_the_tokenizer_of_the_bins(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tiktoken, "get_encoding", small_gpt2)
    texts = [f"{i} the thing <|endoftext|> ß €\n" for i in range(50)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    data, folder = tmp_path / "data", tmp_path / "model"
    argv = ["--source", source, "--tokenizer", kind, "--vocab-size", "260"]
    assert prepare.main([*argv, "--output-dir", str(data)]) == 0
    manifest = json.loads((data / "manifest.json").read_text())
    write_checkpoint(tmp_path / "ckpt.pt", scale=0.5, vocab_size=50304 if kind == "gpt2" else 260)
    argv = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(data), "--eval-tokens", "1000"]
    assert convert.main([*argv, "--output-dir", str(folder)]) == 0

    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(folder)
    assert (own.eos_token_id, own.eos_token) == (manifest["end_of_text"], "<|endoftext|>")
    assert own.decode(own("the ß €")["input_ids"]) == "the ß €"
    tokenizer = load_tokenizer(str(folder), vocab_size=50304 if kind == "gpt2" else 260)
    assert tokenizer.fingerprint == manifest["tokenizer"]["fingerprint"]


def test_a_model_that_knows_nothing_is_worth_eight_bits_and_its_mlps_nothing(tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt.pt", scale=0.0)  # all 257 tokens are equally likely
    text = b"aaab" * 500
    write_data(tmp_path, {"train": b"ab" * 1000, "val": text})
    convert.main(["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    # windows of 16 that overlap by one: 133 * 15 tokens are predicted of 2001, the first is not
    assert lines[0].startswith("on 1,995 held-out tokens of 1,995 bytes")
    figures = {line.rsplit("  ", 1)[0][:18].strip(): line for line in lines[1:]}
    assert f"{math.log2(257):.3f}" in figures["model"]
    assert f"{math.log(257):.3f} nats" in figures["model"]
    gzip_bits = 8 * len(gzip.compress(text[1:1996], 9)) / 1995
    assert f"{gzip_bits:.3f}" in figures["gzip -9"]
    # 997 a and 998 b in training and one more of each of 256 bytes; here 1 496 a and 499 b
    bits = -(1496 * math.log2(998 / 2251) + 499 * math.log2(999 / 2251)) / 1995
    assert f"{bits:.3f}" in figures["byte unigrams"]
    assert [line.split() for line in lines[-2:]] == [
        ["0", "0.000", "0.000"],
        ["1", "0.000", "0.000"],
    ]


def test_what_an_mlp_is_worth_is_the_loss_without_its_activations(tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt.pt", scale=1.0)
    text = bytes(range(32, 127)) * 20
    write_data(tmp_path, {"train": text, "val": text})
    convert.main(["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(tmp_path)])
    zero = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()[-2:]]

    ids = torch.tensor(list(text))[: 126 * 15 + 1].unfold(0, 16, 15)
    model = load_nanogpt(tmp_path / "ckpt.pt")
    with torch.no_grad():
        clean = model(ids, labels=ids).loss
        for layer in (0, 1):
            without = load_nanogpt(tmp_path / "ckpt.pt")
            without.transformer.h[layer].mlp.c_proj.weight.zero_()  # biases are 0: nothing is left
            lost = float(without(ids, labels=ids).loss - clean)
            assert zero[layer] == pytest.approx(lost, abs=1e-3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "val.bin").unlink(), r"val\.bin is missing"),
        (lambda data: (data / "val.bin").write_bytes(b"\xff" * 200), r"val\.bin is damaged"),
        (lambda data: (data / "train.bin").write_bytes(b"\0\1" * 99), r"train\.bin is damaged"),
        (lambda data: bin_manifest(data, vocab_size=300), "has 300 ids, the model 257"),
        (
            lambda data: bin_manifest(data, constants={"tokenizer": "x"}),
            r"json: tokenizer x is not of prep",
        ),
        (lambda data: bin_manifest(data, constants={"tokenizer": "bpe"}), "no tokenizer .*json"),
    ],
    ids=range(6),
)
def test_data_that_are_damaged_are_one_line(tmp_path, damage, message):
    write_checkpoint(tmp_path / "ckpt.pt", scale=0.5)
    write_data(tmp_path, {"train": b"some text of bytes" * 5, "val": b"other text of bytes" * 5})
    damage(tmp_path)
    argv = ["--checkpoint", str(tmp_path / "ckpt.pt"), "--data", str(tmp_path)]
    for more in ([], ["--output-dir", str(tmp_path / "model")]):
        with pytest.raises(UserError, match=message):
            convert.main([*argv, *more])


def test_convert_refuses_what_is_no_checkpoint_or_no_data(tmp_path):
    (tmp_path / "ckpt.pt").write_text("no checkpoint")
    for argv, reason in (
        (["--checkpoint", str(tmp_path / "no.pt"), "--output-dir", str(tmp_path)], "no such file"),
        (["--checkpoint", str(tmp_path / "ckpt.pt"), "--output-dir", str(tmp_path)], "nanoGPT"),
        (["--data", str(tmp_path)], "has no manifest.json: give a folder of prepare.py"),
    ):
        with pytest.raises(UserError, match=reason):
            convert.main(argv)


# --- train.sh ---

SMALL_LIBRARY = f"""
import sysconfig
paths = sysconfig.get_paths() | {{"stdlib": {str(Path(email.__file__).parent)!r}}}
sysconfig.get_paths = lambda *_, **__: paths
"""
TRAIN_PY = """
import pathlib, shutil, sys
out = next(pathlib.Path(a.removeprefix("--out_dir=")) for a in sys.argv if "--out_dir=" in a)
out.mkdir(parents=True, exist_ok=True)
with open(out / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
shutil.copy("ckpt.pt", out)
if not (out / "once").exists():
    (out / "once").touch()
    sys.exit("killed after an evaluation")
"""


@pytest.mark.long
def test_train_sh_prepares_trains_resumes_and_leaves_a_checkpoint_that_opens(tmp_path):
    """With a train.py that only notes how it is called: nanoGPT is not part of the project. Of the
    standard library one package is read: all of it would take 20 to 30 s more."""
    shutil.copytree(ROOT / "nanogpt_config", tmp_path / "ours" / "nanogpt_config")
    (tmp_path / "ours" / "sparse_coding").symlink_to(ROOT / "sparse_coding")
    nanogpt = tmp_path / "nanoGPT"
    nanogpt.mkdir()
    (nanogpt / "train.py").write_text(TRAIN_PY)
    write_checkpoint(nanogpt / "ckpt.pt", scale=0.1, vocab_size=1024, context=128)
    command = ["bash", "ours/nanogpt_config/train.sh", "demo_cpu", "--eval_iters=7"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SMALL_LIBRARY)  # run as Python starts
    settings = {"PY": sys.executable, "NANOGPT": "nanoGPT", "PYTHONPATH": str(tmp_path / "site")}

    def run() -> subprocess.CompletedProcess:
        environment = clean_environment(tmp_path) | settings
        options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
        return subprocess.run(command, **options)

    killed = run()
    assert killed.returncode == 1
    assert "killed after an evaluation" in killed.stderr
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "done before: " in done.stdout  # the text, by prepare.py
    assert "model: 2 layers, width 64, 2 heads, context 128, vocabulary 1,024" in done.stdout
    assert "what each layer's MLP is worth" in done.stdout
    out = tmp_path / "ours" / "models" / "demo_cpu"
    data = tmp_path / "ours" / "data" / "stdlib-bpe"
    first, second = (out / "run" / "calls").read_text().splitlines()
    overrides = tmp_path / "ours" / "nanogpt_config" / "demo_cpu.py"
    assert first == f"{overrides} --dataset={data} --out_dir={out}/run --eval_iters=7"
    assert second == first + " --init_from=resume"
    tokenizer = load_tokenizer(str(out / "ckpt.pt"), vocab_size=1024)  # with no other file
    manifest = json.loads((data / "manifest.json").read_text())
    assert tokenizer.fingerprint == manifest["tokenizer"]["fingerprint"]
    again = run()
    assert again.stdout.startswith("done before: models/demo_cpu/ckpt.pt")
    assert len((out / "run" / "calls").read_text().splitlines()) == 2
