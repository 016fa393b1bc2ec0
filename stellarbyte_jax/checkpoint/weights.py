"""The weights of a run, without the rest of its state."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from stellarbyte_jax.checkpoint.store import BASE, Checkpointer, CheckpointError, StoredStep, first_line
from stellarbyte_jax.config import ByteConfig, CheckpointConfig, ConfigError, DataConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.hf.card import TrainingFacts
from stellarbyte_jax.lora import kept_elsewhere
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.model.lazy import LazyArray, lazy
from stellarbyte_jax.model.placement import weight_places
from stellarbyte_jax.model.trees import Params, merge, partition
from stellarbyte_jax.sharding import device_mesh


def run_and_step(source: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The run directory and the step that a run directory or ``RUN/checkpoints/STEP`` means."""
    run = source.absolute()
    if run.parent.name == "checkpoints" and run.name.isdigit():
        return run.parents[1], int(run.name) if step is None else step
    return source, step


def load_config(run_dir: str | Path, step: int | None = None) -> TrainConfig:
    """Settings that a run's newest or named checkpoint was written with.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    with _opened(Path(run_dir), step) as stored:
        return TrainConfig.from_dict(stored.json("config"))


def load_weights(run_dir: str | Path, step: int | None = None) -> tuple[TrainConfig, Params]:
    """Settings and weights (the average where one was kept) of a run's newest or named checkpoint.

    Of a run with adapters these alone, and what is kept with them: ``source.Source`` has their base too. The weights
    are arrays of numpy. Under ``jax.set_mesh`` they are read straight into their parts on the mesh, as
    ``place_weights`` puts them.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    with _opened(Path(run_dir), step) as stored:
        config = TrainConfig.from_dict(stored.json("config"))
        return config, _joined(stored.arrays(_items(stored, config.model, device_mesh())))


def load_base(run_dir: str | Path, step: int | None = None) -> dict[str, Any]:
    """What a run with adapters recorded of their base in its newest or named checkpoint, see ``source.identity``.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    with _opened(Path(run_dir), step) as stored:
        return stored.json(BASE)


def load_lazy_weights(run_dir: str | Path, step: int | None = None) -> tuple[TrainConfig, Params]:
    """As :func:`load_weights`, but the weights are lazy arrays, whose reads raise CheckpointError where they fail."""
    with _opened(Path(run_dir), step) as stored:
        config = TrainConfig.from_dict(stored.json("config"))
        trees = {
            item: jax.tree.map(lambda leaf: _guarded(leaf, stored.path), stored.lazy_arrays(item, shapes))
            for item, shapes in _items(stored, config.model).items()
        }
        return config, _joined(trees)


def _guarded(leaf: LazyArray, path: Path) -> LazyArray:
    def read() -> np.ndarray:
        with _named(path):
            return leaf.read()

    return replace(leaf, read=read)


def load_training_facts(run_dir: str | Path, step: int | None = None) -> TrainingFacts | None:
    """What is known of the training of a run's newest or named checkpoint; None of weights that it began with.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    with _opened(Path(run_dir), step) as stored:
        if not stored.has("optimizer"):
            return None
        config, data = TrainConfig.from_dict(stored.json("config")), stored.json("data")
        loss = data.get("last_loss") if data.get("validated") == stored.step else None
        return training_facts(config, stored.step, loss)


def training_facts(config: TrainConfig, step: int, validation_loss: float | None) -> TrainingFacts:
    """Facts of a run after so many steps."""
    tokens = step * config.global_batch_size * config.data.sequence_length
    return TrainingFacts(step, tokens, config.optimizer.name, validation_loss, saw_plain_text(config, step))


def saw_plain_text(config: TrainConfig, step: int) -> bool:
    """Whether it is known that a run's weights saw plain text alone, no conversations.

    What came before a run that began with other weights is not known, nor what a template makes of its records.
    """
    data = config.data
    return step > 0 and config.init_from is None and data.template is None and data.format == "text"


def stored_steps(run_dir: str | Path) -> list[int]:
    """Steps of the checkpoints in a run directory, ascending; none where it does not exist."""
    return sorted(int(p.name) for p in (Path(run_dir) / "checkpoints").glob("*") if p.name.isdigit())


@contextlib.contextmanager
def _opened(run_dir: Path, step: int | None) -> Iterator[StoredStep]:
    directory = run_dir.absolute() / "checkpoints"
    steps = stored_steps(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir} holds no checkpoint: expected a run directory with checkpoints/STEP inside")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {chosen}; there are {', '.join(map(str, steps))}")
    with _named(directory / str(chosen)), contextlib.ExitStack() as stack:
        with _without_notes():
            # Lightweight: another step's damaged validation loss is no matter here.
            options = ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True)
            manager = stack.enter_context(ocp.CheckpointManager(directory, options=options))
        yield StoredStep.open(manager, directory, chosen)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the checkpoint where it cannot be read."""
    try:
        yield
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is unreadable: {first_line(error)}. Name another step") from error


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Keeps off the console what orbax logs about a directory that is only read."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        absl.setLevel(level)


def _items(stored: StoredStep, config: ByteConfig, mesh: Mesh | None = None) -> dict[str, Params]:
    """The items that hold the weights, the averaged ones where there are any, and what must be in them."""
    model = ByteTransformer(config)
    if mesh is None:  # for orbax, an array of numpy asks for one; this one takes no memory
        shapes = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), param_shapes(model))
    else:
        shapes = jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            param_shapes(model),
            weight_places(model, mesh),
        )
    if stored.has(BASE):
        of_base = kept_elsewhere(model)
        shapes, _ = partition(shapes, lambda path: not of_base(path))
    trained, frozen = partition(shapes, lambda path: "/".join(path) not in stored.frozen_paths)
    item = "ema" if stored.has("ema") else "params"
    return {item: trained} | ({"frozen": frozen} if frozen else {})


def _joined(items: dict[str, Params]) -> Params:
    trained, *frozen = items.values()
    return merge(trained, frozen[0] if frozen else {})


def save_initial(
    run_dir: str | Path,
    config: ByteConfig,
    params: Params,
    tokenizer: str | None = None,
    *,
    add_bos: bool = True,
    init_from: str | None = None,
    checksums: Mapping[str, int] | None = None,
) -> None:
    """Writes weights as step 0 of a run directory, for training to start from, one array after another.

    Args:
      run_dir: the directory, with no checkpoint in it.
      config: of the model.
      params: its weights, lazy ones too.
      tokenizer: the directory of the model's tokenizer; None for the default of training.
      add_bos: whether texts begin with bos.
      init_from: where the weights come from, as a run records it; None: they are fresh.
      checksums: ``array_checksums(params)``, where they are known; else lazy weights are read for them.

    Raises:
      CheckpointError: the directory already has a checkpoint, or the write failed.
    """
    run_dir = Path(run_dir)
    data = DataConfig(
        sequence_length=min(1024, config.max_position_embeddings),
        tokenizer=tokenizer or DataConfig().tokenizer,
        arrangement="contiguous" if config.has_memory else "packed",
        add_bos=add_bos,
    )
    train = TrainConfig(
        output_dir=str(run_dir),
        steps=1,
        init_from=init_from,
        model=config,
        data=data,
        schedule=ScheduleConfig(warmup_steps=0),
    )
    arrays = {"params": jax.tree.map(lazy, params)}
    known = {} if checksums is None else {"params": checksums}
    with contextlib.closing(Checkpointer(run_dir, CheckpointConfig(), lazy=["params"])) as checkpointer:
        if checkpointer.steps:
            raise CheckpointError(
                f"{run_dir} already has checkpoints ({checkpointer.steps}): choose an empty directory"
            )
        checkpointer.save(0, arrays, {"config": train.to_dict()}, frozen=[], checksums=known)
