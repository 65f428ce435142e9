"""Saved autoencoders in the libraries that others use, and theirs here: the same x_hat to 1e-4.

Skipped where they are not installed; tests/requirements-peers.txt says how to install them.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparse_coding.sae.saved import export_dictionary_learning, load_sae, save_sae
from sparse_coding.sweep.cells import sae_folder
from sparse_coding.sweep.grid import make_grid
from sparse_coding.toy.data import ToyData
from sparse_coding.toy.recipe import ToyRecipe

ACTIVATION_DIM, N_DICT, N_HEADS = 24, 96, 4
ABOUT = {"model": "demo", "layer": 1, "site": "mlp_act", "context_length": 128, "dataset": "x"}


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    return pytest.importorskip("sae_lens")


@pytest.fixture(scope="module")
def dictionary_learning() -> ModuleType:
    return pytest.importorskip("dictionary_learning")


@pytest.fixture
def x() -> Tensor:
    """Activations as raw ones may be: mean 3, standard deviation 5."""
    return 3 + 5 * torch.randn(200, ACTIVATION_DIM, generator=torch.Generator().manual_seed(1))


def random_tensors() -> dict[str, Tensor]:
    """b_dec is not 0; rows of W_dec have lengths near 1, but not 1."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (ACTIVATION_DIM, N_DICT), "b_enc": (N_DICT,)}
    shapes |= {"W_dec": (N_DICT, ACTIVATION_DIM), "b_dec": (ACTIVATION_DIM,)}
    tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    return tensors | {name: tensors[name] / ACTIVATION_DIM**0.5 for name in ("W_enc", "W_dec")}


def reconstruct(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """codes = ReLU((x − b_dec) W_enc + b_enc), x_hat = codes W_dec + b_dec, in float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    codes = ((x.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    return (codes @ t["W_dec"] + t["b_dec"]).float()


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_sae_lens_loads_the_folders_of_a_toy_run(sae_lens, tmp_path):
    data = ToyData("post", 8, 16, n_active=2, feature_prob_decay=0.9, noise_std=0.0, batch_size=32)
    recipe = ToyRecipe(data, "per_feature", 1e-3, 3, torch.device("cpu"))
    (cell,) = make_grid(16, seeds=range(1), l1_exps=range(-4, -3), size_exps=range(1))
    task = recipe.prepare([cell])
    ((row, tensors),) = task.evaluate()
    recipe.save(tmp_path, cell, tensors, row)
    theirs, x = sae_lens.SAE.load_from_disk(sae_folder(tmp_path, cell)), task.batch_at(0)
    with torch.no_grad():
        assert_equal(reconstruct(tensors, x), theirs(x))
        assert_equal(load_sae(sae_folder(tmp_path, cell)).encode(x), theirs.encode(x))


def test_sae_lens_loads_ours_and_reconstructs_the_same(sae_lens, tmp_path, x):
    save_sae(tmp_path, random_tensors(), metadata=ABOUT)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        assert_equal(reconstruct(random_tensors(), x), theirs(x))
        ours = load_sae(tmp_path)
        assert_equal(ours.encode(x), theirs.encode(x))
    metadata = theirs.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("demo", "blocks.1.mlp.hook_post")
    assert (metadata.context_size, metadata.sparse_coding) == (128, ABOUT)


def test_sae_lens_flattens_the_heads_of_an_attention_site(sae_lens, tmp_path, x):
    save_sae(tmp_path, random_tensors(), metadata=ABOUT | {"site": "attn_concat"})
    with pytest.warns(UserWarning, match="from_pretrained_no_processing"):  # as it should
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
    heads = x.reshape(20, 10, N_HEADS, -1)
    with torch.no_grad():
        assert_equal(reconstruct(random_tensors(), x), theirs(heads).reshape(x.shape))


@pytest.mark.filterwarnings("error")
def test_sae_lens_warns_of_nothing_that_a_mlp_site_needs(sae_lens, tmp_path):
    save_sae(tmp_path, random_tensors(), metadata=ABOUT)
    sae_lens.SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("b_dec_on_input", [True, False])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Standard", {}),
        ("JumpReLU", {}),
        ("TopK", {"k": 7}),
        ("TopK", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_what_sae_lens_saves_is_loaded_and_reconstructs_the_same(
    sae_lens, tmp_path, x, name, more, b_dec_on_input
):
    config = getattr(sae_lens, f"{name}SAEConfig")(
        d_in=ACTIVATION_DIM, d_sae=N_DICT, apply_b_dec_to_input=b_dec_on_input, **more
    )
    config.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs = getattr(sae_lens, f"{name}SAE")(config)
    tensors = random_tensors()
    if name == "JumpReLU":
        tensors["threshold"] = torch.rand(N_DICT, generator=torch.Generator().manual_seed(2))
    theirs.load_state_dict(tensors)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    with torch.no_grad():
        assert_equal(ours.decode(ours.encode(x)), theirs(x))
    assert (ours.metadata["site"], ours.metadata["layer"]) == ("resid_post", 2)


def test_dictionary_learning_loads_the_export_and_reconstructs_the_same(
    dictionary_learning, tmp_path, x, capsys
):
    save_sae(tmp_path / "sae", random_tensors(), metadata=ABOUT)
    sae = load_sae(tmp_path / "sae")
    export_dictionary_learning(tmp_path / "export", sae, metadata=sae.metadata)
    theirs = dictionary_learning.AutoEncoder.from_pretrained(tmp_path / "export" / "ae.pt")
    with torch.no_grad():
        assert_equal(reconstruct(random_tensors(), x), theirs(x))
    assert capsys.readouterr().out == ""  # it found rows of length 1, so it changed nothing


def test_dictionary_learning_loads_the_folder_by_its_config(dictionary_learning, tmp_path, x):
    from dictionary_learning.utils import load_dictionary

    save_sae(tmp_path / "sae", random_tensors(), metadata=ABOUT)
    export_dictionary_learning(tmp_path, load_sae(tmp_path / "sae"), metadata=ABOUT)
    theirs, config = load_dictionary(str(tmp_path), device="cpu")
    with torch.no_grad():
        assert_equal(reconstruct(random_tensors(), x), theirs(x))
    assert (config["trainer"]["lm_name"], config["buffer"]["ctx_len"]) == ("demo", 128)
