"""Transcoders in the libraries that others use, and theirs here: the same y_hat to 1e-4.

Skipped where they are not installed; tests/requirements-peers.txt says how to install them.
"""

import copy
import importlib
from pathlib import Path

import pytest
import torch
import yaml
from builders.models import VOCAB, random_model
from torch import Tensor

from sparse_coding.lm.model import activations, find_site, load_language_model
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.exported import export_circuit_tracer, export_sparsify
from sparse_coding.sae.families import FAMILIES, TRAINED
from sparse_coding.sae.saelens import HOOKS
from sparse_coding.sae.saved import load_sae, save_sae, unscaled
from sparse_coding.sae.spec import SAESpec

H, N_DICT, K = 24, 96, 6
SCALES = 0.2, 3.0  # of x and y: raw ones are not of a mean square norm of 1
ABOUT = {"model": "demo", "layer": 1, "site": "mlp_in", "target_site": "mlp_out", "dataset": "x"}
ARCHS = [name for name in TRAINED if not FAMILIES[name].refined]


def batch(step: int, n: int = 128) -> Tensor:
    """(2, n, H): x, and what a small MLP makes of it; neither is centred."""
    rng = torch.Generator().manual_seed(step)
    x = 0.3 + torch.randn(n, H, generator=rng)
    of_mlp = torch.Generator().manual_seed(10**6)
    up, down = (torch.randn(s, generator=of_mlp) for s in ((H, 60), (60, H)))
    return torch.stack([x, (x @ up / H**0.5).relu() @ down / 60 + 0.1])


@pytest.fixture(scope="module", params=[(arch, skip) for arch in ARCHS for skip in (False, True)])
def trained(request, tmp_path_factory) -> Path:
    """The folder of a transcoder of each family, trained a little."""
    arch, skip = request.param
    spec = SAESpec(N_DICT, 1e-3, 0, tied=True, target_l0=K, arch=arch, transcodes=True, skip=skip)
    options = dict(lr=3e-3, device=torch.device("cpu"), b_dec=torch.zeros(H), project=True)
    ensemble = Ensemble([spec], H, **options)
    for step in range(60):
        ensemble.step_(batch(step) * torch.tensor(SCALES)[:, None, None])
    folder = tmp_path_factory.mktemp("transcoder") / f"{arch}{skip}"
    top_k = K if FAMILIES[arch].selection == "topk" else None
    tensors = unscaled(ensemble.dictionary(0), *SCALES)
    save_sae(folder, tensors, metadata=ABOUT | {"arch": arch}, top_k=top_k, transcodes=True)
    return folder


def assert_equal(folder: Path, y_hat: Tensor) -> None:
    """y_hat of the batch -1 is ours, which is nearer to y than y's mean."""
    ours, (x, y) = load_sae(folder), batch(-1)
    expected = ours.decode(ours.encode(x), x)
    assert (expected - y).square().mean() < (y - y.mean(dim=0)).square().mean()
    torch.testing.assert_close(y_hat, expected, atol=1e-4, rtol=0)


def test_sae_lens_loads_them_from_disk_but_for_topk(trained):
    sae_lens = pytest.importorskip("sae_lens")
    ours = load_sae(trained)
    if ours.top_k:
        with pytest.raises(Exception, match="topk"):
            sae_lens.SAE.load_from_disk(trained)
        return
    theirs = sae_lens.SAE.load_from_disk(trained)
    jumps = "jumprelu_" if ours.threshold is not None else ""
    skips = "skip_" if ours.W_skip is not None else ""
    assert theirs.cfg.architecture() == f"{jumps}{skips}transcoder"
    assert theirs.cfg.metadata.hook_name == "blocks.1.mlp.hook_in"
    assert theirs.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
    with torch.no_grad():
        assert_equal(trained, theirs(batch(-1)[0]))


def test_what_sae_lens_saves_again_is_read_here(trained, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    ours = load_sae(trained)
    if ours.top_k:
        pytest.skip("sae_lens has no topk transcoder")
    sae_lens.SAE.load_from_disk(trained).save_model(tmp_path / "again")
    again, (x, _) = load_sae(tmp_path / "again"), batch(-1)
    assert again.transcodes
    assert torch.equal(again.decode(again.encode(x), x), ours.decode(ours.encode(x), x))


def test_sparsify_loads_those_that_are_topk(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = pytest.importorskip("sparsify")
    ours = load_sae(trained)
    if not ours.top_k:
        pytest.skip("sparsify has topk alone")
    export_sparsify(tmp_path, ours, metadata=ours.metadata)
    theirs = sparsify.Sae.load_from_disk(tmp_path)
    assert theirs.cfg.transcode
    assert theirs.cfg.skip_connection == (ours.W_skip is not None)
    x, y = batch(-1)
    with torch.no_grad():
        assert_equal(trained, theirs(x, y).sae_out)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_the_hooks_that_are_saved_are_transformer_lens_names_of_our_sites(kind, tmp_path):
    """mlp.hook_in is of its bridge. Behind hook_mlp_out of Gemma 2 there is a norm: not saved."""
    pytest.importorskip("transformer_lens")
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    random_model(kind).save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path), device=torch.device("cpu"))
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs = bridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(lm.model))
    _, cache = theirs.run_with_cache(ids)
    for site in ("mlp_in", *["mlp_out"] * (kind == "gpt2")):
        x = activations(lm, find_site(lm, 1, site), ids)
        torch.testing.assert_close(cache[HOOKS[site].format(1)], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
def test_circuit_tracer_loads_relu_and_jumprelu_ones(trained, tmp_path, lazy):
    pytest.importorskip("circuit_tracer")
    single = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    ours = load_sae(trained)
    if ours.top_k:
        pytest.skip("circuit-tracer has no topk in files")
    paths = {}
    for layer in (0, 1):  # a set begins with layer 0
        export_circuit_tracer(tmp_path, ours, metadata=ours.metadata | {"layer": layer})
        paths[layer] = str(tmp_path / f"layer_{layer}.safetensors")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    hooks = {k: config[k] for k in ("scan", "feature_input_hook", "feature_output_hook")}
    options = dict(device=torch.device("cpu"), lazy_encoder=lazy, lazy_decoder=lazy)
    theirs = single.load_transcoder_set(paths, **hooks, **options)
    assert theirs.skip_connection == (ours.W_skip is not None)
    with torch.no_grad():
        assert_equal(trained, theirs[1](batch(-1)[0]))
