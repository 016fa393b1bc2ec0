"""Merges: those of the library, from any earlier stage on, of whole characters."""

import json
from collections import Counter
from pathlib import Path

from stellarbyte_jax.tokenizer.training.bpe import keeps_characters_whole, learn_merges
from stellarbyte_jax.tokenizer.training.evaluation import pieces_of
from stellarbyte_jax.tokenizer.training.format import byte_alphabet, pre_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def test_merges_equal_the_library_s():
    from tokenizers import Tokenizer, models, trainers

    texts = (ROOT / "data" / "tiny_bilingual_valid.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    ascii_text = "".join(c for t in texts for c in json.loads(t)["text"] if c.isascii()) + " aaa aaaa aaaaa" * 9
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 900, initial_alphabet=list(byte_alphabet()), show_progress=False, min_frequency=1
    )
    library.train_from_iterator([ascii_text], trainer)
    expected = [tuple(m) for m in json.loads(library.to_str())["model"]["merges"]]
    counts = Counter(pieces_of()(ascii_text))
    assert learn_merges(counts, 900) == expected
    assert learn_merges(counts, 900, expected[:300]) == expected


def test_characters_stay_whole():
    chinese = next(pieces_of()("学而"))
    assert all(keeps_characters_whole(part) for part in (chinese, chinese[:2], chinese[1:3]))
    assert not any(keeps_characters_whole(part) for part in (chinese[:4], chinese[2:4]))
    merges = learn_merges({chinese[2:4]: 10, chinese: 1}, 2)
    assert (chinese[2], chinese[3]) not in merges
