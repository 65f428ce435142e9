"""colab.ipynb: the very cells that users run, on a small model and a small world.

They run in an environment of their own, which sees all packages of this one, and can install
more without changing it; from a clone of the working tree.
"""

import base64
import os
import re
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
from builders.browser import CHROMIUM, Browser
from builders.lm import CONTEXT, texts, write_model
from builders.models import write_parquet
from builders.scripts import ROOT, clean_environment, run_script
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = ROOT / "examples" / "colab.ipynb"
SMALL_TOY = ("--activation-dim 16 --n-true-features 32 --n-active 2 --n-steps 60 --batch-size 32 "
             "--l1-exp-low -2 --l1-exp-high 1 --log-every 20 --n-eval-samples 256 "
             "--device cpu")  # fmt: skip
SMALL_LM = (f"--layer 1 --context-length {CONTEXT} --held-out 0.2 --n-tokens 4000 --batch-size 64 "
            "--n-eval-tokens 500 --n-page-tokens 500 --device cpu")  # fmt: skip
IS_READY = "frames[0]?.document.querySelector('main')?.hidden === false"


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def cells_of_kind(notebook: nbformat.NotebookNode, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def write_wheel(folder: Path, name: str, version: str, *, needs: str = "") -> None:
    """A package of one empty module for pip, which needs another one or none."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {needs}\n" * bool(needs)
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        files = {f"{name}.py": "", f"{info}/METADATA": metadata, f"{info}/WHEEL": tag}
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/x"]))


def write_repository(folder: Path, *, requirement: str) -> None:
    """The working tree, less what the notebook has no use for, as a repository of one commit."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    options = dict(check=True, capture_output=True, text=True)
    listing = subprocess.run([*git, "ls-files", "-co", "--exclude-standard"], cwd=ROOT, **options)
    for name in listing.stdout.splitlines():
        if name.split("/")[0] not in ("tests", "results") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    with open(folder / "requirements.txt", "a") as file:
        file.write(f"{requirement}  # a test's\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "As it is"]):
        subprocess.run([*git, *command], cwd=folder, **options)


def write_environment(folder: Path) -> Path:
    """A venv that sees this one's packages and pip; its site-packages."""
    venv.create(folder)
    ours = sysconfig.get_paths()["purelib"]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "seen.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    # else CPU kernels would be compiled in the new clone; a T4 needs none
    (site / "llvmlite.py").write_text("raise ImportError('left out by a test')\n")
    kernel = folder / "share/jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    argv = f'["{folder}/bin/python", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (kernel / "kernel.json").write_text(f'{{"argv": {argv}, "display_name": "Python 3"}}')
    return site


class Colab:
    """A machine on which cells of the notebook run: root/sparse_coding is the clone."""

    def __init__(self, root: Path):
        self.root, self.wheels = root, root / "wheels"
        self.clone = root / "sparse_coding"
        self.site = write_environment(root / "venv")
        write_repository(root / "repository", requirement="lacking==1.0")

    def execute(self, notebook: nbformat.NotebookNode, injected: str) -> nbformat.NotebookNode:
        """Runs it, with a cell after its parameters, as papermill does it."""
        (at,) = (i for i, cell in enumerate(notebook.cells) if "tags" in cell.metadata)
        assert notebook.cells[at].metadata.tags == ["parameters"]
        places = f"REPOSITORY, FOLDER = {str(self.root / 'repository')!r}, {str(self.clone)!r}\n"
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(places + injected))
        environment = clean_environment(self.root) | {
            "PATH": f"{self.root}/venv/bin:{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "HF_HUB_OFFLINE": "1",
        }
        client = NotebookClient(notebook, timeout=600)
        return client.execute(cwd=str(self.root), env=environment)


@pytest.fixture
def colab(tmp_path, monkeypatch) -> Colab:
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "venv/share/jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return Colab(tmp_path)


def outputs_of(notebook: nbformat.NotebookNode, cell_id: str, kind: str) -> list[str]:
    """What a cell shows in a kind of output."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_the_notebook_is_committed_without_outputs_and_says_what_its_cells_do():
    notebook = read()
    nbformat.validate(notebook)
    for cell in cells_of_kind(notebook, "code"):
        assert (cell.outputs, cell.execution_count) == ([], None)
    assert len(cells_of_kind(notebook, "markdown")) >= 5
    for cell in cells_of_kind(notebook, "markdown"):
        assert len(cell.source.splitlines()) <= 12
    assert notebook.metadata.colab.gpuType == "T4"


@pytest.mark.parametrize(("script", "name"), [("replicate_toy_models.py", "TOY"), ("run.py", "LM")])
def test_every_flag_of_the_notebook_is_one_of_its_script(tmp_path, script, name):
    cells = {cell.id: cell.source for cell in read().cells}
    values: dict[str, str] = {}
    exec(cells["parameters"], values)
    (command,) = (line for line in "\n".join(cells.values()).splitlines() if script in line)
    assert f"{{{name}}}" in command
    flags = re.findall(r"--[\w-]+", command + values[name])
    assert {"--output-dir", "--wandb-mode"} < set(flags)
    shown = run_script([ROOT / script, "--help"], cwd=tmp_path)
    assert shown.code == 0
    assert set(flags) <= set(re.findall(r"--[\w-]+", shown.out))


@pytest.mark.long
def test_all_cells_run_and_show_the_figures_and_the_page_of_features(colab, tmp_path):
    write_wheel(colab.wheels, "lacking", "1.0")
    model = write_model(tmp_path / "model", "gpt_neox")
    text = write_parquet(tmp_path / "text.parquet", texts(300))
    before = set(colab.site.iterdir())
    done = colab.execute(
        read(),
        f"TOY += ' {SMALL_TOY}'\nLM += ' --model {model} --dataset {text} {SMALL_LM}'",
    )
    added = {path.name for path in set(colab.site.iterdir()) - before}
    assert added - {"__pycache__"} == {"lacking.py", "lacking-1.0.dist-info"}
    (figure,) = outputs_of(done, "show-toy", "image/png")
    assert base64.b64decode(figure) == (colab.clone / "outputs/toy/figures/mmcs.png").read_bytes()
    assert len(outputs_of(done, "show-lm", "image/png")) == 2
    (table,) = outputs_of(done, "show-lm", "text/html")
    assert re.findall(r"<td>(batchtopk|matryoshka|relu)</td>", table) == [
        arch for arch in ("batchtopk", "matryoshka", "relu") for _ in range(2)
    ]
    assert (colab.clone / "outputs/lm/features.html").is_file()
    (page,) = outputs_of(done, "show-features", "text/html")
    (tmp_path / "shown.html").write_text(f"<!doctype html><meta charset=utf-8>{page}")
    assert_page_works(tmp_path)


def assert_page_works(folder: Path) -> None:
    """The page of features opens within another page, and a feature can be chosen."""
    if not CHROMIUM:
        assert "CI" not in os.environ, "CI needs Chromium"
        return
    browser = Browser(folder / "profile")
    browser.open(folder / "shown.html")
    browser.wait(IS_READY)
    browser.run("frames[0].document.querySelector('.option:last-child').click()")
    browser.run("new Promise(resolve => setTimeout(resolve, 500))")  # it writes its address late
    heading = browser.run("frames[0].document.querySelector('#name').textContent")
    assert heading.startswith("Feature ")
    assert browser.complaints() == []
    browser.close()


def only(notebook: nbformat.NotebookNode, *ids: str) -> nbformat.NotebookNode:
    notebook.cells = [cell for cell in notebook.cells if cell.id in ids]
    return notebook


@pytest.mark.parametrize("wheel", ["", "torch==0.1"])
def test_what_pip_cannot_add_beside_the_torch_that_is_there_stops_the_notebook(colab, wheel):
    """A package that is nowhere, and one that needs another torch."""
    if wheel:
        write_wheel(colab.wheels, "lacking", "1.0", needs=wheel)
        write_wheel(colab.wheels, "torch", "0.1")
    with pytest.raises(CellExecutionError, match="pip failed"):
        colab.execute(only(read(), "parameters", "clone", "install"), "")
    assert not list(colab.site.glob("torch*"))


def test_without_an_address_the_notebook_asks_for_one(colab):
    with pytest.raises(CellExecutionError, match="give REPOSITORY above the address"):
        colab.execute(only(read(), "parameters", "clone"), "REPOSITORY = ''")


def test_a_script_that_fails_stops_the_notebook(colab):
    write_wheel(colab.wheels, "lacking", "1.0")
    cells = only(read(), "parameters", "clone", "train-toy")
    with pytest.raises(CellExecutionError, match="it failed: see above"):
        colab.execute(cells, "TOY += ' --no-such-flag 1'")
