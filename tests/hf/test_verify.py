"""How near our logits are to those of transformers, by numbers of the peer itself, and what counts as rounding."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.hf_models import random_model
from helpers.llama_pair import llama_pair
from helpers.training import MODEL

from stellarbyte_jax.hf import verify
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.hf.verify import Agreement, compare_with_transformers
from stellarbyte_jax.model.decoder import ByteTransformer

Pair = tuple[ByteTransformer, dict[str, Any], Any, Path]
TOKENS_BT = np.random.default_rng(3).integers(0, 67, (3, 9), dtype=np.int32)


@pytest.mark.parametrize(
    ("largest", "difference", "ok"),
    [
        (20.0, 1.9e-3, True),
        (20.0, 2.1e-3, False),
        (0.1, 0.9e-4, True),  # as if the largest were 1
        (0.1, 1.1e-4, False),
        (1.0, float("nan"), False),
        (float("nan"), 1.0, False),
    ],
)
def test_a_difference_is_measured_by_the_largest_logit(largest: float, difference: float, ok: bool) -> None:
    assert Agreement(8, largest, difference, 1.0, 1.0).ok == ok


def test_an_agreement_says_its_numbers() -> None:
    assert str(Agreement(256, 12.345, 0.000123, 0.9961, 0.9844)) == (
        "256 tokens: max logit difference 1.23e-04 (largest logit 12.3), argmax equal on 99.61%, in bfloat16 on 98.44%"
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Our model and its weights, the peer with the same ones, and the directory that the peer wrote."""
    model, params, peer = llama_pair()
    directory = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(directory)
    return model, params, peer.eval(), directory


def their_logits(peer: Any, tokens_BT: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return peer(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()


def test_the_same_weights_agree(pair: Pair) -> None:
    model, params, peer, directory = pair
    half = ByteTransformer(dataclasses.replace(model.config, compute_dtype="bfloat16"))
    # float32 is compared, whatever the settings say.
    found = compare_with_transformers(directory, half, params, TOKENS_BT)
    assert found.ok and found.tokens == 27 and found.argmax_agreement == 1
    assert found.bfloat16_agreement > 0.9
    assert found.max_difference < 1e-5
    assert found.largest_logit == pytest.approx(np.abs(their_logits(peer, TOKENS_BT)).max(), rel=1e-6)


def test_random_tokens_fill_two_rows_within_the_trained_length(
    pair: Pair,
) -> None:
    model, params, _, directory = pair
    found = compare_with_transformers(str(directory), model, params)
    assert found.ok and found.tokens == 2 * 32


def test_other_weights_are_measured(pair: Pair) -> None:
    """A head in which some columns are those of other tokens gives the peer's logits of those tokens."""
    model, params, peer, directory = pair
    order = np.random.default_rng(0).permutation(67)
    order[:40] = np.arange(40)
    other = params | {"lm_head": {"kernel": params["lm_head"]["kernel"][:, order]}}
    theirs_BTV = their_logits(peer, TOKENS_BT)
    ours_BTV = theirs_BTV[..., order]
    found = compare_with_transformers(directory, model, other, TOKENS_BT)
    assert not found.ok
    assert found.max_difference == pytest.approx(np.abs(ours_BTV - theirs_BTV).max(), rel=1e-4)
    assert found.argmax_agreement == pytest.approx((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).mean())
    assert 0 < found.argmax_agreement < 1
    assert abs(found.bfloat16_agreement - found.argmax_agreement) < 0.2


def test_sixteen_bits_are_compared_with_sixteen_bits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, _, directory = pair
    ours = verify._logits

    def other(model: ByteTransformer, params: Any, tokens_BT: Any) -> Any:
        return ours(model, params, tokens_BT) * (-1 if model.config.compute_dtype == "bfloat16" else 1)

    monkeypatch.setattr(verify, "_logits", other)
    found = compare_with_transformers(directory, model, params, TOKENS_BT)
    assert found.ok and found.argmax_agreement == 1 and found.bfloat16_agreement < 0.2


def test_kernels_of_the_settings_are_not_asked_for(pair: Pair) -> None:
    model, params, _, directory = pair
    kernel = ByteTransformer(dataclasses.replace(model.config, attention_implementation="cudnn"))
    assert compare_with_transformers(directory, kernel, params, TOKENS_BT).ok


def test_code_of_others_is_not_run(tmp_path: Path) -> None:
    model, params = random_model(parallel_residual=True)
    save_pretrained(tmp_path, model, params, overwrite=True)
    assert compare_with_transformers(tmp_path, model, params).ok
    file = tmp_path / "modeling_stellarbyte.py"
    content = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match=r"modeling_stellarbyte.py is not the modelling file of this version"):
        compare_with_transformers(tmp_path, model, params)
    file.write_text(content)
    file.write_text("raise SystemExit('run')\n" + file.read_text())
    with pytest.raises(ValueError, match=r"modeling_stellarbyte.py is not the modelling file of this version"):
        compare_with_transformers(tmp_path, model, params)


def test_without_torch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"^comparing with transformers needs torch: pip install torch$"):
        compare_with_transformers(tmp_path, ByteTransformer(MODEL), {})
