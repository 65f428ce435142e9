"""bin_writer.py: what a text needs is known before it is read."""

import gzip
import json

import pytest
from bin_writer import expected_tokens, read_made, text_bytes
from builders.models import write_parquet

from sparse_coding.config import UserError
from sparse_coding.lm.documents import open_documents
from sparse_coding.lm.tokenizer import load_tokenizer


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_what_a_local_text_needs_is_known_within_a_fifth(tmp_path, suffix):
    texts = [f"{i} " + "some words of text " * 20 for i in range(300)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        write_parquet(path, texts)
    else:
        rows = [json.dumps({"text": text}) for text in texts]
        path.write_text("\n".join(rows) if suffix == "jsonl" else "<|endoftext|>".join(texts))
    n_bytes = text_bytes(str(path), "text")
    assert n_bytes == pytest.approx(len("".join(texts)), rel=0.2)
    documents = open_documents(str(path))
    tokenizer = load_tokenizer("", choice="bytes", vocab_size=257)
    n_tokens = sum(len(text) + 1 for text in texts)
    assert expected_tokens(documents, tokenizer, n_bytes) == pytest.approx(n_tokens, rel=0.2)


def test_what_a_packed_text_needs_is_not_known(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    assert text_bytes(str(tmp_path), "text") is None


def test_a_damaged_parquet_file_is_named_before_it_is_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one"])
    (tmp_path / "b.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(UserError, match=r"b\.parquet is not a whole parquet file"):
        text_bytes(str(tmp_path), "text")


@pytest.mark.parametrize("n", [2**62, 2**53 + 1, -1, 0.5, "1"])
def test_a_progress_of_more_documents_than_there_can_be_is_refused(tmp_path, n):
    splits = {"train": {"documents": n}, "val": {"documents": n}}
    (tmp_path / "progress.json").write_text(json.dumps({"constants": {}, "splits": splits}))
    with pytest.raises(UserError, match=r"progress\.json: documents .* is not of prepare\.py"):
        read_made(tmp_path / "progress.json")
