"""configs/stellarbyte.py, made small: its run ends with a directory that transformers loads as the same model."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.hf_models import NEEDS_TORCH, assert_same_tree
from helpers.tiny_documents import save_byte_tokenizer
from helpers.variants import run

from stellarbyte_jax.checkpoint.weights import load_weights
from stellarbyte_jax.config.files import load
from stellarbyte_jax.hf.directory import from_pretrained
from stellarbyte_jax.tokenizer.codec import load_tokenizer
from stellarbyte_jax.training.run import train

CONFIG = Path(__file__).parents[2] / "configs" / "stellarbyte.py"
# Of the file nothing but sizes is changed.
SMALL = (
    *("model.hidden_size=32", "model.num_attention_heads=4", "model.num_hidden_layers=2", "model.intermediate_size=48"),
    *("model.compute_dtype=float32", "model.scan_unroll=none", "steps=2", "schedule.warmup_steps=1"),
    *("global_batch_size=2", "data.sequence_length=32", "data.workers=0", "evaluation.batches=1"),
)


def test_a_run_of_the_projects_own_config_ends_with_its_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    words = save_byte_tokenizer(tmp_path / "words")
    size = load_tokenizer(words).vocab_size
    places = (f"output_dir={tmp_path / 'run'}", f"data.tokenizer={words}", f"model.vocab_size={size}")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and integer types inside
        train(load(CONFIG, [*SMALL, *places]))
    model, params = from_pretrained(tmp_path / "run" / "hf", compute_dtype="float32")
    assert_same_tree(params, load_weights(tmp_path / "run")[1])
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", trust_remote_code=True).eval()
    assert type(peer).__name__ == "StellarByteForCausalLM"
    tokens_BT = np.random.default_rng(0).integers(0, size, (2, 24), dtype=np.int32)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, np.asarray(run(model, params, tokens_BT)), atol=1e-4)
