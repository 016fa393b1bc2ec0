"""What a run begins with: settings and weights of ``init_from``, and what is checked before its directory is made."""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stellarbyte_jax.checkpoint.compatibility import check_same_model
from stellarbyte_jax.checkpoint.source import find_source, identity, merged, tokenizer_of
from stellarbyte_jax.checkpoint.store import TOKENIZER, CheckpointError
from stellarbyte_jax.checkpoint.weights import load_config, stored_steps
from stellarbyte_jax.config import ByteConfig, ConfigError, TrainConfig, compose
from stellarbyte_jax.config.foreign import absent, listed, shown
from stellarbyte_jax.config.moe import REBALANCING
from stellarbyte_jax.config.paths import home, real
from stellarbyte_jax.config.reference import changed, written
from stellarbyte_jax.config.section import require
from stellarbyte_jax.data.loader import Loader, make_loader
from stellarbyte_jax.data.patterns import expand_all
from stellarbyte_jax.hf.hub import is_hub_name, local_directory
from stellarbyte_jax.inspect.costs import ParameterCounts
from stellarbyte_jax.launch import LOCK, environment, processes, write_failure
from stellarbyte_jax.lora import with_adapters
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.model.state.router import with_twins_of
from stellarbyte_jax.sharding import device_mesh
from stellarbyte_jax.tokenizer.codec import check_vocabulary, load_tokenizer
from stellarbyte_jax.tokenizer.directory import CHAT_TEMPLATE, TokenizerDirectory, copy_tokenizer, write_json
from stellarbyte_jax.tokenizer.special import kept_ids
from stellarbyte_jax.training import chat, finish, messages
from stellarbyte_jax.training.console import Reporter
from stellarbyte_jax.training.directory import holds_run
from stellarbyte_jax.training.placement import devices, place_batches
from stellarbyte_jax.training.record import ABOUT, about
from stellarbyte_jax.training.resume import Resumed, begin_with
from stellarbyte_jax.training.state import TrainState

_log = logging.getLogger(__name__)
_PROJECT = (".git", "pyproject.toml")
_PADDING = 128  # rows; to a multiple of so many, embeddings are commonly padded for the sake of speed


def inherit(init_from: str, output_dir: str) -> Mapping[str, Any]:
    """What a run takes over of the directory that its ``init_from`` names, as the base of ``config.compose``.

    The model, the tokenizer and whether texts begin with bos. Where the run has checkpoints, they are its own: it goes
    on although that directory was moved.

    Raises:
      ValueError, CheckpointError: the directory is none with weights, or cannot be read.
    """
    own = _own(output_dir)
    if own is not None:
        return _base(own.model, tokenizer_of(output_dir, own), own.data.add_bos)
    return _base(*find_source(init_from).settings())


def _own(output_dir: str | Path) -> TrainConfig | None:
    """The settings of a run's newest readable checkpoint; None where there is none."""
    for step in reversed(stored_steps(output_dir)):
        with contextlib.suppress(CheckpointError):  # the run will tell, and take the one before it
            return load_config(output_dir, step)
    return None


def _base(model: ByteConfig, tokenizer: str | Path, add_bos: bool) -> Mapping[str, Any]:
    return {"model": model.to_dict(), "data.tokenizer": str(tokenizer), "data.add_bos": add_bos}


def complete(config: TrainConfig) -> TrainConfig:
    """The settings with the model of ``init_from``, where it is left out.

    Raises:
      ConfigError: these are no settings, but for instance the path of a config file.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"train() takes a TrainConfig, not {shown(config)}: stellarbyte_jax.config.load(path) reads a config file"
        )
    return compose(config, inherit=inherit) if config.leaves_model_out else config


@dataclass(frozen=True)
class Found:
    """Settings whose tokenizer was found.

    Attributes:
      named: as they are recorded, with the tokenizer's name.
      used: the same with its directory.
      note: what to tell of it; None: nothing.
    """

    named: TrainConfig
    used: TrainConfig
    note: str | None = None


def find_tokenizer(config: TrainConfig) -> Found:
    """Finds the tokenizer: a directory, else what a run keeps of the one that it began with, else a name of the hub.

    So it does the file of a chat template: where it is gone, what the run keeps of it.

    Raises:
      ValueError: the hub did not give it, or there is no such directory.
    """
    return _with_kept_template(_find_tokenizer(config))


def _find_tokenizer(config: TrainConfig) -> Found:
    name, run = config.data.tokenizer, Path(config.output_dir)
    if os.path.lexists(name):
        return _written_otherwise(config, run) or Found(config, config)
    own = _own(run)
    if own is not None and own.data.tokenizer == name and (copied := _copied(config, run)) is not None:
        return copied
    if is_hub_name(name):
        return Found(config, _with_tokenizer(config, local_directory(name, weights=False)))
    if own is not None and own.init_from is not None and config.init_from is None:
        raise ValueError(
            f"data.tokenizer {absent(name)}; the run in {run} began with init_from={own.init_from}, and its tokenizer: "
            "name that again"
        )
    return Found(config, config)


def _with_kept_template(found: Found) -> Found:
    data, run = found.used.data, Path(found.used.output_dir)
    template, copy = data.chat.template, run / CHAT_TEMPLATE
    if data.format != "chat" or template is None or os.path.lexists(template) or not copy.is_file():
        return found
    own = _own(run)
    if own is None or own.data.chat.template != template:
        return found
    used = replace(found.used, data=replace(data, chat=replace(data.chat, template=str(copy))))
    note = f"data.chat.template: {absent(template)}; its copy in {copy} is used"
    return replace(found, used=used, note=note if found.note is None else f"{found.note}\n{note}")


def with_copy(config: TrainConfig, run: Path) -> tuple[TrainConfig, str | None]:
    """The settings that ``run`` recorded, with its copy of the tokenizer where theirs is not here, and what to tell.

    Raises:
      ConfigError: there is neither.
    """
    name = config.data.tokenizer
    if os.path.lexists(name):
        return config, None
    if (copied := _copied(config, run)) is not None:
        return copied.used, copied.note
    require(
        is_hub_name(name),
        f"data.tokenizer {absent(name)}, and {run / TOKENIZER} is no copy of it: set data.tokenizer to its directory",
    )
    return config, None


def _written_otherwise(config: TrainConfig, run: Path) -> Found | None:
    """With a run's copy of the tokenizer, where that of the settings is the same but for the writing of its files.

    The place in the data, and prepared data, hold with the files that they were made with.
    """
    name, copy = config.data.tokenizer, run / TOKENIZER
    if not (stored_steps(run) and TokenizerDirectory(copy).is_complete):
        return None
    try:
        now, kept = load_tokenizer(name), load_tokenizer(copy)
    except ValueError:  # one of them is broken; those who read it tell
        return None
    if now.fingerprint == kept.fingerprint or not now.is_same(kept):
        return None
    note = f"data.tokenizer: {name} and the run's copy in {copy} are one, written in two ways; the copy is used"
    return Found(config, _with_tokenizer(config, copy), note)


def _copied(config: TrainConfig, run: Path) -> Found | None:
    copy = run / TOKENIZER
    if not TokenizerDirectory(copy).is_complete:
        return None
    name = config.data.tokenizer
    why = f"{name} is a name of the hub" if is_hub_name(name) else absent(name)
    return Found(config, _with_tokenizer(config, copy), f"data.tokenizer: {why}; its copy in {copy} is used")


def _with_tokenizer(config: TrainConfig, directory: Path) -> TrainConfig:
    return replace(config, data=replace(config.data, tokenizer=str(directory)))


def check_same(config: TrainConfig) -> None:
    """Raises ConfigError where this process has other settings than the main one."""
    own, main = _rows(config), processes.from_main(lambda: _rows(config))
    differ = sorted(name for name in own.keys() | main.keys() if own.get(name) != main.get(name))
    require(
        not differ,
        f"settings are not those of process 0: {listed(differ)}; start all processes with one config and one --set",
    )


def _rows(config: TrainConfig) -> dict[str, str]:
    """Settings by their full names, as they are written."""
    return {name: written(value) for name, (value, _) in changed(config).items()}


def check(config: TrainConfig) -> None:
    """Checks what can be known before anything is written.

    Raises:
      ValueError, OSError, CheckpointError: the run has no place, no data, no tokenizer or no weights to begin with, or
        could not do what it is to do at its end; the message says where it was looked.
      MendableError: JAX starts no device.
    """
    devices()
    run_dir = Path(config.output_dir)
    _check_place(run_dir)
    if not stored_steps(run_dir):
        require(
            config.init_from is not None or not config.model.lora.r,
            f"model.lora.r={config.model.lora.r} trains adapters of weights that are there: name these by init_from",
        )
    if config.init_from is not None and not stored_steps(run_dir):
        _check_same_model(config, find_source(config.init_from).model_config(), lambda _: None)
    check_vocabulary(load_tokenizer(config.data.tokenizer), config.model.vocab_size)
    finish.check(config)
    if not run_dir.exists():
        expand_all(config.data.train, "data.train")
        if config.data.validation:
            expand_all(config.data.validation, "data.validation")


def _check_same_model(config: TrainConfig, there: ByteConfig, say: Callable[[str], None]) -> None:
    if there.lora.r:  # else merged
        raise CheckpointError(
            f"{config.init_from} holds adapters with model.lora.activation={there.lora.activation}, which cannot be "
            "merged into the weights that a run begins with: name a run whose adapters are linear"
        )
    there = replace(there, lora=config.model.lora)  # with_adapters adds them
    if there.moe.num_experts and config.model.moe.num_experts:  # with_twins_of makes the one of the other
        now = {name: getattr(config.model.moe, name) for name in REBALANCING}
        there = replace(there, moe=replace(there.moe, **now))
    advice = "Leave these settings out: a run keeps the weights, and so the shape, of the model in init_from"
    check_same_model(there, config.model, str(config.init_from), initial=True, say=say, advice=advice)


def _check_place(run_dir: Path) -> None:
    """A run does not strew its files into a project, the home directory, or what others fill at the root."""
    if holds_run(run_dir):
        return
    place = real(run_dir)
    held = [name for name in _PROJECT if (place / name).exists()]
    at_home = (own := home()) is not None and place == real(own)
    what = f"holds a project ({held[0]})" if held else "is your home directory" if at_home else None
    what = "is the root of the file system" if place == place.parent else what
    if what is None and place.parent == place.parent.parent and _held(place):
        what = "is a folder of the system, or a volume, that holds other files"
    if what is None and real(Path.cwd()).is_relative_to(place):
        what = "is the folder in which the command was typed, or one above it"
    if what:
        raise ConfigError(
            f"output_dir {run_dir} ({place}) {what}: name a directory of the run's own, such as runs/first"
        )


def _held(place: Path) -> bool:
    """Whether a directory holds anything but what an empty volume has and a start leaves."""
    return place.is_dir() and any(name not in ("lost+found", LOCK) for name in os.listdir(place))


def from_weights(
    config: TrainConfig, shapes: TrainState, optimizer: optax.GradientTransformation, say: Callable[[str], None]
) -> Resumed | None:
    """The state before the first step with the weights that ``init_from`` names, or None without it.

    Raises:
      ValueError, CheckpointError: they cannot be read, or are another model's.
    """
    if config.init_from is None:
        return None
    source = find_source(config.init_from)
    there, stored = source.stored()
    base = identity(source.name(), stored) if config.model.lora.r else None
    there, params = merged(there, stored)
    _check_same_model(config, there, say)
    if config.model.moe.num_experts:
        params = with_twins_of(config.model, params)
    if config.model.lora.r:
        params = with_adapters(ByteTransformer(config.model), params, jax.random.key(config.seed))
    say(f"starting from the weights in {config.init_from}")
    if device_mesh() is None:  # arrays in the memory of numpy are no place for a step to write its state into
        params = jax.tree.map(jnp.copy, params)
    try:
        return replace(begin_with(params, config, shapes, optimizer), base=base)
    except FloatingPointError as error:
        raise CheckpointError(f"{config.init_from} cannot begin a run: {error}. Name another checkpoint") from None


def keep(found: Found, parameters: ParameterCounts) -> None:
    """Writes settings, environment, and a copy of the tokenizer: checkpoints stay readable when the original moves.

    Args:
      found: the settings.
      parameters: of the model.

    Raises:
      OSError: a file cannot be written or read; the message names it.
    """
    processes.wait_for_all()  # the tokenizer has been read
    if processes.is_main():
        _keep(found, parameters)
    processes.wait_for_all()


def _keep(found: Found, parameters: ParameterCounts) -> None:
    run_dir, tokenizer = Path(found.used.output_dir), found.used.data.tokenizer
    target = run_dir / "train_config.json"
    try:
        write_json(target, found.named.to_dict())
        target = run_dir / ABOUT
        write_json(target, about(parameters.total, parameters.active))
        target = run_dir / TOKENIZER
        ids = chat.ids_of_run(found.used, kept_ids(target, tokenizer, found.used.model.vocab_size))
        copy_tokenizer(tokenizer, target, ids)
        chat.keep_template(found.used, run_dir, target)
    except OSError as error:
        source = error.filename if error.filename2 is None else None  # a copy that fails names both
        if source is not None and Path(source).parent == Path(tokenizer):
            raise OSError(f"{source} could not be read: {error.strerror}; make it readable, start again") from error
        raise write_failure(target, error) from error


def open_loader(config: TrainConfig, split: Literal["train", "validation"]) -> Loader:
    """The batches of a run, on its devices."""
    loader = make_loader(
        config.data,
        split=split,
        batch_size=config.global_batch_size,
        seed=config.seed,
        vocab_size=config.model.vocab_size,
        transform=place_batches(),
    )
    if processes.count() > 1 and split == "train" and loader.has_text:
        _log.info(
            "data.train holds text, which each of %d processes tokenizes for itself: scripts/prepare_data.py does it "
            "once, before training",
            processes.count(),
        )
    return loader


def introduce(settings: Found, mesh: Mesh, report: Reporter) -> None:
    """Tells what a run stands on, and its settings."""
    report.line(environment())
    if (spread := messages.mesh(mesh, len(devices()), processes.count())) is not None:
        report.line(spread)
    report.config(settings.named)
    if settings.note is not None:
        report.line(settings.note)


def tell_unused_rows(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Tells of a vocabulary that is larger than the tokenizer's, by more than rows of padding."""
    rows, tokens = config.model.vocab_size, load_tokenizer(config.data.tokenizer).vocab_size
    if rows - tokens > max(_PADDING, config.model.vocab_size_multiple, tokens // 100):
        say(
            f"warning: the tokenizer in {config.data.tokenizer} has {tokens:,} tokens, model.vocab_size is {rows:,}: "
            f"{rows - tokens:,} rows of embedding and head are never used; model.vocab_size={tokens} leaves them out"
        )


def tell_routers_without_slope(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Tells of routers that the loss of tokens does not reach: a token has one weight, which is always 1."""
    c = config.model.moe
    if c.num_experts > 1 and c.num_experts_per_tok == 1 and c.norm_topk_prob:
        say(
            "warning: model.moe.num_experts_per_tok=1 and norm_topk_prob=true: the weight of a token's expert is "
            "always 1, so routers learn from losses of balance alone; model.moe.norm_topk_prob=false lets them learn "
            "from the text"
        )
