"""bin_writer.py: what a text needs is known before it is read."""

import json

import pytest
from bin_writer import expected_tokens, text_bytes
from builders.models import write_parquet

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
