"""Texts and samples for tests of tokenizer training."""

from collections import Counter

from stellarbyte_jax.tokenizer.training.evaluation import pieces_of
from stellarbyte_jax.tokenizer.training.format import SPECIAL_TOKENS
from stellarbyte_jax.tokenizer.training.stages import Sample

FIXED = len(SPECIAL_TOKENS) + 256  # ids that no merge takes
ENGLISH = "the cat and the hat sat on the mat, then the other cat ran after that rat " * 20
CHINESE = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" * 20


def samples_of(**texts):
    """Corpora of one text each, sampled whole."""
    return {n: Sample(Counter(pieces_of()(t)), len(t.encode()), [t]) for n, t in texts.items()}
