"""Saved autoencoders in the libraries that others use, and theirs here: the same x_hat to 1e-4.

Skipped where they are not installed; tests/requirements-peers.txt says how to install them.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparse_coding.config import UserError
from sparse_coding.sae.ensemble import Ensemble
from sparse_coding.sae.exported import export_dictionary_learning, export_sparsify
from sparse_coding.sae.families import FAMILIES, TRAINED
from sparse_coding.sae.saved import SparseAutoencoder, load_sae, save_sae
from sparse_coding.sae.spec import SAESpec, Schedule
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


@pytest.fixture(scope="module")
def sparsify() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:  # Triton is no decoder for a CPU
        patch.setenv("SPARSIFY_DISABLE_TRITON", "1")
        return pytest.importorskip("sparsify")


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


# --- every family: trained, saved and loaded by each library that has its parts ---

N_STEPS, BATCH, SCALE = 50, 256, 7.0
DICT_CLASSES = {
    "relu": "AutoEncoder",
    "p_anneal": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "jumprelu_tanh": "JumpReluAutoEncoder",
    "matryoshka": "MatryoshkaBatchTopKSAE",
}


def raw_batch(step: int, n: int = BATCH) -> Tensor:
    """Mixtures of 60 directions around a mean, as long as activations may be."""
    rng = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(60, ACTIVATION_DIM, generator=rng))
    mean = torch.randn(ACTIVATION_DIM, generator=rng)
    rng.manual_seed(100 + step)
    active = torch.rand(n, 60, generator=rng) < 0.08
    return SCALE * ((torch.rand(n, 60, generator=rng) * active) @ directions + 0.2 * mean)


@pytest.fixture(scope="module", params=[a for a in TRAINED if not FAMILIES[a].refined])
def trained(request, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """Folder of an autoencoder of each family after 50 steps; its tensors for raw activations."""
    arch, folder = request.param, tmp_path_factory.mktemp(request.param) / "cell"
    family = FAMILIES[arch]
    l1 = {"l1": 3e-2, "lp": 3e-2, "l0_step": 1e-3, "l0_tanh": 1e-3, "none": 0.0}[family.penalty]
    spec = SAESpec(N_DICT, l1, 0, tied=True, target_l0=6, arch=arch)
    b_dec = raw_batch(0).mean(dim=0) / SCALE
    to = dict(lr=3e-3, device=torch.device("cpu"), b_dec=b_dec, project=True)
    ensemble = Ensemble([spec], ACTIVATION_DIM, **to, schedule=Schedule(anneal=range(20, 40)))
    for step in range(N_STEPS):
        ensemble.step_(raw_batch(step) / SCALE)
    in_raw_units = {"b_enc", "b_dec", "threshold"}
    tensors = {
        name: tensor * SCALE if name in in_raw_units else tensor
        for name, tensor in ensemble.dictionary(0).items()
    }
    top_k = 6 if family.selection == "topk" else None
    save_sae(folder, tensors, metadata=ABOUT | {"arch": arch, "target_l0": 6}, top_k=top_k)
    return folder, tensors


def fvu_and_l0(codes: Tensor, x_hat: Tensor, x: Tensor) -> tuple[float, float]:
    missed = (x_hat - x).double().square().sum() / (x - x.mean(dim=0)).double().square().sum()
    return float(missed), float((codes > 0).double().sum(dim=1).mean())


def assert_same_metrics(
    ours: SparseAutoencoder, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
) -> None:
    """fvu and L0 on 2 000 samples that it has not seen."""
    x = raw_batch(-1, n=2000)
    with torch.no_grad():
        codes = ours.encode(x)
        expected = fvu_and_l0(codes, ours.decode(codes), x)
        codes = encode(x)
        found = fvu_and_l0(codes, decode(codes), x)
    assert 0 < expected[0] < 1
    assert 1 < expected[1] < N_DICT / 2
    assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-4)
    # two codes of 2 000 samples: rounding decides on those at a threshold
    assert found[1] == pytest.approx(expected[1], rel=0, abs=2 / 2000)


def test_a_family_is_what_it_was_trained_to_be(trained):
    """Its saved form, against the formulas in float64."""
    folder, tensors = trained
    ours = load_sae(folder)
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def encode(x: Tensor) -> Tensor:
        codes = ((x.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        if "threshold" in t:
            return codes * (codes > t["threshold"])
        if ours.top_k:
            return codes * (codes >= codes.sort(dim=1).values[:, -6:-5])
        return codes

    assert_same_metrics(ours, encode, lambda codes: codes @ t["W_dec"] + t["b_dec"])


def test_sae_lens_has_a_class_for_every_family(sae_lens, trained):
    folder, _ = trained
    ours, theirs = load_sae(folder), sae_lens.SAE.load_from_disk(folder)
    assert theirs.cfg.architecture() == FAMILIES[ours.metadata["arch"]].saved_as
    assert_same_metrics(ours, theirs.encode, theirs.decode)


def test_dictionary_learning_has_a_class_for_every_family(dictionary_learning, trained, tmp_path):
    from dictionary_learning.utils import load_dictionary

    ours = load_sae(trained[0])
    export_dictionary_learning(tmp_path, ours, metadata=ours.metadata)
    theirs, config = load_dictionary(str(tmp_path), device="cpu")
    assert type(theirs).__name__ == DICT_CLASSES[ours.metadata["arch"]]
    assert config["trainer"]["dict_class"] == type(theirs).__name__
    assert_same_metrics(ours, theirs.encode, theirs.decode)


def test_sparsify_has_topk(sparsify, trained, tmp_path):
    ours = load_sae(trained[0])
    if ours.metadata["arch"] != "topk":
        with pytest.raises(UserError, match="topk SAEs alone"):
            export_sparsify(tmp_path, ours, metadata=ours.metadata)
        return
    export_sparsify(tmp_path, ours, metadata=ours.metadata)
    theirs = sparsify.Sae.load_from_disk(tmp_path)

    def encode(x: Tensor) -> Tensor:
        values, indices, _ = theirs.encode(x)
        return torch.zeros(len(x), N_DICT).scatter(1, indices, values)

    def decode(codes: Tensor) -> Tensor:
        return theirs.decode(*codes.topk(theirs.cfg.k, dim=1))

    assert_same_metrics(ours, encode, decode)
    x = raw_batch(-1, n=2000)
    with torch.no_grad():
        assert_equal(ours.decode(ours.encode(x)), theirs(x).sae_out)
