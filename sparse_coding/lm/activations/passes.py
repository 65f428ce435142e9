"""How many rows of text go through a language model at a time, if --lm-batch-size does not say."""

import torch

from sparse_coding.lm.model import LanguageModel
from sparse_coding.sweep.hardware import free_memory

ON_CPU = 16  # rows: 4 to 64 are within a third of each other (LOG.md)
# Of a GPU. An H200 needs 2^16 tokens at a time for all that it gives, 2^14 for four fifths of it,
# 2^12 for a sixth (SmolLM2-135M: LOG.md).
HARVEST = 2**16, 0.25  # tokens at most, and share of the free memory: training follows
EVALUATION = 2**14, 0.125  # logits of all of them are in memory, and all codes
CODES = 2**14  # for so large a dictionary; ours
LIVE = (8, 4)  # tensors of d_model and of the widest layer that a block may hold at once; ours


def harvest_rows(lm: LanguageModel, context_length: int) -> int:
    """Rows of text per forward pass that ends at a site."""
    return _rows(lm, context_length, _block_bytes(lm, context_length), *HARVEST)


def evaluation_rows(lm: LanguageModel, context_length: int) -> int:
    """Rows of text per forward pass whose logits are kept, beside codes of autoencoders."""
    kept = 4 * (2 * lm.vocab_size + 4 * CODES)  # see LanguageRecipe.memory
    each = _block_bytes(lm, context_length) + kept
    return _rows(lm, context_length, each, *EVALUATION)


def _rows(
    lm: LanguageModel, context_length: int, token_bytes: int, most_tokens: int, share: float
) -> int:
    """A power of two, so that it rarely changes with the free memory: with it, rounding does."""
    if lm.device.type == "cpu":
        return ON_CPU
    n_tokens = min(most_tokens, int(share * free_memory(lm.device) / token_bytes))
    return 2 ** (max(1, n_tokens // context_length).bit_length() - 1)


def _block_bytes(lm: LanguageModel, context_length: int) -> int:
    """Of a token in a block, at most: attention may be computed without a fused kernel, for which
    its scores are there in the model's dtype and in float32."""
    size, (of_d_model, of_widest) = lm.dtype.itemsize, LIVE
    scores = lm.model.config.num_attention_heads * context_length * (size + torch.float32.itemsize)
    return size * (of_d_model * lm.d_model + of_widest * lm.widest) + scores
