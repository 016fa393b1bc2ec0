"""Checkpoints of a run: ``RUN/checkpoints/STEP``, written by orbax in the background and made visible by a rename.

Items of a step: ``params``, ``ema`` and ``memory`` (where kept), ``optimizer`` (its state and the step), ``data``
(position of the loader, JSON) and ``config`` (the resolved settings, JSON). A step made from foreign weights has no
``optimizer``.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from stellarbyte_jax.config import ByteConfig, CheckpointConfig, ConfigError, DataConfig, ScheduleConfig, TrainConfig
from stellarbyte_jax.model.decoder import ByteTransformer, param_shapes
from stellarbyte_jax.train.state import TrainState

_RUNTIME_FIELDS = (
    "compute_dtype",
    "attention_implementation",
    "remat",
    "scan_unroll",
    "attention_dropout",
    "hidden_dropout",
    "residual_dropout",
    "drop_path",
    "initialization",
    "initializer_range",
    "cache",
)
# A run that begins with weights of another one may give them other positions: a longer text, above all.
_POSITION_FIELDS = ("max_position_embeddings", "rope_theta", "rope_scaling", "sink_tokens")
# With another value the position in the data would point elsewhere.
_STREAM_FIELDS = (
    "train",
    "tokenizer",
    "fields",
    "template",
    "sequence_length",
    "arrangement",
    "add_bos",
    "add_eos",
    "max_documents_per_sequence",
    "shuffle",
    "on_error",
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used with these settings."""


class Checkpointer:
    """Writes and reads the checkpoints of one run directory."""

    def __init__(self, run_dir: Path, settings: CheckpointConfig) -> None:
        """Opens ``run_dir/checkpoints``, which is made if it does not exist."""
        self.directory = run_dir.absolute() / "checkpoints"
        policies: list[Any] = [checkpoint_managers.LatestN(settings.keep_latest)]
        if settings.keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=_metric, reverse=True, n=settings.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        self._options = ocp.CheckpointManagerOptions(
            best_fn=_metric,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._open()

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        config: TrainConfig,
        validation_loss: float | None = None,
    ) -> None:
        """Copies the state and returns; the files are written in the background.

        ``data`` is what the loop needs besides the state, in JSON values: the loader's position above all.

        Raises:
          CheckpointError: this save or the one before it failed; earlier checkpoints are untouched.
        """
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "data": ocp.args.JsonSave(data),
            "config": ocp.args.JsonSave(json.loads(config.to_json())),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if state.memory is not None:
            items["memory"] = ocp.args.StandardSave(_filled(state.memory))
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise self._failure(step, f"it takes {needed / 2**30:.2f} GiB")
        self._guarded(
            step, lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        )

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          CheckpointError: it failed.
        """
        self._guarded(None, self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        self._manager.close()

    def _guarded(self, step: int | None, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            # orbax, tensorstore and the file system each have their own exceptions for a failed write.
            raise self._failure(step, _first_line(error)) from error

    def _failure(self, step: int | None, reason: str) -> CheckpointError:
        free = shutil.disk_usage(self.directory).free / 2**30
        kept = [s for s in self.steps if s != step]
        last = f"Step {kept[-1]} is the last complete one" if kept else "There is none yet"
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory} ({free:.2f} GiB free there): {reason}. {last}; "
            "free space or choose another output_dir, then start the run again"
        )

    def restore(
        self, config: TrainConfig, shapes: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any] | None] | None:
        """The newest readable state and data position, or None where there is no checkpoint.

        An unreadable checkpoint is reported through ``say``, moved to ``RUN/corrupt`` and the one before it is taken.
        From a checkpoint without optimizer state only weights come back: step 0, no ``opt_state``, no position.

        Raises:
          CheckpointError: all checkpoints are unreadable, or they belong to other settings.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                return self._restore(step, config, shapes, say)
            except (CheckpointError, ConfigError):
                raise
            except Exception as error:
                target = self.directory.parent / "corrupt" / str(step)
                say(f"checkpoint {step} is unreadable ({_first_line(error)}); moved to {target}")
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                shutil.move(self.directory / str(step), target)
                self._manager.close()
                self._open()
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self.directory} could be read; they lie in {self.directory.parent / 'corrupt'}. "
                "Start again to train from the beginning"
            )
        return None

    def _restore(
        self, step: int, config: TrainConfig, shapes: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any] | None]:
        stored = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        initial = not (self.directory / str(step) / "optimizer").exists()
        _check_same(stored, config, self.directory / str(step), initial, say)
        wanted: dict[str, Any] = {"params": ocp.args.StandardRestore(shapes.params)}
        if not initial:
            wanted["optimizer"] = ocp.args.StandardRestore({"step": shapes.step, "opt_state": shapes.opt_state})
            wanted["data"] = ocp.args.JsonRestore()
            if shapes.ema is not None:
                wanted["ema"] = ocp.args.StandardRestore(shapes.ema)
            if shapes.memory is not None:
                wanted["memory"] = ocp.args.StandardRestore(_filled(shapes.memory))
        found = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        if initial:
            ema = None if shapes.ema is None else jax.tree.map(lambda x: x.copy(), found["params"])
            memory = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.memory)
            return TrainState(jnp.zeros((), jnp.int32), found["params"], None, ema, memory), None
        optimizer = found["optimizer"]
        ema = found["ema"] if shapes.ema is not None else None
        memory = None if shapes.memory is None else _refilled(found["memory"], shapes.memory)
        state = TrainState(optimizer["step"], found["params"], optimizer["opt_state"], ema, memory)
        return state, found["data"]


def load_for_export(run_dir: str | Path, step: int | None = None) -> tuple[TrainConfig, dict[str, Any]]:
    """Settings and weights (numpy, float32; the average where one was kept) of a run's newest or named checkpoint.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    run_dir = Path(run_dir)
    directory = run_dir.absolute() / "checkpoints"
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit()) if directory.is_dir() else []
    if not steps:
        raise CheckpointError(f"{run_dir} holds no checkpoint: expected a run directory with checkpoints/STEP inside")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {chosen}; there are {', '.join(map(str, steps))}")
    try:
        with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
            stored = manager.restore(chosen, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
            config = TrainConfig.from_dict(stored)
            item = "ema" if (directory / str(chosen) / "ema").exists() else "params"
            device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
            shapes = jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device),
                param_shapes(ByteTransformer(config.model)),
            )
            found = manager.restore(chosen, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(shapes)}))
    except ConfigError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {directory / str(chosen)} is unreadable: {_first_line(error)}. Name another one with --step"
        ) from error
    return config, jax.tree.map(np.asarray, found[item])


def save_initial(run_dir: str | Path, config: ByteConfig, params: dict[str, Any], tokenizer: str | None = None) -> None:
    """Writes weights as step 0 of a run directory, for training to start from.

    Raises:
      CheckpointError: the directory already has a checkpoint, or the write failed.
    """
    run_dir = Path(run_dir)
    data = DataConfig(
        sequence_length=min(1024, config.max_position_embeddings),
        tokenizer=tokenizer or DataConfig().tokenizer,
        arrangement="streams" if config.has_memory else "packed",
    )
    train = TrainConfig(
        output_dir=str(run_dir), steps=1, model=config, data=data, schedule=ScheduleConfig(warmup_steps=0)
    )
    checkpointer = Checkpointer(run_dir, CheckpointConfig())
    if checkpointer.steps:
        raise CheckpointError(f"{run_dir} already has checkpoints ({checkpointer.steps}): choose an empty directory")
    items = {
        "params": ocp.args.StandardSave(jax.tree.map(np.asarray, params)),
        "config": ocp.args.JsonSave(json.loads(train.to_json())),
    }
    checkpointer._guarded(0, lambda: checkpointer._manager.save(0, args=ocp.args.Composite(**items), force=True))
    checkpointer.close()


def _metric(metrics: Any) -> float:
    return float(metrics["validation_loss"])


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    # Long ones begin with what was tried and end with what went wrong.
    return f"{type(error).__name__}: {text if len(text) < 300 else f'{text[:100]} ... {text[-150:]}'}"


def _filled(tree: Any) -> dict[str, Any]:
    """The leaves that have elements, by number: files cannot hold the others, of layers without memory."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if math.prod(leaf.shape)}


def _refilled(found: dict[str, Any], shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    filled = [found[str(i)] if str(i) in found else jnp.zeros(s.shape, s.dtype) for i, s in enumerate(leaves)]
    return jax.tree.unflatten(tree, filled)


def _architecture(config: ByteConfig) -> dict[str, Any]:
    """What a checkpoint depends on, with derived sizes spelt out."""
    values = {name: value for name, value in config.to_dict().items() if name not in _RUNTIME_FIELDS}
    values["memory"] = {name: value for name, value in values["memory"].items() if name != "batch_policy"}
    derived = {
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "layer_types": config.windows,
    }
    return {**values, **derived}


def _check_same(
    stored: dict[str, Any], config: TrainConfig, path: Path, initial: bool, say: Callable[[str], None]
) -> None:
    now = json.loads(config.to_json())
    stored = json.loads(TrainConfig.from_dict(stored).to_json())  # settings that are newer than it have their defaults
    there = _architecture(ByteConfig.from_dict(stored["model"]))
    differ = {
        name: f"model.{name} is {there[name]!r} there and {value!r} here"
        for name, value in _architecture(config.model).items()
        if there[name] != value
    }
    if initial:
        for name in _POSITION_FIELDS:
            if name in differ:
                say(f"the weights in {path} get other positions: {differ.pop(name)}")
    if differ:
        raise CheckpointError(
            f"{path} holds another model: {'; '.join(differ.values())}. Use the same settings, or another output_dir"
        )
    if initial:
        return
    differ = [
        f"data.{name} was {stored['data'].get(name)!r} and is {now['data'][name]!r}"
        for name in _STREAM_FIELDS
        if stored["data"].get(name) != now["data"][name]
    ]
    differ += [
        f"{name} was {stored[name]!r} and is {now[name]!r}"
        for name in ("seed", "global_batch_size")
        if stored[name] != now[name]
    ]
    if stored["optimizer"]["name"] != now["optimizer"]["name"]:
        differ.append(f"optimizer.name was {stored['optimizer']['name']!r} and is {now['optimizer']['name']!r}")
    clips = [c["optimizer"]["gradient_clip_norm"] for c in (stored, now)]
    if (clips[0] is None) != (clips[1] is None):
        differ.append(f"optimizer.gradient_clip_norm was {clips[0]} and is {clips[1]}")
    if (stored["ema_decay"] is None) != (now["ema_decay"] is None):
        differ.append(f"ema_decay was {stored['ema_decay']} and is {now['ema_decay']}")
    if differ:
        raise CheckpointError(
            f"{path} cannot be continued with these settings: {'; '.join(differ)}. "
            "Use the same ones, or another output_dir"
        )
