"""Comparison with ``transformers``: the same directory, the same tokens, both in float32 and both in bfloat16."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.hf.settings import read_config
from stellarbyte_jax.hf.table import modelling_file
from stellarbyte_jax.model.decoder import ByteTransformer, forward, logits
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.trees import Params

_TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller


@dataclass(frozen=True)
class Agreement:
    """How near two sets of logits are.

    Attributes:
      tokens: number of compared positions.
      largest_logit: largest magnitude, of the peer's logits in float32.
      max_difference: of the logits in float32.
      argmax_agreement: share of the positions with the same most likely token, in float32.
      bfloat16_agreement: the same, both in bfloat16; rounding alone makes it less than 1.
    """

    tokens: int
    largest_logit: float
    max_difference: float
    argmax_agreement: float
    bfloat16_agreement: float

    @property
    def ok(self) -> bool:
        """Whether the difference is rounding."""
        return self.max_difference <= _TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: max logit difference {self.max_difference:.2e} "
            f"(largest logit {self.largest_logit:.3g}), argmax equal on {self.argmax_agreement:.2%}, "
            f"in bfloat16 on {self.bfloat16_agreement:.2%}"
        )


def require_torch() -> None:
    """Raises ImportError where there is nothing to compare with."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError("comparing with transformers needs torch: pip install torch") from error


def compare_with_transformers(
    directory: str | Path, model: ByteTransformer, params: Params, tokens_BT: np.ndarray | None = None
) -> Agreement:
    """Compares logits of ``transformers`` on ``directory`` with those of ``model``.

    Args:
      directory: a Hugging Face directory. Its modelling file is run where it is the one of this package.
      model: the same model; computed in float32 and bfloat16 whatever its settings say.
      params: its weights, already rounded as those of the directory.
      tokens_BT: int32 [B, T]; 256 random tokens in two rows where none are given.

    Raises:
      ImportError: torch is not installed.
      ValueError: the directory has a modelling file of someone else.
    """
    require_torch()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = replace(model.config, attention_implementation="reference")
    if tokens_BT is None:
        length = min(128, config.max_position_embeddings)
        tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, length), dtype=np.int32)
    options = {"attn_implementation": "eager", "trust_remote_code": _has_our_code(Path(directory))}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    finally:
        if bars:
            logging.enable_progress_bar()

    def both(dtype: Literal["float32", "bfloat16"]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            theirs = peer.to(getattr(torch, dtype))(torch.from_numpy(tokens_BT.astype(np.int64))).logits
        ours = _logits(ByteTransformer(replace(config, compute_dtype=dtype)), params, jnp.asarray(tokens_BT))
        return np.asarray(ours), theirs.float().numpy()

    ours_BTV, theirs_BTV = both("float32")
    ours_bf16_BTV, theirs_bf16_BTV = both("bfloat16")
    return Agreement(
        tokens=tokens_BT.size,
        largest_logit=float(np.abs(theirs_BTV).max()),
        max_difference=float(np.abs(ours_BTV - theirs_BTV).max()),
        argmax_agreement=float((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).mean()),
        bfloat16_agreement=float((ours_bf16_BTV.argmax(-1) == theirs_bf16_BTV.argmax(-1)).mean()),
    )


def _has_our_code(directory: Path) -> bool:
    """Whether the directory needs a modelling file, which then is ours to the byte."""
    family, _ = read_config(directory)
    if family.modelling_file is None:
        return False
    theirs = directory / family.modelling_file
    if not theirs.is_file() or theirs.read_bytes() != modelling_file(family.modelling_file).read_bytes():
        raise ValueError(
            f"{theirs} is not the modelling file of this version of the package, so it is not run: export the model "
            "anew, or compare with it yourself"
        )
    return True


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: ByteTransformer, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return logits(model, params, forward(model, params, Inputs(tokens_BT)).hidden_BTD)
