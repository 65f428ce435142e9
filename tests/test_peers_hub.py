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
x, y = (load_file(sys.argv[2])[name] for name in "xy")
def fvu(sae):
    with torch.no_grad():
        missed = (sae(x) - y).double().square().sum()
    return float(missed / (y - y.mean(dim=0)).double().square().sum())
found = {}
for path in sorted(folder.glob("*/*/cfg.json")):
    name = path.parent.relative_to(folder).as_posix()
    from_hub = SAE.from_pretrained(repository, name)
    assert from_hub.cfg.metadata.hook_name == name.split("/")[0]
    found[name] = [fvu(from_hub), fvu(SAE.load_from_disk(path.parent))]
print(json.dumps(found))
"""


# name of a sweep: its families, its flags, the hook under which the Hub has it
SWEEPS = {
    "autoencoders": (ARCHS, ["--site", "resid_post"], "blocks.1.hook_resid_post"),
    "transcoders": (
        [name for name in ARCHS if name != "topk"],  # which sae_lens lacks
        ["--site", "mlp_in", "--target-site", "mlp_out", "--skip"],
        "blocks.1.mlp.hook_in",
    ),
}


@pytest.fixture(scope="module", params=SWEEPS)
def pushed(request, world: World, tmp_path_factory):
    """(cwd of a sweep of every family, its Hub, its flags and hook). Pushed to ada/saes."""
    archs, sites, hook = SWEEPS[request.param]
    if not importlib.util.find_spec("sae_lens"):
        pytest.skip("sae_lens is not installed")
    cwd = tmp_path_factory.mktemp("pushed")
    with served_hub() as hub:
        hub.log_in(cwd / "home")
        flags = ["--arch", *archs, "--target-l0", "3", "6", *sites]
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
        yield cwd, hub, archs, hook


def activations(cwd: Path, *, n_sites: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) of the site and what is predicted, as the store has them."""
    chunks = [load_file(path) for path in sorted((cwd / "acts").glob("chunk-*.safetensors"))]
    rows = torch.cat([t for chunk in chunks for t in chunk.values() if t.dim() == 2]).float()[:4000]
    parts = rows.chunk(n_sites, dim=1)
    return parts[0].contiguous(), parts[-1].contiguous()


def test_every_cell_has_our_fvu_from_the_hub_and_from_disk(pushed, tmp_path):
    cwd, hub, archs, hook = pushed
    x, y = activations(cwd, n_sites=2 if "mlp.hook_in" in hook else 1)
    save_file({"x": x, "y": y.clone()}, tmp_path / "x.safetensors")
    folder = cwd / "run/hub"
    env = hub.environment(cwd / "home") | {"TQDM_DISABLE": "1"}
    args = ["-c", LOADED, folder, tmp_path / "x.safetensors", "ada/saes"]
    done = run_script(args, cwd=tmp_path, more_environment=env)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    variance = (y - y.mean(dim=0)).double().square().sum()
    names = sorted(p.name for p in (cwd / "run/saes").iterdir())
    assert len(names) == 2 * len(archs)
    assert sorted(found) == sorted(f"{hook}/{name}" for name in names)
    for name in names:
        ours = load_sae(cwd / "run/saes" / name)
        fvu = float((ours.decode(ours.encode(x), x) - y).double().square().sum() / variance)
        assert 0 < fvu < 1
        assert found[f"{hook}/{name}"] == pytest.approx([fvu] * 2, abs=1e-4)
