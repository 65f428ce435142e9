"""Python's documentation: topics, and of each module its docstrings or its source, not both."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from sparse_coding.lm.documents import open_documents, stdlib_files
from sparse_coding.lm.packaged.pydoc_pages import page_of, python_pages

MODULE = '''"""Of the module."""
import os

def f(x, *, y: int = 1):
    """Doubles.

    Indented.
    """
    return 2 * x

class A(Base):
    async def g(self): "Of g."
    def silent(self): return 1

class B:
    """Of B."""
    def h(self): "Of h."
'''

PAGE = """Of the module.

def f(x, *, y: int=1):
    Doubles.

    Indented.

    def g(self):
        Of g.

class B:
    Of B.

    def h(self):
        Of h.
"""


def test_a_page_has_each_docstring_below_what_it_is_of():
    assert page_of(MODULE) == PAGE
    assert page_of("x = 1").strip() == ""
    assert page_of("no python").strip() == ""


def test_every_topic_and_module_is_there_once_in_a_mixed_order():
    texts = list(open_documents("pydoc"))
    assert set(topics.values()) <= set(texts)
    assert texts == list(open_documents("pydoc"))
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {p.relative_to(root).as_posix(): p.read_text("utf-8", "replace")
               for p in stdlib_files()}  # fmt: skip
    there, page = set(texts), {name: page_of(source) for name, source in sources.items()}
    for name, source in sources.items():
        if page[name].strip() and page[name] != source and name != "pydoc_data/topics.py":
            assert (source in there) != (page[name] in there), name
    n_sources = sum(source in there for source in sources.values())
    assert 0.15 < n_sources / len(sources) < 0.35  # one in four: 737 modules, .016 either way
    in_order = [text in set(topics.values()) for text in texts]
    assert any(in_order[: len(texts) // 4])
    assert any(in_order[3 * len(texts) // 4 :])


def test_files_below_another_root_are_named_from_there(tmp_path):
    (tmp_path / "a.py").write_text(MODULE)
    texts = list(python_pages(tmp_path, [tmp_path / "a.py"]))
    assert len(texts) == len(topics) + 1
    assert {PAGE, MODULE} & set(texts)
