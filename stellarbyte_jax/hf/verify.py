"""Comparison with ``transformers``: the same directory, the same tokens, both in float32."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stellarbyte_jax.model.decoder import ByteTransformer, forward, logits
from stellarbyte_jax.model.io import Inputs
from stellarbyte_jax.model.trees import Params

_TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller


@dataclass(frozen=True)
class Agreement:
    """How near two sets of logits are."""

    tokens: int
    largest_logit: float
    max_difference: float
    argmax_agreement: float

    @property
    def ok(self) -> bool:
        """Whether the difference is rounding."""
        return self.max_difference <= _TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: max logit difference {self.max_difference:.2e} "
            f"(largest logit {self.largest_logit:.3g}), argmax equal on {self.argmax_agreement:.2%}"
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
      directory: a Hugging Face directory.
      model: the same model; computed in float32 whatever its settings say.
      params: its weights, already rounded as those of the directory.
      tokens_BT: int32 [B, T]; 256 random tokens in two rows where none are given.

    Raises:
      ImportError: torch is not installed.
    """
    require_torch()
    import torch
    from transformers import AutoModelForCausalLM

    config = replace(model.config, compute_dtype="float32", attention_implementation="reference")
    if tokens_BT is None:
        length = min(128, config.max_position_embeddings)
        tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, length), dtype=np.int32)
    ours_BTV = np.asarray(_logits(ByteTransformer(config), params, jnp.asarray(tokens_BT)))
    peer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs_BTV = peer.eval()(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()
    return Agreement(
        tokens=tokens_BT.size,
        largest_logit=float(np.abs(theirs_BTV).max()),
        max_difference=float(np.abs(ours_BTV - theirs_BTV).max()),
        argmax_agreement=float((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).mean()),
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: ByteTransformer, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return logits(model, params, forward(model, params, Inputs(tokens_BT)).hidden_BTD)
