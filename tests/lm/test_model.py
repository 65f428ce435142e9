"""Language models of ten families: sites against independent hooks, splicing, losses, loading."""

import copy
import json
import logging
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders.models import (
    ARGS,
    CONFIGS,
    N_LAYERS,
    PATHS,
    VOCAB,
    WIDTH,
    Bomb,
    D,
    deflated,
    hooked,
    nanogpt_logits,
    nanogpt_state,
    random_model,
    save_checkpoint,
)
from huggingface_hub import errors, get_session
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, BertConfig
from transformers.utils.logging import enable_progress_bar

from sparse_coding.config import UserError
from sparse_coding.lm.model import (
    SITES,
    LanguageModel,
    activations,
    direct_logits,
    find_site,
    hub_commit,
    load_language_model,
    logits,
    next_token_loss,
)

CONTEXT = 12
IDS = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
MODELS = list(CONFIGS)


def load(path: Path, **options) -> LanguageModel:
    """The model of a folder or file, on the CPU."""
    return load_language_model(str(path), device=torch.device("cpu"), **options)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One saved model of each family, and one more GPT-2 of another seed."""
    root = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        random_model(kind).save_pretrained(root / kind)
    random_model("gpt2", seed=1).save_pretrained(root / "other")
    return root


@pytest.fixture(scope="session")
def models(folders):
    return {k: load(folders / k) for k in MODELS}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
def test_activations_equal_those_of_an_independent_hook(models, kind, layer):
    lm = models[kind]
    for name in SITES:
        site = find_site(lm, layer, name)
        got = activations(lm, site, IDS)
        expected, _ = hooked(lm.model, kind, layer, name, IDS)
        assert got.shape == (2, CONTEXT, site.width)
        assert (got - expected).abs().max() < 1e-5, name
        assert got.std() > 1e-2, name
    assert find_site(lm, layer, "mlp_act").width == WIDTH
    heads_width = 24 if kind == "gemma2" else D  # 2 heads of 12
    assert find_site(lm, layer, "attn_concat").width == heads_width


@pytest.mark.parametrize("kind", MODELS)
def test_the_residual_stream_is_transformers_hidden_state_but_for_the_last_layer(models, kind):
    lm = models[kind]
    with torch.no_grad():
        states = lm.model(IDS, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):
        got = activations(lm, find_site(lm, layer, "resid_post"), IDS)
        assert (got - states[layer + 1]).abs().max() < 1e-5
    last = activations(lm, find_site(lm, N_LAYERS - 1, "resid_post"), IDS)
    assert (last - states[-1]).abs().max() > 0.1  # which is after the final norm
    norm = lm.model.get_submodule(PATHS[kind][-1])
    with torch.no_grad():
        assert (norm(last) - states[-1]).abs().max() < 1e-5


def test_a_gated_mlps_activation_is_gate_times_up(models):
    lm = models["llama"]
    layer = lm.model.model.layers[1]
    before = activations(lm, find_site(lm, 0, "resid_post"), IDS)
    with torch.no_grad():
        attended = (
            before
            + layer.self_attn(
                layer.input_layernorm(before),
                position_embeddings=lm.model.model.rotary_emb(before, torch.arange(CONTEXT)[None]),
                attention_mask=None,
            )[0]
        )
        x = layer.post_attention_layernorm(attended)
        gate, up = layer.mlp.gate_proj(x), layer.mlp.up_proj(x)
    by_hand = gate * torch.sigmoid(gate) * up
    got = activations(lm, find_site(lm, 1, "mlp_act"), IDS)
    assert (got - by_hand).abs().max() < 1e-5


def site_is_before_down(name: str) -> bool:
    """Whether the MLP's down projection comes after the site."""
    return name in ("mlp_in", "mlp_act", "attn_concat")


@pytest.mark.parametrize("kind", MODELS)
def test_the_mlps_input_stands_behind_the_norm_and_gives_its_output(models, kind):
    """What the MLP, or OPT's two projections, make of it is the activation at mlp_out."""
    lm = models[kind]
    block = lm.model.get_submodule(f"{PATHS[kind][0]}.1")
    x, y = (activations(lm, find_site(lm, 1, name), IDS) for name in ("mlp_in", "mlp_out"))
    with torch.no_grad():
        opt = kind == "opt"
        made = block.fc2(block.activation_fn(block.fc1(x))) if opt else block.mlp(x)
    assert (made - y).abs().max() < 1e-4 * y.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_a_site_and_its_target_come_from_one_pass(models, kind):
    lm, passes = models[kind], []
    handle = lm.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    site, target = (find_site(lm, 1, name) for name in ("mlp_in", "mlp_out"))
    got = activations(lm, replace(site, target=target), IDS)
    assert len(passes) == 1
    assert got.shape == (2, CONTEXT, 2 * D)
    expected = [activations(lm, one, IDS) for one in (site, target)]
    assert torch.equal(got, torch.cat(expected, dim=-1))
    handle.remove()


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_after_the_site_is_computed(models, kind):
    lm = models[kind]
    layers, down, *_ = PATHS[kind]
    run = []
    later = [f"{layers}.1.{down}", f"{layers}.2"]
    handles = [
        lm.model.get_submodule(path).register_forward_hook(lambda *_, p=path: run.append(p))
        for path in later
    ]
    head = lm.model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(lambda *_: run.append("head")))
    for name in SITES:
        activations(lm, find_site(lm, 1, name), IDS)
        assert run == ([] if site_is_before_down(name) else later[:1]), name
        run.clear()
    activations(lm, find_site(lm, N_LAYERS - 1, "resid_post"), IDS)
    assert "head" not in run
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", MODELS)
def test_replacing_by_the_same_leaves_the_logits_bit_for_bit(models, kind):
    lm = models[kind]
    with torch.no_grad():
        expected = lm.model(IDS).logits
    assert torch.equal(logits(lm, IDS), expected)
    for name in SITES:
        site = find_site(lm, 1, name)
        seen = []
        got = logits(lm, IDS, site=site, replace=lambda x, s=seen: s.append(x) or x.clone())
        assert torch.equal(got, expected), name
        assert torch.equal(seen[0], activations(lm, site, IDS)), name
    assert torch.equal(logits(lm, IDS), expected)  # no hook is left behind


@pytest.mark.parametrize("kind", MODELS)
def test_replacing_by_zeros_equals_zeroing_in_an_independent_hook(models, kind):
    lm = models[kind]
    clean = logits(lm, IDS)
    for name in SITES:
        _, expected = hooked(lm.model, kind, 1, name, IDS, new=torch.zeros_like)
        got = logits(lm, IDS, site=find_site(lm, 1, name), replace=torch.zeros_like)
        assert torch.equal(got, expected), name
        assert (got - clean).abs().max() > 1e-2, name


def centred_gpt2(model):
    """center_writing_weights of TransformerLens, on the weights of a GPT-2."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # tied otherwise
    h = model.transformer.h
    for weight in (model.transformer.wte.weight, model.transformer.wpe.weight):
        weight.data -= weight.mean(dim=1, keepdim=True)
    for projection in (p for block in h for p in (block.attn.c_proj, block.mlp.c_proj)):
        projection.weight.data -= projection.weight.mean(dim=1, keepdim=True)  # (in, out)
        projection.bias.data -= projection.bias.mean()
    return model


@pytest.mark.parametrize("site", SITES)
def test_a_centred_site_is_that_of_a_model_with_centred_writing_weights(models, site):
    lm, ids = models["gpt2"], IDS
    theirs = centred_gpt2(lm.model)
    ours = find_site(lm, 1, site, centred=True)
    shift = torch.randn(ours.width, generator=torch.Generator().manual_seed(0))
    x, logits_there = hooked(theirs, "gpt2", 1, site, ids, new=lambda x: 0.5 * x + shift)
    torch.testing.assert_close(activations(lm, ours, ids), x, atol=2e-5, rtol=1e-4)
    spliced = logits(lm, ids, site=ours, replace=lambda x: 0.5 * x + shift)
    torch.testing.assert_close(spliced, logits_there, atol=1e-3, rtol=1e-3)
    plain = activations(lm, find_site(lm, 1, site), ids)
    writes = site in ("mlp_out", "resid_post")
    assert ((plain - x).abs().max() > 0.01) == writes  # else the test shows nothing


def test_what_is_not_centred_by_transformer_lens_is_not_centred_here(models):
    site = find_site(models["llama"], 1, "resid_post", centred=True)  # its norm sees the mean
    assert not site.centred


def test_a_replacement_that_fails_leaves_no_hook_behind(models):
    lm = models["gpt2"]
    clean = logits(lm, IDS)

    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        logits(lm, IDS, site=find_site(lm, 0, "mlp_out"), replace=fail)
    assert torch.equal(logits(lm, IDS), clean)


def test_ids_of_any_integer_type_and_a_padding_token_give_no_warning(models, capfd):
    ids = torch.full((2, 5), 3, dtype=torch.int32)  # 3 is pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lm in models.values():
            x = activations(lm, find_site(lm, 0, "mlp_act"), ids)
            losses = next_token_loss(logits(lm, ids), ids)
            assert x.shape == (2, 5, WIDTH)
            assert losses.isfinite().all()
            assert not x.requires_grad
    assert capfd.readouterr().err == ""


def test_next_token_loss_is_minus_the_log_probability_of_what_came(monkeypatch):
    values = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(11, (3, 7))
    expected = torch.empty(3, 6)
    for b in range(3):
        for t in range(6):
            expected[b, t] = -log_softmax(values[b, t].double(), 0)[ids[b, t + 1]]
    whole = next_token_loss(values, ids)
    assert (whole - expected).abs().max() < 1e-6
    assert whole.dtype == torch.float32
    monkeypatch.setattr("sparse_coding.lm.model.LOSS_CHUNK", 4 * 11)  # rows of 4 and 2
    assert torch.equal(next_token_loss(values, ids), whole)
    half = next_token_loss(values.bfloat16(), ids)  # the sum over the vocabulary is in float32
    assert (half - next_token_loss(values.bfloat16().float(), ids)).abs().max() == 0


def one_layer(kind: str, tmp_path, **changes):
    """A model of one layer, whose last site's direct path is its only path."""
    n_layers = {"num_layers": 1, "attention_types": [[["global"], 1]]}
    n_layers = n_layers if kind == "gpt_neo" else {"num_hidden_layers": 1, "n_layer": 1}
    random_model(kind, **n_layers, **changes).save_pretrained(tmp_path)
    return load(tmp_path)


def frozen_norm(scale: list[torch.Tensor], gain_offset: float):
    """A hook: the norm with the scale of its first input, kept in `scale`, so linear in x."""

    def hook(module, args, out):
        x = args[0].double()
        if isinstance(module, torch.nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        scale.append(x.square().mean(-1, keepdim=True).sqrt())
        bias = getattr(module, "bias", None)
        gain = module.weight.double() + gain_offset
        return (x / scale[0] * gain + (0 if bias is None else bias)).float()

    return hook


@pytest.mark.parametrize("kind", MODELS)
def test_direct_logits_are_the_change_of_the_logits_with_the_norms_scale_frozen(kind, tmp_path):
    lm = one_layer(
        kind, tmp_path, **({"final_logit_softcapping": None} if kind == "gemma2" else {})
    )
    scale = []
    norm = lm.model.get_submodule(PATHS[kind][-1])
    norm.register_forward_hook(frozen_norm(scale, float(kind == "gemma2")))
    parallel = kind in ("gptj", "gpt_neox", "phi")  # else the MLP reads what attention writes
    for name in ("mlp_act", "mlp_out", "resid_post", *["attn_concat"] * parallel):
        site = find_site(lm, 0, name)
        directions = torch.randn(4, site.width, generator=torch.Generator().manual_seed(0))
        got = direct_logits(lm, site, directions)
        if kind == "gemma2" and name != "resid_post":
            assert got is None
            continue
        assert got.shape == (4, VOCAB)
        assert got.mean(dim=1).abs().max() < 1e-5
        scale.clear()
        clean = logits(lm, IDS[:1])
        for direction, effect in zip(directions, got, strict=True):
            added = logits(lm, IDS[:1], site=site, replace=lambda x, d=direction: x + d)
            change = (added - clean)[0] * scale[0][0]  # (context, vocab)
            change = change - change.mean(dim=1, keepdim=True)
            assert (change - effect).abs().max() < 1e-4 * effect.abs().max(), name


def test_direct_logits_of_the_heads_go_through_the_output_projection(models):
    site = find_site(models["gpt2"], 1, "attn_concat")
    model, directions = models["gpt2"].model, torch.eye(D)[:3]
    written = directions @ model.transformer.h[1].attn.c_proj.weight
    gained = (written - written.mean(dim=1, keepdim=True)) * model.transformer.ln_f.weight
    expected = gained @ model.transformer.wte.weight.T
    got = direct_logits(models["gpt2"], site, directions)
    assert (got - (expected - expected.mean(dim=1, keepdim=True))).abs().max() < 1e-4
    assert (
        direct_logits(models["gemma2"], find_site(models["gemma2"], 1, "attn_concat"), directions)
        is None
    )


def test_direct_logits_are_refused_where_no_direct_path_is_linear(models, tmp_path):
    for lm in models.values():
        assert direct_logits(lm, find_site(lm, 0, "mlp_in"), torch.ones(1, D)) is None
    lm = one_layer("opt", tmp_path / "post", do_layer_norm_before=False)
    assert all(direct_logits(lm, find_site(lm, 0, n), torch.ones(1, 1)) is None for n in SITES)
    lm = one_layer("opt", tmp_path / "narrow", word_embed_proj_dim=8)
    assert all(direct_logits(lm, find_site(lm, 0, n), torch.ones(1, 1)) is None for n in SITES)


def test_the_weight_hash_is_that_of_the_weights_in_bfloat16(folders, models):
    for kind in ("gpt2", "llama", "opt"):
        half = load(folders / kind, dtype=torch.bfloat16)
        assert half.dtype == half.model.dtype == torch.bfloat16
        assert half.weight_hash == models[kind].weight_hash
    other = load(folders / "other")
    of_mistral = models["mistral"].weight_hash  # the same weights as llama's, by its seed
    hashes = [other.weight_hash, *(lm.weight_hash for k, lm in models.items() if k != "mistral")]
    assert len(set(hashes)) == len(hashes)
    assert of_mistral == models["llama"].weight_hash
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


def test_the_weight_hash_takes_denormals_for_zeros_as_some_devices_do(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "gpt2", dtype=torch.float32)
    hashes = []
    for scale in (1e-40, -0.0, 1e-37):
        model.transformer.ln_f.bias.data[:] = scale * torch.arange(1, D + 1)
        model.save_pretrained(tmp_path)
        hashes.append(load(tmp_path).weight_hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_in_bfloat16_the_activations_are_those_of_float32_within_its_precision(folders, models):
    """Rotary frequencies rounded to bfloat16, the usual accident, would be off by more."""
    site = find_site(models["llama"], 2, "attn_concat")
    half = load(folders / "llama", dtype=torch.bfloat16)
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32
    expected = activations(models["llama"], site, IDS)
    got = activations(half, find_site(half, 2, "attn_concat"), IDS)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


def test_a_model_says_what_it_is(models, folders):
    for kind, lm in models.items():
        assert lm.name == str(folders / kind)
        assert (lm.n_layers, lm.d_model, lm.vocab_size) == (N_LAYERS, D, VOCAB)
        assert (lm.max_context, lm.dtype) == (32, torch.float32)
        assert not lm.model.training
        assert not any(weight.requires_grad for weight in lm.model.parameters())


def test_a_nanogpt_checkpoint_is_a_language_model(tmp_path):
    path = save_checkpoint(tmp_path / "ckpt.pt")
    lm = load(path)
    ids = torch.arange(24)[None]
    expected = nanogpt_logits(nanogpt_state(ARGS), ARGS, ids)
    assert (logits(lm, ids) - expected).abs().max() < 1e-5
    assert (lm.n_layers, lm.vocab_size, lm.max_context) == (2, 65, 24)
    assert find_site(lm, 1, "mlp_act").width == 64
    half = load(path, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert half.weight_hash == lm.weight_hash


def test_layers_and_sites_that_are_not_there_are_refused(models):
    lm = models["gpt2"]
    for layer in (-1, 3):
        with pytest.raises(UserError, match=f"no such layer: {layer}: .* has layers 0 to 2"):
            find_site(lm, layer, "mlp_act")
    with pytest.raises(UserError, match="no such site: mlp: use attn_concat, mlp_in"):
        find_site(lm, 0, "mlp")


def refusal(name: object, **options) -> str:
    with pytest.raises(UserError) as error:
        load(name, **options)
    assert "\n" not in str(error.value)
    assert str(name) in str(error.value)
    return str(error.value)


def changed_copy(folder, target, **config):
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_folders_that_hold_no_whole_model_are_refused(folders, tmp_path, capfd):
    good = folders / "gpt2"
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "missing or misshapen" in refusal(changed_copy(good, tmp_path / "deep", n_layer=4))
    assert "missing or misshapen" in refusal(changed_copy(good, tmp_path / "wide", n_inner=48))
    assert "can't be loaded" in refusal(changed_copy(good, tmp_path / "heads", n_head=3))
    cut = changed_copy(good, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    assert "can't be loaded" in refusal(cut.parent)
    cut.unlink()
    assert "no file named model.safetensors" in refusal(cut.parent)
    (cut.parent / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(cut.parent)
    assert "is a file" in refusal(good / "config.json")
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "for a hub id" in refusal(good, revision="main")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": None}, {"n_embd": "16"}, {"n_layer": 2.0}, {"n_layer": 0}, {"n_layer": 10**6},
     {"n_positions": -1}, {"n_positions": "many"}, {"activation_function": "nonsense"},
     {"activation_function": None}, {"layer_norm_epsilon": "1e-5"}, {"layer_norm_epsilon": None},
     {"n_head": 0}, {"vocab_size": 10**9}, {"n_embd": 10**6}, {"n_positions": 10**9},
     {"quantization_config": {"load_in_8bit": True}}, {"dtype": "float99"}, {"model_type": []},
     {"n_inner": 10**9}, {"auto_map": {"AutoConfig": 3}, "model_type": 3}],
    ids=str,
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_before_anything_is_allocated(folders, tmp_path, change):
    assert "Error: " not in refusal(changed_copy(folders / "gpt2", tmp_path / "bad", **change))


def test_positions_that_would_fill_the_memory_are_refused(folders, tmp_path):
    for kind in ("gptj", "gpt_neo"):
        name = "n_positions" if kind == "gptj" else "max_position_embeddings"
        folder = changed_copy(folders / kind, tmp_path / kind, **{name: 2**23})
        assert re.search("masks and positions|describes", refusal(folder))


def test_a_config_nested_too_deep_is_refused(folders, tmp_path):
    folder = changed_copy(folders / "gpt2", tmp_path / "deep")
    (folder / "config.json").write_text('{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert "config.json is not JSON" in refusal(folder)


def test_pickled_weights_that_unpack_to_more_than_they_are_are_refused(folders, tmp_path, models):
    folder = changed_copy(folders / "gpt2", tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(models["gpt2"].model.state_dict(), plain := tmp_path / "plain.bin")
    deflated(plain, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is compressed"):
        load(folder)


def test_architectures_without_a_row_in_the_table_are_refused(tmp_path):
    BertConfig(num_hidden_layers=1, hidden_size=8).save_pretrained(tmp_path)
    assert "architecture bert is not one of gpt2," in refusal(tmp_path)


def test_a_model_that_wants_to_run_its_own_code_is_refused(folders, tmp_path):
    own_code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    folder = changed_copy(folders / "gpt2", tmp_path / "a", model_type="mine", auto_map=own_code)
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    assert "custom code" in refusal(folder)


def test_pickled_weights_load_but_a_bomb_in_them_is_refused(folders, tmp_path, models):
    folder = changed_copy(folders / "gpt2", tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(models["gpt2"].model.state_dict(), folder / "pytorch_model.bin")
    lm = load(folder)
    assert lm.weight_hash == models["gpt2"].weight_hash
    torch.save({"lm_head.weight": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    assert "can't be loaded" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


def test_names_that_are_not_there_are_refused_with_the_way_to_fetch_them(hub_cache):
    assert "`hf download openai-community/gpt2`" in refusal("openai-community/gpt2")
    assert "`hf download gpt2 --revision abc`" in refusal("gpt2", revision="abc")
    assert "no hub id" in refusal("no/such/folder")
    assert "no hub id" in refusal("/no/such/folder")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "not on the hub"),
        (errors.RevisionNotFoundError, "has no revision abc on the hub"),
        (errors.HfHubHTTPError, "out of reach"),
        (ConnectionError, "out of reach"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(hub_cache, monkeypatch, error, message):
    def answer(*_, **__):
        if error is ConnectionError:
            raise error("no route")
        raise error("two\nlines", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    assert message in refusal("me/mine", revision="abc")


def test_a_hub_id_in_the_cache_needs_no_hub(hub_cache, monkeypatch, folders, models):
    repo, commit = hub_cache / "models--me--mine", "0123456789" * 4
    shutil.copytree(folders / "gpt2", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    with monkeypatch.context() as online:
        online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        online.setattr(type(get_session()), "send", lambda *_, **__: pytest.fail("a request"))
        lm = load("me/mine")
        pinned = load("me/mine", revision=commit)
        assert hub_commit("me/mine") == hub_commit("me/mine", commit) == commit
    assert lm.weight_hash == pinned.weight_hash == models["gpt2"].weight_hash
    (repo / "snapshots" / commit / "model.safetensors").unlink()
    assert "`hf download me/mine`" in refusal("me/mine")


def test_loading_shows_no_bar_and_no_report(folders, tmp_path, monkeypatch):
    shown, logger, handler = [], logging.getLogger("transformers"), logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    monkeypatch.setattr("tqdm.auto.tqdm", lambda *args, **__: shown.append("bar") or args[0])
    enable_progress_bar()  # convert.py, run by another test in this process, disables it
    load(folders / "gpt2")
    refusal(changed_copy(folders / "gpt2", tmp_path / "deep", n_layer=4))
    assert shown == []
    AutoModelForCausalLM.from_pretrained(tmp_path / "deep")  # it would show both
    logger.removeHandler(handler)
    assert shown[0] == "bar"
    assert "MISSING" in shown[-1]
