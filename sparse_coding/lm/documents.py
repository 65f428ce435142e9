"""Where text comes from: the standard library, local files, a dataset of the Hugging Face hub.

Documents are streamed in a fixed order, so memory stays flat whatever the size of the text.
"""

import codecs
import contextlib
import io
import math
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TextIO

import numpy as np

from sparse_coding.config import DISK_ERRORS, UserError, first_line, hash63, one_line, require
from sparse_coding.files import content_stamp, parse_json
from sparse_coding.lm.packaged.pydoc_pages import python_pages

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# commits of hub datasets that we name, so that a run means the same text next year
PINNED = {
    "NeelNanda/pile-10k": "127bfedcd5047750df5ccf3a12979a47bfa0bafa",
    "Skylion007/openwebtext": "79d93d786212f7344586290adb811d4ae6a1762c",
}
SUFFIXES = (".txt", ".jsonl", ".parquet")  # of local files that we read
PACKED = {".gz": "gzip", ".zst": "zstd"}  # suffix after .txt or .jsonl -> pyarrow's name of it
READ = ".txt, .jsonl, .parquet, .txt.gz, .jsonl.zst, ..."  # in words
END_OF_TEXT = "<|endoftext|>"  # parts the documents of a .txt that has it (TinyStories, GPT-2)
PIECE = 10_000  # characters: about how long the documents of a long .txt without it become
LONGEST = 3 * PIECE  # characters of a .txt that stay one document
PARAGRAPH_ENDS = (("\n\n", 2), ("\n", 1))  # of a paragraph, or at least of a line: see in_pieces
BLOCK = 2**20  # characters or bytes read at once
LONGEST_LINE = 2**27  # characters of a line of .jsonl, which is parsed whole; ours
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell writes it
UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
FEW_BROKEN, BROKEN = 10, 1e-3  # characters that are no UTF-8, and their share: more is no accident
DEEP = 500  # of JSON from the hub at most: in its reader some thousands end the process
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)  # of JSON
BRACKETS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # a step into it and one out of it, int8
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
UNREAD = 5  # files of a folder, so many of which are named
ROWS = 16  # rows of a parquet file read at once: a few kB may hold rows of many MB
# left out of it: installed packages, and tests, which many distributions lack
STDLIB = Path(sysconfig.get_paths()["stdlib"])
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Documents:
    """A source of text. Iterating gives its texts, none empty, in the same order each time.

    Raises (when iterated):
        UserError: a file or row that can't be read, no text at all, the hub out of reach.
    """

    name: str  # as given: "stdlib", "NeelNanda/pile-10k", a file or a folder
    revision: str  # commit of a hub dataset; a digest of files, after "python 3.x.y" for stdlib
    read: Callable[[], Iterator[object]] = field(repr=False, compare=False)  # texts, uncleaned

    def __iter__(self) -> Iterator[str]:
        empty = True
        for text in self.read():
            require(
                text is None or isinstance(text, str),
                f"{self.name}: a {type(text).__name__} where text was expected: "
                "choose another --text-column",
            )
            if text and not text.isspace():
                empty = False
                # half a surrogate pair, which json may hold, is no character: becomes "?"
                yield text if text.isascii() else text.encode("utf-8", "replace").decode()
        require(not empty, f"{self.name} has no text in it: choose another --dataset")


def open_documents(dataset: str, *, text_column: str = "text", revision: str = "") -> Documents:
    """The documents of a dataset; the first is read at once, so that a bad source fails here.

    Args:
        dataset: of OF_PYTHON; a .txt, .jsonl or .parquet file, the first two also as .gz or .zst,
            or a folder of them; a hub dataset, see HubDataset
        text_column: of .jsonl, .parquet and hub datasets
        revision: of a hub dataset; "": the one that we pin, else what is in the cache, else main
    Raises:
        UserError: no such file, dataset or column, no text, the hub out of reach.
    """
    documents = _find(dataset, text_column, revision)
    next(iter(documents))
    return documents


def document_id(text: str) -> int:
    """63 bits of sha256 of the text: equal texts share it, so a copy never straddles a split."""
    return hash63(text.encode())


def is_held_out(document_id: int, share: float) -> bool:
    """Whether the document is among the `share` (0 to 1) of all that are kept for evaluation.

    It depends on the id alone, and what a smaller share holds out, a larger one does too.
    """
    return document_id < share * 2**63


def in_batches(texts: Iterable[str], n_characters: int) -> Iterator[list[str]]:
    """Lists of texts of at most so many characters together; a longer text is alone."""
    batch, n_held = [], 0
    for text in texts:
        if batch and n_held + len(text) > n_characters:
            yield batch
            batch, n_held = [], 0
        batch.append(text)
        n_held += len(text)
    if batch:
        yield batch


def in_pieces(
    text: str, size: int, *, longest: int, ends: tuple[tuple[str, int], ...]
) -> Iterator[str]:
    """Pieces of 1 to 2 x size characters, then the rest, not longer than `longest`.

    ends: (mark, offset): a piece ends so many characters after the start of the first of the marks
        that occurs where it may end
    """
    start = 0
    while len(text) - start > longest:
        low, high = start + size, start + 2 * size
        cuts = (text.find(mark, low, high) + offset for mark, offset in ends)
        cut = next((cut for cut in cuts if cut >= low), high)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _find(dataset: str, text_column: str, revision: str) -> Documents:
    if dataset in OF_PYTHON:
        revision = f"python {platform.python_version()} {content_stamp(stdlib_files())}"
        return Documents(dataset, revision, OF_PYTHON[dataset])
    path = Path(dataset).expanduser()
    if path.exists():
        files = local_files(path)
        print(unread_note(path), end="", flush=True)
        return Documents(
            dataset,
            f"{content_stamp(files)} {text_column}",
            lambda: _local_texts(files, text_column),
        )
    hub = HubDataset.named(dataset)
    require(hub is not None, f"--dataset {dataset}: no such file or folder")
    return _hub_documents(hub, text_column, revision or PINNED.get(hub.id, ""))


def stdlib_files() -> list[Path]:
    """The .py files of the standard library, sorted."""
    paths = []
    for folder, inner, names in os.walk(STDLIB):
        inner[:] = sorted(set(inner) - NOT_STDLIB)  # in place: os.walk leaves the others out
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(paths)


def _stdlib_texts() -> Iterator[str]:
    for path in stdlib_files():
        yield path.read_text("utf-8", errors="replace")


# what Python brings along: its library's sources; its documentation
OF_PYTHON = {
    "stdlib": _stdlib_texts,
    "pydoc": lambda: python_pages(STDLIB, stdlib_files()),
}


def local_files(path: Path) -> list[Path]:
    """The file, or those of the folder that we can read, sorted."""
    if path.is_dir():
        files = [p for p in _visible_files(path) if kind_of(p)]
        require(bool(files), f"{path} holds no file that we read: {READ}")
        return files
    require(bool(kind_of(path)), f"{path}: can read {READ} only")
    require(path.stat().st_size > 0, f"{path} is empty")
    return [path]


def kind_of(path: Path) -> str:
    """That of SUFFIXES which its name ends with, packed or not; "" of a file that we don't read."""
    if path.suffix not in PACKED:
        return path.suffix if path.suffix in SUFFIXES else ""
    inner = Path(path.stem).suffix
    return inner if inner in (".txt", ".jsonl") else ""


def _visible_files(folder: Path) -> list[Path]:
    """All in it but hidden ones (.git, ._x.txt of macOS, .ipynb_checkpoints), sorted."""
    inner = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in inner if not any(n[0] == "." for n in p.relative_to(folder).parts))


def unread_note(path: Path) -> str:
    """A line that names files of a folder that are not read, as zipped ones; "" without any."""
    unread = [p for p in _visible_files(path) if not kind_of(p)] if path.is_dir() else []
    names = ", ".join(p.relative_to(path).as_posix() for p in unread[:UNREAD])
    more = f" and {len(unread) - UNREAD:,} more" if len(unread) > UNREAD else ""
    line = f"{path}: not read: {names}{more} (but {READ} are; unpack others first)"
    return (one_line(line) + "\n") * bool(unread)


def _local_texts(files: list[Path], text_column: str) -> Iterator[object]:
    for path in files:
        if kind_of(path) == ".parquet":
            yield from _parquet_texts(path, text_column)
            continue
        encoding = encoding_of(path)
        with _unpacked(path) as raw, io.TextIOWrapper(raw, encoding, errors="replace") as file:
            if kind_of(path) == ".txt":
                yield from _cut(file)
            else:
                lines = enumerate(_lines(file, path), 1)
                rows = ((n, line) for n, line in lines if not line.isspace())
                yield from (_pick(_parse(path, n, line), text_column, path) for n, line in rows)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, of a .gz or .zst what is packed in it, as it is read. Raises UserError, on
    reading, if that is damaged."""
    with open(path, "rb") as file:
        if path.suffix not in PACKED:
            yield file
            return
        import pyarrow  # it reads both kinds, and all frames of a file

        try:
            with pyarrow.input_stream(file, compression=PACKED[path.suffix]) as unpacked:
                yield unpacked
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            why = f"no whole {path.suffix} file ({one_line(first_line(error))[:200]})"
            raise UserError(f"{path} is {why}: fetch it again") from None


def encoding_of(path: Path) -> str:
    """UTF-16 or UTF-32 if the file begins with their byte order mark, else UTF-8.

    Raises:
        UserError: its start is not text in that encoding, but for single broken characters.
    """
    with _unpacked(path) as file:
        start = file.read(BLOCK)
    encoding = "utf-8-sig"
    if start.startswith((*UTF_32, *UTF_16)):
        encoding = "utf-32" if start.startswith(UTF_32) else "utf-16"
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    text = decoder.decode(start)
    n_broken = text.count("\0") + text.count("\ufffd") - start.count("\ufffd".encode())
    refused = n_broken > max(FEW_BROKEN, BROKEN * len(text))
    remedy = f"unpack it, or `iconv -f ITS-ENCODING -t UTF-8 {path.name}`, or leave it out"
    require(not refused, f"{path} is not text in UTF-8: {remedy}")
    return encoding


def _cut(file: TextIO) -> Iterator[str]:
    """Documents of a text file: between <|endoftext|>; what is long is cut at paragraph ends.

    The cuts depend on the text alone, not on the blocks in which it is read.
    """
    rest = ""
    while block := file.read(BLOCK):
        *whole, rest = (rest + block).split(END_OF_TEXT)
        for text in whole:
            yield from in_pieces(text, PIECE, longest=LONGEST, ends=PARAGRAPH_ENDS)
        *pieces, rest = in_pieces(rest, PIECE, longest=LONGEST, ends=PARAGRAPH_ENDS)
        yield from pieces
    yield rest


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Of a .jsonl. Raises UserError for one that would not fit into memory in good time."""
    while line := file.readline(LONGEST_LINE + 1):
        require(
            len(line) <= LONGEST_LINE,
            f"{path} has a line of more than {LONGEST_LINE >> 20} MB: give its text as a .txt, or "
            "part it into documents",
        )
        yield line


def _parse(path: Path, number: int, line: str) -> object:
    return parse_json(line, f"{path} line {number}", remedy="mend or leave out the line")


def _pick(row: object, column: str, source: Path | str) -> object:
    require(isinstance(row, dict), f"{source}: a row is a {type(row).__name__}, not an object")
    require(column in row, _no_column(source, column, row))
    return row[column]


def _no_column(source: Path | str, column: str, columns: Iterable[str]) -> str:
    return f"{source} has no column {column!r}: --text-column must be one of {', '.join(columns)}"


def _parquet_texts(path: Path, column: str) -> Iterator[object]:
    with opened_parquet(path) as file:
        names = file.schema_arrow.names
        require(column in names, _no_column(path, column, names))
        for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
            yield from (text.as_py() for text in batch.column(0))


@contextlib.contextmanager
def opened_parquet(path: Path) -> "Iterator[ParquetFile]":
    """The file, whose row groups are read piece by piece whatever their size. Raises UserError, on
    opening or later, if it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            yield file
    # damaged pages; text that is no UTF-8
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = one_line(first_line(error))[:200]
        raise UserError(f"{path} is not a whole parquet file ({why}): fetch it again") from None


# --- the hub ---


@dataclass(frozen=True)
class HubDataset:
    """ID, ID:CONFIG, ID@SPLIT or ID:CONFIG@SPLIT. Without a configuration the default one is meant,
    without a split "train"."""

    name: str  # as given
    id: str
    config: str | None
    split: str

    @classmethod
    def named(cls, name: str) -> "HubDataset | None":
        """None if it is not written like one."""
        found = re.fullmatch(
            r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([\w.+-]+))?(?:@([\w.]+))?", name
        )
        if not found or Path(name).suffix in (*SUFFIXES, *PACKED, ".bin"):
            return None
        return cls(name, found[1], found[2], found[3] or "train")


def dataset_commit(dataset: str, revision: str) -> str:
    """The commit that the revision of a hub dataset stands for now, from the cache if it is there,
    else asked of the hub; revision itself where the dataset is none of the hub.

    Raises:
        UserError: no such dataset or revision, the hub out of reach.
    """
    here = dataset in OF_PYTHON or os.path.exists(Path(dataset).expanduser())
    hub = None if here else HubDataset.named(dataset)
    if not hub:
        return revision
    revision = revision or PINNED.get(hub.id, "")
    cached = _cached(hub.id, revision)
    return cached.name if cached else _resolve(hub.id, revision)


def _hub_documents(hub: HubDataset, text_column: str, revision: str) -> Documents:
    """From the hub's cache if it is there, else streamed from the hub."""
    cached = _cached(hub.id, revision)
    sha = cached.name if cached else _resolve(hub.id, revision)

    def texts() -> Iterator[object]:
        from huggingface_hub import errors

        of_the_hub = () if cached else (OSError, errors.HTTPError)
        with hub_errors(hub.id, sha, what="dataset"):
            try:
                if cached:
                    _require_shallow(cached)
                where, options = (str(cached), {}) if cached else (hub.id, {"revision": sha})
                for row in _rows(hub, where, **options):
                    yield _pick(row, text_column, hub.name)
            except (UserError, *of_the_hub):
                raise
            except Exception as error:  # of damaged files datasets and pyarrow raise nearly any
                why = one_line(" ".join(str(error).split()))[:300]
                again = f"hf download {hub.id} --repo-type dataset --force-download"
                raise UserError(
                    f"{hub.name} can't be read: {why}; `{again}` fetches it anew"
                ) from None

    return Documents(hub.name, sha, texts)


def _require_shallow(folder: Path) -> None:
    """Raises UserError for JSON, packed or not, nested so deep that its reader would crash."""
    import fsspec

    for path in sorted(folder.rglob("*")):
        if {".json", ".jsonl"} & set(path.suffixes) and path.is_file():
            with fsspec.open(str(path), "rb", compression="infer") as file:
                require(
                    nesting(file) <= DEEP,
                    f"{path} is nested more than {DEEP} deep: choose another --dataset",
                )


def nesting(file: BinaryIO) -> float:
    """How deep its JSON is nested at most, brackets in texts aside; read block by block. Infinite
    for a text that is too long."""
    depth, deepest, rest = 0, 0, b""
    while block := file.read(BLOCK + len(rest)):  # as much more as is read again
        outside, quote, rest = STRING.sub(b"", rest + block).partition(b'"')
        rest = quote + rest  # of a text that goes on
        steps = np.frombuffer(outside.translate(BRACKETS, NO_BRACKETS), np.int8)
        if len(steps):
            depths = depth + steps.cumsum(dtype=np.int64)
            depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
        if len(rest) > LONGEST_LINE:
            return math.inf
    return deepest


def _rows(hub: HubDataset, where: str, **options: str) -> Iterator[object]:
    """Streamed: no second copy of the data on the disk. Raises UserError for a configuration or a
    split that isn't there, or a configuration that has to be chosen."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too
    names = datasets.get_dataset_config_names(where, **options)
    config = hub.config or datasets.get_dataset_default_config_name(where, **options)
    use = f"use --dataset {hub.id}:CONFIG@SPLIT"
    none = f"no configuration {hub.config}" if hub.config else "no default configuration"
    require(config in names, f"{hub.id} has {none}: {use} with one of {', '.join(names)}")
    splits = datasets.load_dataset(where, config, streaming=True, **options)
    none = f"no split {hub.split}"
    require(hub.split in splits, f"{hub.name} has {none}: {use} with one of {', '.join(splits)}")
    return iter(splits[hub.split])


def _cached(dataset: str, revision: str) -> Path | None:
    """The folder of the dataset in the hub's cache; None if it is not there or not whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = dict(repo_type="dataset", revision=revision or None, local_files_only=True)
    with hub_errors(dataset, revision, what="dataset"):
        try:
            folder = Path(snapshot_download(dataset, **options))
        except LocalEntryNotFoundError:
            return None
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.is_file()]
    data = [name for name in files if not name.endswith((".md", ".gitattributes"))]
    # train-00002-of-00005: each such name must stand there 5 times
    parts = [re.split(r"-\d{5}-of-(?=\d{5})", name) for name in data]
    counts = Counter((p[0], int(p[1][:5])) for p in parts if len(p) == 2)
    whole = all(count == wanted for (_, wanted), count in counts.items())
    return folder if data and whole else None


def _resolve(dataset: str, revision: str) -> str:
    """The commit of a revision (default main), asked of the hub."""
    from huggingface_hub import HfApi

    with hub_errors(
        dataset, revision, what="dataset"
    ):  # fails at once without network; datasets retries
        return HfApi().dataset_info(dataset, revision=revision or None).sha


@contextlib.contextmanager
def hub_errors(name: str, revision: str, *, what: Literal["model", "dataset"]) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors

    no_such = f"no such {what}: {name} is no local folder or file, and"
    try:
        yield
    except errors.HFValidationError:
        raise UserError(f"{no_such} no hub id") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{no_such} not on the hub (or private: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision} on the hub") from None
    except (OSError, errors.HTTPError) as error:
        fetch = f"hf download {name}" + " --repo-type dataset" * (what == "dataset")
        fetch += f" --revision {revision}" * (revision not in ("", "main"))
        raise UserError(
            f"{name} is no local folder or file and not in the cache, and the hub is out of reach "
            f"({first_line(error)}): fetch it beforehand with `{fetch}`"
        ) from None
