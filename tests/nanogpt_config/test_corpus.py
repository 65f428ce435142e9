"""corpus.py: text out of packages of pip and of Debian."""

import json
import platform
import shutil
import subprocess
import zipfile
from pathlib import Path

import corpus
import pytest
from corpus import Package

from sparse_coding.config import UserError
from sparse_coding.lm.documents import open_documents

LONG = "This operation lists what there is, a page at a time, in the order of its making. " * 4
PAGE = """<html><head><title>Not shown</title></head><body><nav>Menu</nav>
<h1>The  title</h1><p>One <b>bold</b> word
and more.</p><script>let no = 1 < 2;</script><pre>if x:
    y &lt; 3
</pre></body></html>"""


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_page_becomes_the_text_that_a_reader_sees():
    assert corpus.text_of_html(PAGE) == "The title\n\nOne bold word and more.\n\nif x:\n    y < 3\n"


def test_descriptions_are_found_anywhere_in_json_if_they_are_long_and_without_tags():
    service = {
        "documentation": f"<p>{LONG}</p>",
        "shapes": [{"name": LONG, "documentation": "short"}, {"description": LONG.upper()}],
        "description": {"documentation": 3},
    }
    assert list(corpus.descriptions_in(service)) == [LONG.strip(), LONG.upper().strip()]


def test_files_of_the_kinds_asked_for_are_read_and_a_description_once(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b/c.json").write_text(json.dumps([{"documentation": LONG}] * 2))
    (tmp_path / "b/d.json").write_text(json.dumps({"description": LONG, "more": {}}))
    (tmp_path / "e.txt").write_text("not asked for")
    assert list(corpus.documents_of(tmp_path, (".py", ".json"))) == ["x = 1\n", LONG.strip(), ""]


def write_wheel(folder: Path, files: dict[str, str]) -> None:
    info = "texts-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir()
    with zipfile.ZipFile(folder / "texts-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


@pytest.fixture
def without_network(tmp_path, monkeypatch) -> Path:
    """pip looks in this folder alone; the library of Python is one long text."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels"),
                        "PIP_CONFIG_FILE": "/dev/null"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(corpus, "open_documents", lambda name: [f"{name} {LONG}"])
    return tmp_path / "wheels"


def test_packages_become_documents_none_twice_none_too_long_and_are_fetched_once(
    tmp_path, without_network, monkeypatch
):
    long = "\n\n".join(f"{i} {LONG}" for i in range(300))
    write_wheel(without_network, {"a.py": long, "b.py": long, "c.py": "short", "d.txt": LONG})
    packages = (Package("texts", "1.0", "MIT", (".py",)),)
    made = corpus.build(tmp_path / "text", packages)
    documents = texts_in(tmp_path / "text/texts.jsonl")
    assert "".join(documents) == long  # of a.py; b.py is the same
    assert all(corpus.SHORTEST <= len(text) <= corpus.LONGEST for text in documents)
    assert made == [
        dict(name="python", version=platform.python_version(), licence="PSF-2.0", documents=1,
             bytes=len(LONG) + len("stdlib ")),
        dict(name="texts", version="1.0", licence="MIT", documents=len(documents),
             bytes=len(long)),
    ]  # fmt: skip
    assert sorted(open_documents(str(tmp_path / "text"))) == sorted([*documents, f"stdlib {LONG}"])
    shutil.rmtree(without_network)
    assert corpus.build(tmp_path / "text", packages) == made


def test_what_pip_cannot_fetch_is_one_line_and_leaves_no_file(tmp_path, without_network):
    with pytest.raises(UserError, match=r"pip can't fetch texts 1\.0 \(ERROR: No matching"):
        corpus.build(tmp_path / "text", (Package("texts", "1.0", "MIT", (".py",)),))
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["python.jsonl"]


DEPENDS = "Package: manual\nDepends: libjs-x (>= 1), manual-15, other-doc\n"
APT = """#!/bin/sh
case "$0 $1" in
  *apt-cache*) printf '%s' '{depends}' ;;
  *) [ "$3" = manual-15 ] && cp {deb} manual-15_1_all.deb ;;
esac
"""


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_documentation_of_debian_is_that_of_the_version_on_which_a_package_depends(
    tmp_path, without_network, monkeypatch
):
    """With an apt-get and apt-cache of the test's own, and a real package."""
    tree, bin_folder = tmp_path / "tree", tmp_path / "bin"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: manual-15\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control)
    (tree / "page.html").write_text(f"<p>{LONG}</p>")
    deb = tmp_path / "manual.deb"
    subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
    bin_folder.mkdir()
    for name in ("apt-get", "apt-cache"):
        (bin_folder / name).write_text(APT.format(depends=DEPENDS, deb=deb))
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    made = corpus.build(tmp_path / "text", (Package("manual", "", "MIT", (".html",)),))
    assert [about["name"] for about in made] == ["python", "manual"]
    assert texts_in(tmp_path / "text/manual.jsonl") == [LONG.strip() + "\n"]


def test_without_apt_get_what_it_would_fetch_is_left_out_and_said(
    tmp_path, without_network, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    made = corpus.build(tmp_path / "text", (Package("manual", "", "MIT", (".html",)),))
    assert [about["name"] for about in made] == ["python"]
    assert "left out: manual, which apt-get can't fetch here" in capsys.readouterr().out


def test_every_package_has_a_licence_that_permits_and_a_version_or_debian():
    free = {"BSD-3-Clause", "MIT", "Apache-2.0", "PSF-2.0", "public domain", "PostgreSQL"}
    assert {package.licence for package in (*corpus.PACKAGES, corpus.STDLIB)} <= free
    assert len({package.name for package in corpus.PACKAGES}) == len(corpus.PACKAGES)
