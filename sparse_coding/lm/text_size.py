"""How much text a source has, before it is read: for the disk and the time left."""

import os
from itertools import islice
from pathlib import Path

from sparse_coding.lm.documents import Documents, local_files, stdlib_files
from sparse_coding.lm.tokenizer import Tokenizer

# bytes of text, from the dataset's card on the hub
ON_THE_HUB = {"Skylion007/openwebtext": 39_769_491_688}
SAMPLE = 1000  # documents from which the tokens of all are estimated


def text_bytes(source: str, text_column: str) -> int | None:
    """Bytes of the source's text, with the marks between texts of .jsonl; None: not known.

    Args:
        source: as open_documents takes it
    Raises:
        UserError: a folder without a file that we can read.
    """
    if source in ON_THE_HUB:
        return ON_THE_HUB[source]
    if source == "stdlib":
        return sum(os.path.getsize(path) for path in stdlib_files())
    path = Path(source).expanduser()
    if not path.exists():
        return None
    return sum(
        _column_bytes(p, text_column) if p.suffix == ".parquet" else p.stat().st_size
        for p in local_files(path)
    )


def _column_bytes(path: Path, column: str) -> int:
    """Of a column of a parquet file, uncompressed."""
    from pyarrow.parquet import read_metadata

    about = read_metadata(path)
    groups = (about.row_group(i) for i in range(about.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


def expected_tokens(documents: Documents, tokenizer: Tokenizer, n_bytes: int) -> float:
    """Tokens of n_bytes of text, with one between documents, going by the first documents."""
    texts = list(islice(documents, SAMPLE))
    n_tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts))
    return n_bytes * n_tokens / sum(len(text.encode()) for text in texts)
