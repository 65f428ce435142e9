"""The folder of --export hub in SAELens: its from_pretrained from a Hub, and its loader from disk.

The Hub is one on the loopback, to which --push has uploaded the folder. Skipped where sae_lens is
not installed; tests/requirements-peers.txt says how to install it.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from builders.hub import served_hub
from builders.language_sweep import World
from builders.scripts import run_script
from safetensors.torch import load_file, save_file

from sparse_coding.sae.families import FAMILIES, TRAINED
from sparse_coding.sae.saved import load_sae

ARCHS = [name for name in TRAINED if not FAMILIES[name].refined]
# prints {sae_id: [fvu from the Hub, fvu from disk]}; arguments: hub/, activations, repository
LOADED = """
import json, pathlib, sys
import torch
from safetensors.torch import load_file
from sae_lens import SAE
folder, repository = pathlib.Path(sys.argv[1]), sys.argv[3]
x = load_file(sys.argv[2])["x"]
def fvu(sae):
    with torch.no_grad():
        missed = (sae(x) - x).double().square().sum()
    return float(missed / (x - x.mean(dim=0)).double().square().sum())
found = {}
for path in sorted(folder.glob("*/*/cfg.json")):
    name = path.parent.relative_to(folder).as_posix()
    from_hub = SAE.from_pretrained(repository, name)
    assert from_hub.cfg.metadata.hook_name == name.split("/")[0]
    found[name] = [fvu(from_hub), fvu(SAE.load_from_disk(path.parent))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(world: World, tmp_path_factory):
    """(cwd of a sweep of every family on one site, its Hub). Pushed to ada/saes."""
    if not importlib.util.find_spec("sae_lens"):
        pytest.skip("sae_lens is not installed")
    cwd = tmp_path_factory.mktemp("pushed")
    with served_hub() as hub:
        hub.log_in(cwd / "home")
        flags = ["--arch", *ARCHS, "--target-l0", "3", "6", "--site", "resid_post"]
        flags += ["--expansion-exp-low", "2", "--expansion-exp-high", "3"]
        flags += ["--export", "hub", "--push", "ada/saes"]
        process = world.start(
            *flags,
            cwd=cwd,
            patch=world.server.patch | hub.patch(cwd / "home"),
            env=hub.environment(cwd / "home"),
        )
        done = process.wait()
        assert done.code == 0, done.err
        yield cwd, hub


def activations(cwd: Path) -> torch.Tensor:
    """Of the site, as the store has them."""
    chunks = [load_file(path) for path in sorted((cwd / "acts").glob("chunk-*.safetensors"))]
    return torch.cat([t for chunk in chunks for t in chunk.values() if t.dim() == 2]).float()[:4000]


def test_every_cell_has_our_fvu_from_the_hub_and_from_disk(pushed, tmp_path):
    cwd, hub = pushed
    x = activations(cwd)
    save_file({"x": x}, tmp_path / "x.safetensors")
    folder = cwd / "run/hub"
    env = hub.environment(cwd / "home") | {"TQDM_DISABLE": "1"}
    args = ["-c", LOADED, folder, tmp_path / "x.safetensors", "ada/saes"]
    done = run_script(args, cwd=tmp_path, more_environment=env)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    variance = (x - x.mean(dim=0)).double().square().sum()
    names = sorted(p.name for p in (cwd / "run/saes").iterdir())
    assert len(names) == 2 * len(ARCHS)
    assert sorted(found) == sorted(f"blocks.1.hook_resid_post/{name}" for name in names)
    for name in names:
        ours = load_sae(cwd / "run/saes" / name)
        fvu = float((ours.decode(ours.encode(x)) - x).double().square().sum() / variance)
        assert 0 < fvu < 1
        assert found[f"blocks.1.hook_resid_post/{name}"] == pytest.approx([fvu] * 2, abs=1e-4)
