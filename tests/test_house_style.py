"""The floors and sizes of the code, counted."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted(p for p in (ROOT / "sparse_coding").glob("*.py") if p.stem != "__init__")
FILES = (
    SCRIPTS
    + MODULES
    + [
        *sorted((ROOT / "benchmarks").glob("*.py")),
        *sorted((ROOT / "nanogpt_config").glob("*.py")),
    ]
)
FLOORS = [
    {"config", "files", "remote_job"},
    {"sweep", "results", "distributed", "hardware", "toy_data", "metrics", "members", "ensemble",
     "plotting", "tracking", "progress", "autoencoder", "documents", "vocabulary", "tokenizer",
     "corpus", "text_size", "token_bin", "packing", "pretrained", "nanogpt", "language_model",
     "feature_data", "lm_grid", "cpu_engine", "cpu_setup", "row_kernels", "sparse_kernels",
     "batches", "stack", "gpu_engine", "gpu_kernels", "gpu_updates", "rental_terms",
     "rental_records", "rental_preflight", "remote", "vast"},
    {"cells", "evaluation", "training", "toy_cells", "report", "replication", "bin_writer",
     "subject", "activations", "activation_store", "reader", "lm_evaluation", "lm_cells",
     "lm_results", "frontier", "run_figures", "feature_page", "export", "sweep_script",
     "rental_desk", "rental_machine", "rental_results", "rental_shard"},
    {"rental", "rental_round", "rental_commands"},
]  # fmt: skip
# arrows within a floor: none but these
ARROWS = {
    "files": {"config"},
    "row_kernels": {"members"},
    "sparse_kernels": {"members", "row_kernels"},
    "cpu_setup": {"row_kernels", "sparse_kernels"},
    "cpu_engine": {"cpu_setup", "members", "row_kernels", "sparse_kernels"},
    "stack": {"members"},
    "hardware": {"cpu_setup"},
    "gpu_kernels": {"members"},
    "gpu_updates": {"gpu_kernels", "members"},
    "gpu_engine": {"cpu_engine", "gpu_kernels", "gpu_updates", "members", "stack"},
    "ensemble": {"cpu_engine", "cpu_setup", "gpu_engine", "members", "stack"},
    "batches": {"cpu_setup"},
    "tokenizer": {"pretrained", "vocabulary"},
    "corpus": {"documents", "tokenizer"},
    "token_bin": {"corpus", "tokenizer", "vocabulary"},
    "packing": {"corpus", "documents"},
    "lm_grid": {"sweep"},
    "text_size": {"documents", "tokenizer"},
    "language_model": {"nanogpt", "pretrained"},
    "progress": {"tracking"},
    "vast": {"rental_terms"},
    "rental_records": {"rental_terms"},
    "rental_preflight": {"results"},
    "rental_machine": {"rental_desk"},
    "rental_results": {"rental_machine"},
    "rental_shard": {"rental_desk", "rental_machine", "rental_results"},
    "rental_round": {"rental"},
    "rental_commands": {"rental", "rental_round"},
    "training": {"cells"},
    "sweep_script": {"cells", "training"},
    "toy_cells": {"cells", "evaluation", "training"},
    "replication": {"report"},
    "activation_store": {"activations"},
    "subject": {"activation_store"},
    "reader": {"activations"},
    "lm_cells": {"activation_store", "activations", "cells", "evaluation", "lm_evaluation",
                 "reader", "subject", "training"},
    "run_figures": {"frontier"},
    "lm_results": {"export", "feature_page", "lm_cells", "lm_evaluation", "report", "run_figures",
                   "subject"},
}  # fmt: skip


def floor_of(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


def imports_of(path: Path) -> set[str]:
    """Modules of the package that the file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "sparse_coding":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparse_coding."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_imports_only_from_lower_floors(path):
    for other in imports_of(path) - ARROWS.get(path.stem, set()):
        assert floor_of(other) < floor_of(path.stem), f"{path.stem} imports {other}"


def test_every_module_has_a_floor():
    assert {p.stem for p in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_functions_and_parameters_keep_their_sizes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= (250 if path in SCRIPTS else 300)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        where = f"{path.name}:{node.lineno} {node.name}"
        limit = 60 if node.name == "train_" else 40  # the training loop
        assert node.end_lineno - node.lineno + 1 <= limit, where
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        parameters = [name for name in parameters if name not in ("self", "cls")]
        assert len(parameters) + len(node.args.kwonlyargs) <= 8, where


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_module_says_what_it_is_for_and_hides_no_exception(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} bare except"
