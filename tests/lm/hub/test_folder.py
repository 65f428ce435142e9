"""hub/: a folder per autoencoder, and cards that say where it comes from and no path of ours."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from builders.scripts import bytes_under
from huggingface_hub import ModelCard

from sparse_coding.files import write_csv, write_record
from sparse_coding.lm.hub.folder import sae_id, write_cards, write_hub_folder
from sparse_coding.sae.saved import load_sae, save_sae
from sparse_coding.sweep.cells import mark_done, sae_folder
from sparse_coding.sweep.grid import Cell, make_grid

COMMIT = "0123456789" * 4
OF_HUB = dict(model="ada/tiny", model_revision=COMMIT, dataset="ada/pile:en@test",
              dataset_revision=COMMIT)  # fmt: skip
LOCAL = dict(model="/home/lovelace/models/tiny", model_revision=None,
             dataset="~/lovelace/texts.jsonl", dataset_revision="0123abcd text")  # fmt: skip
COMMAND = (
    "python run.py --model=/home/lovelace/models/tiny --dataset ~/lovelace/texts.jsonl "
    "--output-dir ./lovelace/x --export hub --push lovelace/saes --public --arch relu topk "
    "--model-revision main"
)


def make_run(folder: Path, about: dict, *, site: str = "resid_post") -> list[Cell]:
    """A run folder with two cells of random autoencoders; its cells."""
    cells = make_grid(8, seeds=range(1), l1_exps=range(-8, -6), size_exps=range(1))
    known = {"layer": 3, "site": site, "context_length": 16, "flags": about}
    rows = []
    for i, cell in enumerate(cells):
        rng = torch.Generator().manual_seed(i)
        shapes = {"W_enc": (8, 8), "b_enc": (8,), "W_dec": (8, 8), "b_dec": (8,)}
        tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
        save_sae(sae_folder(folder, cell), tensors, metadata=about | known)
        row = {"arch": "relu", "n_dict": 8, "l0": 1.5 + i, "fvu": 0.25, "ce_recovered": None}
        rows.append(row | {"dead_fraction": 0.125})
        mark_done(folder, cell, rows[-1])
    write_csv(folder / "results.csv", rows)
    write_record(folder / "config.json", {"command": COMMAND})
    (folder / "figures").mkdir()
    (folder / "figures/frontier_fvu.png").write_bytes(b"png")
    return cells


@pytest.fixture
def cells(tmp_path) -> list[Cell]:
    cells = make_run(tmp_path, OF_HUB)
    write_hub_folder(tmp_path, cells, [tmp_path / "figures/frontier_fvu.png"])
    return cells


def test_every_autoencoder_is_there_under_its_hook_and_is_the_same(cells, tmp_path):
    for cell in cells:
        name = sae_id(tmp_path, cell)
        assert name == f"blocks.3.hook_resid_post/{cell.name}"
        ours, theirs = load_sae(sae_folder(tmp_path, cell)), load_sae(tmp_path / "hub" / name)
        assert theirs.metadata == ours.metadata
        assert all(torch.equal(theirs.tensors[n], t) for n, t in ours.tensors.items())
    files = set(bytes_under(tmp_path / "hub"))
    of_each = ("README.md", "cfg.json", "sae_weights.safetensors")
    expected = {f"{sae_id(tmp_path, cell)}/{name}" for cell in cells for name in of_each}
    assert files == expected | {"README.md", "results.csv", "figures/frontier_fvu.png"}


def test_a_site_without_a_hook_of_transformer_lens_has_a_name_of_ours(tmp_path):
    (cell, _) = make_run(tmp_path, OF_HUB | {"hook_name": None})
    assert sae_id(tmp_path, cell) == f"layer3.resid_post/{cell.name}"


def test_the_front_matter_names_library_model_and_text(cells, tmp_path):
    for path in (tmp_path / "hub").rglob("README.md"):
        data = ModelCard(path.read_text()).data.to_dict()
        assert data["library_name"] == "saelens"
        assert data["base_model"] == "ada/tiny"
        assert data["datasets"] == ["ada/pile"]  # without configuration and split
        assert "sparse-autoencoder" in data["tags"]


def test_the_model_of_the_package_is_named_as_the_hub_knows_it(tmp_path):
    cells = make_run(tmp_path, LOCAL | {"model": "smollm2"})
    write_hub_folder(tmp_path, cells, [])
    card = ModelCard((tmp_path / "hub/README.md").read_text())
    assert card.data.to_dict()["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_card_has_the_table_the_figure_and_how_to_load(cells, tmp_path):
    card = (tmp_path / "hub/README.md").read_text()
    names = [sae_id(tmp_path, cell) for cell in cells]
    for i, name in enumerate(names):
        assert f"| `{name}` | relu | 8 | {1.5 + i} | 0.25 | – | 0.125 |\n" in card
        own = (tmp_path / "hub" / name / "README.md").read_text()
        assert f'SAE.from_pretrained("OWNER/NAME", "{name}")' in own
        assert names[1 - i] not in own
    assert "![frontier_fvu](figures/frontier_fvu.png)" in card
    assert f'SAE.from_pretrained("OWNER/NAME", "{names[0]}")' in card
    write_cards(tmp_path, "ada/saes")
    again = (tmp_path / "hub/README.md").read_text()
    assert again == card.replace("OWNER/NAME", "ada/saes")


def test_no_path_of_this_machine_is_published(tmp_path):
    cells = make_run(tmp_path, LOCAL)
    write_hub_folder(tmp_path, cells, [])
    for name, data in bytes_under(tmp_path / "hub").items():
        assert b"lovelace" not in data, name
    card = ModelCard((tmp_path / "hub/README.md").read_text())
    assert card.data.to_dict().keys() == {"library_name", "tags"}  # the Hub knows neither
    assert (
        "python run.py --model=tiny --dataset texts.jsonl --output-dir x --export hub "
        "--arch relu topk --model-revision main\n"
    ) in card.content
    path = tmp_path / "hub" / sae_id(tmp_path, cells[0]) / "cfg.json"
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["model_name"] == "tiny"
    assert metadata["sparse_coding"]["flags"] == LOCAL | {"model": "tiny", "dataset": "texts.jsonl"}


def test_weights_take_no_room_twice_where_the_disk_has_links(cells, tmp_path, monkeypatch):
    weights = "sae_weights.safetensors"
    places = [(sae_folder(tmp_path, c), tmp_path / "hub" / sae_id(tmp_path, c)) for c in cells]
    assert all(os.path.samefile(ours / weights, hub / weights) for ours, hub in places)

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    (places[0][1] / weights).unlink()
    monkeypatch.setattr(os, "link", refused)
    write_hub_folder(tmp_path, cells, [])
    assert not os.path.samefile(places[0][0] / weights, places[0][1] / weights)
    for ours, hub in places:
        assert (ours / weights).read_bytes() == (hub / weights).read_bytes()
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []
