"""Other settings for a loaded model: those that its weights allow."""

import itertools
from collections.abc import Sequence

import jax

from stellarbyte_jax.config import ByteConfig, override
from stellarbyte_jax.config.section import ConfigError
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes


def reconfigure(model: ByteTransformer, overrides: Sequence[str]) -> ByteTransformer:
    """The model with ``name=value`` settings, which its weights fit as before.

    YaRN and Llama-3 scaling are counted from the length that the model was trained with: where the overrides name one
    of them and not ``rope_scaling.original_max_position_embeddings`` (none is the new length), that becomes the
    model's ``max_position_embeddings``, and the new ``max_position_embeddings`` is that times the factor unless it is
    given.

    Raises:
      ConfigError: a setting does not exist, contradicts another one, or asks for other weights.
    """
    if not overrides:
        return model
    config = _stretched(model.config, overrides)
    changed = _first_change(model.config, config)
    if changed is not None:
        raise ConfigError(
            f"{' '.join(_blamed(model.config, overrides))} asks for other weights than the model has ({changed}): "
            "leave it out, such settings are chosen before training"
        )
    return ByteTransformer(config)


def _stretched(config: ByteConfig, overrides: Sequence[str]) -> ByteConfig:
    changed = override(config, overrides)
    names = {text.partition("=")[0].strip() for text in overrides}
    scaling = changed.rope_scaling
    if scaling.name not in ("yarn", "llama3") or scaling.original_max_position_embeddings is not None:
        return changed
    if "rope_scaling.name" not in names or "rope_scaling.original_max_position_embeddings" in names:
        return changed
    trained = config.max_position_embeddings
    more = [f"rope_scaling.original_max_position_embeddings={trained}"]
    if "max_position_embeddings" not in names:
        more.append(f"max_position_embeddings={int(trained * scaling.factor)}")
    return override(config, [*overrides, *more])


def _blamed(config: ByteConfig, overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that ask for other weights: one by itself, or few that cannot be without each other."""
    blamed: set[int] = set()
    left = set(range(len(overrides)))
    for size in (1, 2, 3):
        for numbers in map(set, itertools.combinations(sorted(left), size)):
            if numbers <= left and _asks(config, overrides, numbers):
                blamed |= numbers
                left -= numbers
        if not _asks(config, overrides, left):
            break
    return [overrides[number] for number in sorted(blamed)] or list(overrides)


def _asks(config: ByteConfig, overrides: Sequence[str], numbers: set[int]) -> bool:
    """Whether these overrides by themselves ask for other weights; not where they need the others."""
    try:
        return _first_change(config, override(config, [overrides[number] for number in sorted(numbers)])) is not None
    except ConfigError:
        return False


def _first_change(before: ByteConfig, after: ByteConfig) -> str | None:
    """The first weight whose name or shape differs, in words; None where all are the same."""
    old, new = _shapes(before), _shapes(after)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name}: {_words(old.get(name))} becomes {_words(new.get(name))}"
    return None


def _shapes(config: ByteConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(ByteTransformer(config)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _words(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
