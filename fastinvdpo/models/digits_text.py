"""A text encoder of no parameters for the digits family: every word is a fixed vector computed from its SHA-256.

The vectors come from integer arithmetic alone, so they are the same bits on every machine, and nothing has to be
shipped.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence

import torch

from fastinvdpo.errors import invalid

WORDS_PER_PROMPT = 4
EMBEDDING_DIM = 32


@functools.lru_cache(maxsize=4096)
def word_vector(word: str) -> tuple[float, ...]:
    """``EMBEDDING_DIM`` nearly normal numbers (mean 0, variance 1) that depend on the word alone.

    Each number is the centered sum of twelve 16-bit uniform integers taken from one digest (Irwin-Hall). A logarithm or
    cosine, as in Box-Muller, could differ in the last bit from one C library to another; sums of integers cannot.
    """
    return tuple(
        (sum(struct.unpack_from("<12H", hashlib.sha256(f"{word}:{index}".encode()).digest())) - 6 * 65535) / 65536
        for index in range(EMBEDDING_DIM)
    )


def embed_prompts(prompts: Sequence[str]) -> torch.Tensor:
    """Embed prompts as float32 ``(n, 4, 32)``: one row a word, zero rows behind the last one, longer prompts cut.

    Words are split at white space, upper and lower case are one. The empty prompt, all zeros, is the unconditional one.
    Raises InvalidInput when ``prompts`` is a bare string or holds something that is not a string.
    """
    if isinstance(prompts, str):
        raise invalid("prompts", prompts, "is one string", "pass a list of prompts")
    embeddings = torch.zeros(len(prompts), WORDS_PER_PROMPT, EMBEDDING_DIM)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise invalid(f"prompts[{row}]", prompt, "is not a string", "pass text; the empty string is unconditional")
        for place, word in enumerate(prompt.lower().split()[:WORDS_PER_PROMPT]):
            embeddings[row, place] = torch.tensor(word_vector(word))
    return embeddings
