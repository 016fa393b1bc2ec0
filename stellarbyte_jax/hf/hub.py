"""Names of the Hugging Face hub, such as ``HuggingFaceTB/SmolLM2-135M``, as local directories."""

import os
import re
from pathlib import Path

from stellarbyte_jax.config.foreign import absent, clipped
from stellarbyte_jax.config.paths import expanded
from stellarbyte_jax.hf.files import INDEX
from stellarbyte_jax.tokenizer.directory import FILES, MODEL_CONFIG, MORE_TEMPLATES

# Only what is read: no pickles, and no second copy of the weights in another format, as some repositories hold one.
_WEIGHTS = "model*.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT
_SMALL = (MODEL_CONFIG, ADAPTER, *FILES, f"{MORE_TEMPLATES}/*.jinja")  # settings name ends of texts, as tokenizers do
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(f"{_PART}/{_PART}")
_OWN_FOLDER = "runs"  # where the runs of our configs go


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is one of the hub; every other one is a path here, which is never sent anywhere.

    It is a text (not a ``Path``) of the form ``owner/name`` with exactly one slash, nothing here has this path, and
    there is no folder ``owner`` here, nor is that ``runs``: then a file is missing.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "--" in name or ".." in name:
        return False
    owner = name.partition("/")[0]
    return owner != _OWN_FOLDER and not os.path.lexists(owner)


def local_directory(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory that a path or a hub name means; files of the hub are fetched into its cache first.

    A directory goes before a name of the hub, and a leading ``~`` is the home directory.

    The token, the endpoint, the cache and offline mode are those of huggingface_hub: ``HF_TOKEN``, ``HF_ENDPOINT``,
    ``HF_HOME`` and ``HF_HUB_OFFLINE``.

    Args:
      name: a directory, or ``owner/name``; see :func:`is_hub_name`.
      revision: branch, tag or commit of the hub's repository; None: its main branch.
      weights: whether they are needed; else only the tokenizer and the settings are fetched.

    Raises:
      ValueError: there is no such directory, or the hub did not give the files; the message says what was tried.
    """
    if is_hub_name(name):
        return _fetch(str(name), revision, weights)
    if revision is not None:
        raise ValueError(f"revision {revision!r} is of a name of the Hugging Face hub, and {name} is a local path")
    path = Path(expanded(name))
    if not path.exists():
        raise ValueError(f"{absent(path)}: give a local directory, or a name of the Hugging Face hub as owner/name")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the directory that holds it")
    return path


def _fetch(name: str, revision: str | None, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    try:
        wanted = [*_SMALL, *((INDEX, _WEIGHTS, ADAPTER_WEIGHTS) if weights else ())]
        found = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        held = [*found.glob(_WEIGHTS), *found.glob(ADAPTER_WEIGHTS)]
        if weights and not held:  # without a network what is cached comes, if a tokenizer alone
            raise FileNotFoundError(f"no {_WEIGHTS} is among its files")
    except Exception as error:  # the hub's own kinds, those of its HTTP library and of the file system
        version = f" at revision {revision}" if revision else ""
        if constants.HF_HUB_OFFLINE:
            reason, advice = (
                f"the hub's cache {constants.HF_HUB_CACHE} lacks it, and HF_HUB_OFFLINE forbids asking",
                ("fetch it where there is a network, or unset HF_HUB_OFFLINE"),
            )
        else:
            words = clipped((str(error).strip() or "no message").splitlines()[0])
            reason = f"{constants.ENDPOINT} did not give it ({type(error).__name__}: {words})"
            advice = "mend the name, set HF_TOKEN for a private or gated model, or check the network"
        raise ValueError(
            f"{name}{version}: there is no such directory here (looked from {Path.cwd()}), and {reason}: {advice}"
        ) from error
    return found
