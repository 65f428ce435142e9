"""The documentation of the Python at hand as texts: English with some code in it.

Texts are the topics of help() (help("TRUTHVALUE"), ...) and a page for each module of the library:
its docstrings, each below the line that defines what it is of, as help() shows them. One module in
SOURCES is there as its source instead, so that no docstring comes twice. All of it is under the
PSF's licence.
"""

import ast
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparse_coding.config import hash63

SOURCES = 4  # ours: gives half of the text


def python_pages(root: Path, files: Iterable[Path]) -> Iterator[str]:
    """The texts in an order of their own, so that the first ones are of all kinds.

    files: the library's, below root
    """
    from pydoc_data.topics import topics

    names = {path.relative_to(root).as_posix(): path for path in files}
    names.pop("pydoc_data/topics.py", None)  # the topics
    for name in sorted([*topics, *names], key=lambda name: hash63(name.encode())):
        if name in topics:
            yield topics[name]
            continue
        source = names[name].read_text("utf-8", errors="replace")
        yield source if hash63(f"source of {name}".encode()) % SOURCES == 0 else page_of(source)


def page_of(source: str) -> str:
    """The docstrings of a module, each below what it is of; "" if there is none or no Python."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, or null bytes
        return ""
    return "\n\n".join(_entries(module, depth=0)) + "\n"


def _entries(node: ast.AST, *, depth: int) -> Iterator[str]:
    documentation = ast.get_docstring(node)
    head = _head(node)
    if documentation:
        text = textwrap.indent(documentation, "    " * bool(head))
        yield textwrap.indent(f"{head}\n{text}" if head else text, "    " * depth)
    for inner in node.body:
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _entries(inner, depth=depth + bool(head))


def _head(node: ast.AST) -> str:
    """The line that defines it."""
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"
