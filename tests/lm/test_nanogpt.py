"""nanoGPT checkpoints: the logits of an independent, plain model; what is refused."""

import os
import pickle
import time
import tracemalloc

import pytest
import torch
from builders.models import ARGS, Bomb, deflated, nanogpt_logits, nanogpt_state, save_checkpoint
from torch import nn

from sparse_coding.config import UserError
from sparse_coding.lm.nanogpt import load_nanogpt


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab_size", [65, 500])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_logits_are_those_of_a_plain_nanogpt(tmp_path, bias, vocab_size, prefix):
    args = ARGS | {"bias": bias, "vocab_size": vocab_size}
    state = nanogpt_state(args)
    stored = {prefix + name: weight for name, weight in state.items()}
    path = save_checkpoint(tmp_path / "ckpt.pt", args, stored)
    ids = torch.randint(vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))

    model = load_nanogpt(path)
    with torch.no_grad():
        got = model(ids).logits

    expected = nanogpt_logits(state, args, ids)
    assert expected.std() > 0.5  # else nothing would show
    assert (got - expected).abs().max() < 1e-5
    assert (got - nanogpt_logits(state, args, ids, nn.GELU("tanh"))).abs().max() > 1e-4


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
@pytest.mark.parametrize("how", ["fresh", "trained", "compiled"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab_size", [65, 50304])
def test_logits_are_those_of_the_real_nanogpt(tmp_path, monkeypatch, how, bias, vocab_size):
    """NANOGPT=folder, a checkout of karpathy/nanoGPT."""
    monkeypatch.syspath_prepend(os.environ["NANOGPT"])
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    args = dict(n_layer=6, n_head=8, n_embd=16, block_size=256, bias=bias, vocab_size=vocab_size,
                dropout=0.0)  # fmt: skip
    gpt = GPT(GPTConfig(**args))
    ids = torch.randint(vocab_size, (2, 257))
    x, y = ids[:, :-1], ids[:, 1:].contiguous()
    if how != "fresh":
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.03)
        for _ in range(20):
            gpt(x, y)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    stored = (torch.compile(gpt) if how == "compiled" else gpt).state_dict()
    assert next(iter(stored)).startswith("_orig_mod.") == (how == "compiled")
    model = load_nanogpt(save_checkpoint(tmp_path / "ckpt.pt", args, stored))
    with torch.no_grad():
        expected, _ = gpt.eval()(x, y)
        got = model(x).logits
    assert how == "fresh" or expected.std() > 0.5
    assert (got - expected).abs().max() < 1e-5


def test_the_tanh_gelu_of_early_checkpoints_can_be_had(tmp_path):
    path = save_checkpoint(tmp_path / "ckpt.pt")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        got = load_nanogpt(path, activation="gelu_new")(ids).logits
    tanh = nanogpt_logits(nanogpt_state(ARGS), ARGS, ids, nn.GELU("tanh"))
    assert (got - tanh).abs().max() < 1e-5
    with pytest.raises(UserError, match="relu must be one of gelu, gelu_new"):
        load_nanogpt(path, activation="relu")


def test_masks_of_old_checkpoints_are_dropped_but_no_bias(tmp_path):
    args = ARGS | {"bias": True}
    state = nanogpt_state(args)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    ids = torch.arange(24)[None]
    with torch.no_grad():
        got = load_nanogpt(save_checkpoint(tmp_path / "ckpt.pt", args, state | masks))(ids).logits
    assert (got - nanogpt_logits(state, args, ids)).abs().max() < 1e-5


def test_model_args_of_the_first_months_and_half_precision_weights_load(tmp_path):
    args = {k: v for k, v in ARGS.items() if k not in ("bias", "dropout")}
    half = {name: w.half() for name, w in nanogpt_state(ARGS).items()}
    model = load_nanogpt(save_checkpoint(tmp_path / "ckpt.pt", args, half))
    assert model.dtype == torch.float32
    assert not model.training
    assert (model.config.n_positions, model.config.bos_token_id) == (24, None)
    stored = half["transformer.h.0.mlp.c_fc.weight"].T
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, stored.float())


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        load_nanogpt(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1, -30])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = save_checkpoint(tmp_path / "ckpt.pt")
    path.write_bytes(path.read_bytes()[:size])
    assert "no file of torch.save, or truncated" in refusal(path)


@pytest.mark.parametrize("content", [b"hello world\n" * 9, b"\x80\x02.", b"PK\x03\x04" * 9])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    assert "no file of torch.save, or truncated" in refusal(path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path, target = tmp_path / "ckpt.pt", tmp_path / "exploded"
    save_checkpoint(path, config=Bomb(target))
    assert "mkdir" in refusal(path)
    assert "could run code" in refusal(path)
    torch.save({"a": Bomb(target)}, path, _use_new_zipfile_serialization=False)
    refusal(path)
    path.write_bytes(pickle.dumps(Bomb(target)))
    refusal(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # it was a live one


def test_flipped_bytes_are_refused_or_load_but_never_end_in_a_traceback(tmp_path):
    whole = bytearray(save_checkpoint(tmp_path / "whole.pt").read_bytes())
    path, rng = tmp_path / "ckpt.pt", torch.Generator().manual_seed(0)
    n_refused = 0
    for at in torch.randint(200, 3000, (150,), generator=rng).tolist():  # the pickle is in front
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            load_nanogpt(path)
        except UserError:
            n_refused += 1
    assert n_refused > 20


def test_other_checkpoints_of_torch_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    for other in ([1, 2], {"state_dict": {}}, {"model": [], "model_args": {}}, torch.zeros(3)):
        torch.save(other, path)
        assert "must be a dict with `model` and `model_args`" in refusal(path)
    assert "must hold tensors by name" in refusal(save_checkpoint(path, state={"a": 1}))
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "no such file" in refusal(tmp_path)  # a folder


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    state = nanogpt_state(ARGS) | {"zeros": torch.zeros(2**26)}  # 256 MB, a millionth of it packed
    plain = save_checkpoint(tmp_path / "plain.pt", state=state)
    bomb = deflated(plain, tmp_path / "ckpt.pt")
    plain.unlink()
    assert bomb.stat().st_size < 2**21
    tracemalloc.start()
    assert "is compressed, which torch.save does not do" in refusal(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_layers_and_sizes_that_the_file_does_not_have_are_refused_at_once(tmp_path):
    state, path = nanogpt_state(ARGS), tmp_path / "ckpt.pt"
    for change, message in (
        ({"n_layer": 10**6}, "model_args['n_layer'] is 1000000, `model` has 2 layers"),
        ({"n_layer": 10**30}, "model_args['n_layer'] is huge, not a size"),
        ({"vocab_size": 10**9}, "wte.weight is [65, 16], which does not give"),
        ({"n_embd": 10**8}, "which does not give GPT-2's [65, 100000000]"),
        ({"block_size": 10**9}, "wpe.weight is [24, 16]"),
    ):
        start = time.monotonic()
        assert message in refusal(save_checkpoint(path, ARGS | change, state))
        assert time.monotonic() - start < 10
    wide = torch.zeros(1, 1).expand(10**6, 10**6)  # 4 TB of one number
    args = ARGS | {"vocab_size": 10**6, "n_embd": 10**6}
    large = state | {"transformer.wte.weight": wide, "lm_head.weight": wide}
    assert "more than the file" in refusal(save_checkpoint(path, args, large))


def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path):
    name, path = "transformer.ln_f.weight", tmp_path / "ckpt.pt"
    weight = nanogpt_state(ARGS)[name]
    for other in (
        weight.to_sparse(),
        weight.to("meta"),
        weight.int(),
        weight.to(torch.complex64),
        torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    ):
        told = refusal(save_checkpoint(path, state=nanogpt_state(ARGS) | {name: other}))
        assert f"{name} is a" in told or "could run code" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": None}, "model_args['n_embd'] is None, not a size"),
        ({"n_layer": 2.0}, "model_args['n_layer'] is 2.0, not a size"),
        ({"n_head": 5}, "n_head=5 must divide n_embd=16"),
        ({"n_layer": 3}, "lacks 6 tensors, as ['transformer.h.2."),
        ({"n_layer": 1}, "has 6 tensors that GPT-2 has not, as ['transformer.h.1."),
        ({"block_size": 48}, "transformer.wpe.weight is [24, 16], which does not give"),
        ({"vocab_size": 64}, "wte.weight is [65, 16], which does not give GPT-2's [64, 16]"),
    ],
)
def test_model_args_that_disagree_with_the_weights_are_refused(tmp_path, change, message):
    path = save_checkpoint(tmp_path / "ckpt.pt", ARGS | change, nanogpt_state(ARGS))
    assert message in refusal(path)


def test_weights_that_are_not_nanogpts_are_refused(tmp_path):
    path, state = tmp_path / "ckpt.pt", nanogpt_state(ARGS)
    no_matrix = {k: w for k, w in state.items() if k != "transformer.h.1.mlp.c_fc.weight"}
    assert "lacks 1 tensors, as ['transformer.h.1.mlp.c_fc.weight']" in refusal(
        save_checkpoint(path, state=no_matrix)
    )
    assert "has 1 tensors" in refusal(
        save_checkpoint(path, state=state | {"rotary": torch.ones(2)})
    )
    untied = state | {"lm_head.weight": state["lm_head.weight"] + 1}
    assert "lm_head.weight of its own" in refusal(save_checkpoint(path, state=untied))
    flat = state | {"transformer.h.0.mlp.c_fc.weight": torch.ones(64 * 16)}
    assert "is [1024]" in refusal(save_checkpoint(path, state=flat))
    one_bias = state | {"transformer.ln_f.bias": torch.ones(16)}  # nanoGPT has all or none
    assert "lacks 12 tensors" in refusal(save_checkpoint(path, state=one_bias))
