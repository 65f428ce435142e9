"""Rows of text per forward pass: on a CPU a constant, on a GPU by its free memory and the model."""

from dataclasses import replace

import pytest
import torch
from builders.lm import CONTEXT, tiny_target

from sparse_coding.config import UserError
from sparse_coding.lm.activations import passes
from sparse_coding.lm.activations.passes import ON_CPU, evaluation_rows, harvest_rows
from sparse_coding.lm.recipe import Optimisation, Reading, recipe_on
from sparse_coding.lm.target import Target

READING = dict(lm_batch_size=0, n_eval_tokens=100, store_dtype="float16")
OPTIMISATION = Optimisation(6400, 64, 1e-3, "sum", 0.1, 0.1, 0.1, 0.5, 10.0)


@pytest.fixture
def on_gpu(root, monkeypatch):
    """on_gpu(gb): the target as if its model were on a GPU with so much memory free."""

    def of(gb: float) -> Target:
        monkeypatch.setattr(passes, "free_memory", lambda device: gb * 1e9)
        target = tiny_target(root)
        lm = replace(target.lm, device=torch.device("cuda", 0), dtype=torch.bfloat16)
        return replace(target, lm=lm)

    return of


def test_a_cpu_takes_the_same_number_whatever_is_free(root):
    target = tiny_target(root)
    recipe = recipe_on(target, Reading(**READING), OPTIMISATION)
    assert harvest_rows(target.lm, CONTEXT) == evaluation_rows(target.lm, CONTEXT) == ON_CPU == 16
    assert recipe.chunks.lm_batch_size == recipe.held_out.lm_batch_size == 16
    assert recipe.chunks.chunks_at_once == 1


def test_a_gpu_takes_65_536_tokens_at_a_time_if_there_is_room_for_them(on_gpu):
    lm = on_gpu(100).lm
    assert harvest_rows(lm, 256) == 256
    assert harvest_rows(lm, 1000) == 64
    assert evaluation_rows(lm, 256) == 64
    recipe = recipe_on(on_gpu(100), Reading(**READING), OPTIMISATION)
    assert recipe.chunks.lm_batch_size == 65536 // CONTEXT
    assert recipe.held_out.lm_batch_size == 16384 // CONTEXT


def test_a_small_gpu_takes_what_a_quarter_of_it_holds(on_gpu):
    # of a GPT-2 of d_model 16, MLP 40, fused queries, keys and values 48, 2 heads, in bfloat16
    token = 2 * (8 * 16 + 4 * 48) + 2 * 256 * (2 + 4)
    for n_rows in (1, 2, 32):
        gb = 4 * n_rows * 256 * token / 1e9
        assert harvest_rows(on_gpu(gb * 1.001).lm, 256) == n_rows
        assert harvest_rows(on_gpu(gb * 1.9).lm, 256) == n_rows
    assert harvest_rows(on_gpu(1e-6).lm, 256) == 1
    with_logits = token + 4 * (2 * 300 + 4 * 16384)  # and codes
    assert evaluation_rows(on_gpu(8 * 4 * 256 * with_logits / 1e9 * 1.001).lm, 256) == 4
    assert evaluation_rows(on_gpu(8 * 4 * 256 * with_logits / 1e9 * 0.999).lm, 256) == 2


def test_a_pass_on_a_gpu_has_as_many_whole_chunks_as_it_has_rows_for(on_gpu, monkeypatch):
    from sparse_coding.lm.activations import harvest

    monkeypatch.setattr(harvest, "CHUNK_BYTES", 1000 * CONTEXT * 40 * 2)
    for asked, at_once in ((0, 4), (999, 1), (2000, 2), (2999, 2)):
        reading = Reading(**READING | {"lm_batch_size": asked})
        recipe = recipe_on(on_gpu(100), reading, OPTIMISATION)
        assert recipe.chunks.chunks_at_once == at_once
        assert recipe.chunks.lm_batch_size == (asked or 4096)


def test_a_number_that_is_given_is_taken(root):
    reading = Reading(**READING | {"lm_batch_size": 5})
    recipe = recipe_on(tiny_target(root), reading, OPTIMISATION)
    assert (recipe.chunks.lm_batch_size, recipe.held_out.lm_batch_size) == (5, 5)
    with pytest.raises(UserError, match="--lm-batch-size -1 must be at least 1, or 0 for as many"):
        Reading(**READING | {"lm_batch_size": -1})
