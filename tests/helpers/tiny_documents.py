"""Documents and a tokenizer for tests of the data pipeline."""

import grain
import numpy as np

from stellarbyte_jax.tokenizer.training import format as tokenizer_format


def groups_of(documents, per_group=3):
    """Groups as EncodeDocuments makes them, without a tokenizer."""
    parts = [documents[i : i + per_group] for i in range(0, len(documents), per_group)]
    return grain.MapDataset.source(parts).map(
        lambda part: {
            "tokens": np.concatenate([*part, np.zeros(0, np.int32)]).astype(np.int32),
            "lengths": np.array([len(d) for d in part], np.int64),
            "skipped": 1,
        }
    )


def save_byte_tokenizer(path):
    """A tokenizer without merges: its tokens are bytes. Returns its path as settings name it."""
    tokenizer_format.save(tokenizer_format.build([]), path, 1024)
    return str(path)
