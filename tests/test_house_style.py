"""The order of the folders, and the sizes of the code, counted."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted((ROOT / "sparse_coding").rglob("*.py"))
BESIDE = sorted(p for name in ("benchmarks", "nanogpt_config") for p in (ROOT / name).glob("*.py"))
FILES = [*SCRIPTS, *MODULES, *BESIDE]
OF_TEXTS = ("docs", "assets", "benchmarks", "nanogpt_config", "results", "sparse_coding")
TEXTS = sorted([*ROOT.glob("*.md"), *(p for name in OF_TEXTS for p in (ROOT / name).rglob("*.md"))])
# room -> the rooms that it may import; all may import config and files
MAY_IMPORT = {"sae": "sae", "sweep": "sae sweep", "figures": "sae sweep figures",
              "toy": "sae sweep figures toy", "lm": "sae sweep figures lm",
              "rental": "sweep rental"}  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Modules that the file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return found | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_stands_before_it(path):
    room = path.relative_to(ROOT / "sparse_coding").parts[0]
    allowed = {"config", "files", *MAY_IMPORT.get(room, "").split()}
    for module in imports_of(path):
        package, _, rest = module.partition(".")
        assert package not in {script.stem for script in SCRIPTS}, module
        assert package != "sparse_coding" or rest.split(".")[0] in allowed, module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_functions_and_parameters_keep_their_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= (250 if path in SCRIPTS else 500)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        where = f"{path.name}:{node.lineno} {node.name}"
        limit = 60 if node.name == "train_" else 40  # the training loop
        assert node.end_lineno - node.lineno + 1 <= limit, where
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        parameters = [name for name in parameters if name not in ("self", "cls")]
        assert len(parameters) + len(node.args.kwonlyargs) <= 8, where


def test_no_folder_has_more_than_a_dozen_modules():
    for folder in {path.parent for path in MODULES}:
        assert len([p for p in folder.glob("*.py") if p.stem != "__init__"]) <= 12, folder


def without_docstring(node: ast.AST, name: str) -> list[str]:
    """Public definitions of a module or class that say nothing of themselves."""
    found = [] if ast.get_docstring(node) else [name]
    for inner in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
        kinds = (ast.FunctionDef, ast.ClassDef)
        if isinstance(inner, kinds) and not inner.name.startswith("_"):
            found += without_docstring(inner, inner.name)
    return found


@pytest.mark.parametrize("path", SCRIPTS + MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_public_says_what_it_is_for_and_no_exception_is_hidden(path):
    tree = ast.parse(path.read_text())
    assert without_docstring(tree, path.name) == []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} bare except"


def test_files_that_are_named_are_there():
    """Links of the READMEs, and paths below the root wherever they stand."""
    path = re.compile(
        r"\b(?:tests|docs|sparse_coding|benchmarks|results/20\d\d)[\w./-]*/[\w.-]+\.\w+"
    )
    link = re.compile(r"\]\((?!http)([^)#\s]+)")
    for file in [*TEXTS, *FILES]:
        text = file.read_text()
        named = path.findall(text) + (link.findall(text) if file in TEXTS else [])
        for name in named:
            assert (ROOT / name).exists() or (file.parent / name).exists(), f"{file}: {name}"
