"""Checkpoints of a run: ``RUN/checkpoints/STEP``, written by orbax in the background and made visible by a rename.

Items of a step: ``params`` (the trained weights), ``frozen``, ``ema`` and ``memory`` (where there are any),
``optimizer`` (its state and the step), ``data`` (position of the loader and progress of the run, JSON), ``config`` (the
resolved settings, JSON) and ``format`` (JSON); beside them orbax's ``metrics`` (JSON), where the validation loss was
measured. A step made from foreign weights has no ``optimizer``. One with adapters does not hold the weights that they
belong to; ``base`` (JSON) says where those lie, and their checksums.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from stellarbyte_jax.checkpoint.checksum import array_checksums, differing, json_checksum, shared
from stellarbyte_jax.checkpoint.leafwise import lazy_items, read_leaf, save_args, stored_leaves
from stellarbyte_jax.command import MendableError, remedy
from stellarbyte_jax.config import CheckpointConfig, ConfigError
from stellarbyte_jax.config.foreign import clipped, listed, shown
from stellarbyte_jax.launch import processes
from stellarbyte_jax.model.lazy import LazyArray

# Of the items above and of the parameter tree: a checkpoint of another one is refused.
_FORMAT = 2

BASE = "base"  # the JSON item of a step that says which weights its adapters belong to
TOKENIZER = "tokenizer"  # the folder of a run that holds a copy of its tokenizer
EXPORT = "hf"  # the folder of a run that holds its Hugging Face directory

Result = TypeVar("Result")


class CheckpointError(MendableError):
    """A checkpoint that cannot be written, read or used with these settings."""


class StoredStep:
    """One complete checkpoint."""

    def __init__(self, manager: ocp.CheckpointManager, directory: Path, step: int, verify: bool = True) -> None:
        """Reads nothing yet; ``verify`` says whether arrays are compared with their checksums."""
        self._manager = manager
        self._verify = verify
        self._facts: dict[str, Any] = {}
        self.step = step
        self.path = directory / str(step)

    @classmethod
    def open(cls, manager: ocp.CheckpointManager, directory: Path, step: int, verify: bool = True) -> Self:
        """The step, of which it is known that this version can read it and that every item is there.

        Raises:
          CheckpointError: the step has another format.
          OSError: it is damaged.
        """
        stored = cls(manager, directory, step, verify)
        if not stored.has("format"):
            if not (stored.has("params") and stored.has("config")):
                raise FileNotFoundError("nearly all of it is missing")
            if stored._lost_format():
                raise FileNotFoundError("format of it is missing")
        facts = stored._read("format") if stored.has("format") else {}
        if "checksum" in facts:
            checksum = facts.pop("checksum")
            if json_checksum(facts) != checksum:
                raise OSError("format differs from its checksum")
            missing = [item for item in facts["items"] if not stored.has(item)]
            if missing:
                raise FileNotFoundError(f"{listed(missing)} of it is missing")
        stored._facts = facts
        found = facts.get("format", 1)
        if found != _FORMAT:
            raise CheckpointError(
                f"{stored.path} is a checkpoint of format {shown(found)}, this version reads {_FORMAT}: convert it to "
                "the Hugging Face format with the version that wrote it, and that with this one"
            )
        return stored

    def has(self, item: str) -> bool:
        """Whether the step has this item."""
        return (self.path / item).exists()

    def _lost_format(self) -> bool:
        """Whether it had a note of its format, as the oldest had none: orbax's list of items or its neighbours tell."""
        try:
            listing = json.loads((self.path / "_CHECKPOINT_METADATA").read_bytes())
            if "format" in listing["item_handlers"]:
                return True
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return any(self.path.parent.glob("[0-9]*/format"))

    @property
    def frozen_paths(self) -> list[str]:
        """Paths of the weights that are not trained."""
        return self._facts["frozen"]

    def json(self, item: str) -> Any:
        """A JSON item.

        Raises:
          OSError: it is not what was written.
        """
        value = self._read(item)
        if json_checksum(value) != self._facts.get("json", {}).get(item, json_checksum(value)):
            raise OSError(f"{item} differs from its checksum")
        return value

    def _read(self, item: str) -> Any:
        return self._manager.restore(self.step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def arrays(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Items as trees of arrays with these shapes, dtypes and shardings; on one device where there is none.

        Raises:
          OSError: an array is not what was written.
        """
        wanted = {name: ocp.args.StandardRestore(jax.tree.map(_somewhere, tree)) for name, tree in shapes.items()}
        found = self._manager.restore(self.step, args=ocp.args.Composite(**wanted))
        for name, checksums in self._facts.get("checksums", {}).items():
            if self._verify and name in shapes:
                wrong = differing(found[name], checksums)
                if wrong:
                    raise OSError(f"{name}/{wrong[0]} differs from its checksum")
        return {name: found[name] for name in shapes}

    def lazy_arrays(self, item: str, shapes: Any) -> Any:
        """An item as a tree of lazy arrays, whose reads raise OSError where an array is not what was written.

        Raises:
          ValueError: the item has other arrays.
        """
        checksums = self._facts.get("checksums", {}).get(item, {}) if self._verify else {}

        def read(directory: Path, path: tuple[str, ...], dtype: Any) -> np.ndarray:
            array, name = read_leaf(directory, path, dtype), "/".join(path)
            if checksums and differing({name: array}, checksums):
                raise OSError(f"{item}/{name} differs from its checksum")
            return array

        return stored_leaves(self.path / item, shapes, read)


def _somewhere(wanted: Any) -> Any:
    """With a place: orbax would look for the devices that the array lay on, which another machine does not have."""
    if not isinstance(wanted, jax.ShapeDtypeStruct) or wanted.sharding is not None:
        return wanted
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=one)


class Checkpointer:
    """Writes and reads the checkpoints of one run directory."""

    def __init__(self, run_dir: Path, settings: CheckpointConfig, *, lazy: Sequence[str] = ()) -> None:
        """Opens ``run_dir/checkpoints``, which is made if it does not exist.

        Args:
          run_dir: directory of the run.
          settings: what is kept.
          lazy: items that will be saved as trees of lazy arrays, each of which is read, written and dropped in turn.
        """
        self.directory = run_dir.absolute() / "checkpoints"
        self._verify = settings.verify
        policies: list[Any] = [checkpoint_managers.LatestN(settings.keep_latest)]
        if settings.keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=_metric, reverse=True, n=settings.keep_best, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            best_fn=_metric,
            best_mode="min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            # Made in the background, one that cannot be made leaves all other threads waiting for it, and the program
            # with them, for 20 minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        # Among the checkpoints, which may be a link or a volume: a rename stays within one file system.
        self._replaced = self.directory / "replaced"
        self._earlier_replaced = run_dir.absolute() / "replaced"  # where earlier versions set them aside
        self._lost: list[str] = []
        if processes.is_main():
            self._put_back()
            self._lost = self._drop_unreadable_lists() + self._drop_unreadable_metrics()
        processes.wait_for_all()
        registry = lazy_items(*lazy) if lazy else None
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    def _put_back(self) -> None:
        """A checkpoint whose replacement was not finished comes back."""
        for aside in (self._replaced, self._earlier_replaced):
            for path in aside.glob("[0-9]*"):
                if not (self.directory / path.name).exists():
                    self.directory.mkdir(parents=True, exist_ok=True)
                    path.rename(self.directory / path.name)
            shutil.rmtree(aside, ignore_errors=True)

    def _drop_unreadable_lists(self) -> list[str]:
        """Removes orbax's notes of a step that keep it from opening the directory; items are read without them."""
        lost = []
        for path in sorted(self.directory.glob("[0-9]*/_CHECKPOINT_METADATA")):
            try:
                ocp.metadata.get_step_metadata(path.parent)
            except Exception as error:  # orbax checks each field in its own way
                path.unlink()
                lost.append(
                    f"checkpoint {path.parent.name}: orbax's list of its items is unreadable ({first_line(error)}), "
                    "so it was removed; they are read without it"
                )
        return lost

    def _drop_unreadable_metrics(self) -> list[str]:
        """Removes validation losses that orbax could not read, and so not open the directory; returns what to tell."""
        lost = []
        for path in sorted(self.directory.glob("[0-9]*/metrics")):
            try:
                metrics = json.loads((path / "metrics").read_bytes())
                checksum = metrics.pop("checksum", None)  # older ones have none
                math.isfinite(metrics["validation_loss"])
                if checksum is not None and checksum != json_checksum(metrics):
                    raise ValueError("differs from its checksum")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                shutil.rmtree(path)
                lost.append(
                    f"checkpoint {path.parent.name}: its validation loss is unreadable, so it does not count as one "
                    "of the best"
                )
        return lost

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        frozen: list[str],
        validation_loss: float | None = None,
        checksums: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    ) -> None:
        """Copies arrays and returns; the files are written in the background.

        A checkpoint of the same step is replaced, before this returns.

        Args:
          step: optimizer steps done.
          arrays: items that are trees of arrays.
          facts: items that are JSON values.
          frozen: paths of the weights that are not trained.
          validation_loss: at this step, where it was measured.
          checksums: those of arrays by item, where they are known.

        Raises:
          CheckpointError: this save or the one before it failed; earlier checkpoints are untouched.
        """
        about = {
            "format": _FORMAT,
            "frozen": frozen,
            "items": sorted([*arrays, *facts]),
            "json": {name: json_checksum(values) for name, values in facts.items()},
            "checksums": {name: checksums.get(name) or array_checksums(tree) for name, tree in arrays.items()},
        }
        facts = {**facts, "format": {**about, "checksum": json_checksum(about)}}
        items = {name: _saved(tree) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(values) for name, values in facts.items()}
        metrics: dict[str, Any] | None = None if validation_loss is None else {"validation_loss": validation_loss}
        if metrics is not None:  # orbax keeps it beside the items
            metrics["checksum"] = json_checksum(metrics)
        needed = sum(x.nbytes for x in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self.directory).free
        if free < needed and processes.is_main():  # for all: they write to one directory
            raise self._failure(
                step,
                f"it takes {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free",
                "free space or choose another output_dir",
            )
        replaces = step in self.steps
        if replaces:
            self._guarded(step, lambda: self._set_aside(step))
        self._guarded(
            step, lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        )
        if replaces:
            self.wait()
            processes.wait_for_all()
            if processes.is_main():
                self._put_back()

    def _set_aside(self, step: int) -> None:
        self._manager.wait_until_finished()
        if processes.is_main():
            self._replaced.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(self._replaced / str(step))
        processes.wait_for_all()
        self._manager.reload()

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
            advice = remedy(error) or "mend that or choose another output_dir"
            raise self._failure(step, first_line(error), advice) from error

    def _failure(self, step: int | None, reason: str, advice: str) -> CheckpointError:
        others = [s for s in self.steps if s != step]
        last = f"Step {others[-1]} is the last complete one" if others else "There is none yet"
        return CheckpointError(
            f"a checkpoint could not be written to {self.directory}: {reason}. {last}; {advice}, "
            "then start the run again"
        )

    def restore(self, read: Callable[[StoredStep], Result], say: Callable[[str], None]) -> Result | None:
        """What ``read`` makes of the newest readable step, or None where there is no checkpoint.

        An unreadable checkpoint is reported through ``say``, moved to ``RUN/corrupt`` and the one before it is taken.

        Raises:
          CheckpointError: all checkpoints are unreadable, or ``read`` refuses one.
        """
        for line in self._lost:
            say(line)
        steps = self.steps
        for step in reversed(steps):
            found, error = None, None
            try:
                found = read(StoredStep.open(self._manager, self.directory, step, self._verify))
            except (CheckpointError, ConfigError):
                raise
            except Exception as failure:
                error = failure
            error = processes.first_error(error)
            if error is None:
                return found
            target = self.directory.parent / "corrupt" / str(step)
            say(f"checkpoint {step} is unreadable ({first_line(error)}); moved to {target}")
            if processes.is_main():
                target.parent.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                shutil.move(self.directory / str(step), target)
            processes.wait_for_all()
            self._manager.reload()
        if steps:
            raise CheckpointError(
                f"no checkpoint in {self.directory} could be read; they lie in {self.directory.parent / 'corrupt'}. "
                "Start again to train from the beginning"
            )
        return None


def _saved(tree: Any) -> Any:
    """How orbax is told to save a tree of arrays."""
    if any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(tree)):
        return ocp.args.PyTreeSave(tree, save_args=save_args(tree))
    # Arrays of JAX: orbax copies those of numpy.
    return ocp.args.StandardSave(jax.tree.map(shared, tree), save_args=save_args(tree))


def _metric(metrics: Any) -> float:
    return float(metrics["validation_loss"])


def first_line(error: BaseException) -> str:
    """Kind and message of an error, in one line that is not too long."""
    text = (str(error).strip() or "no message").splitlines()[0]
    # Long ones begin with what was tried and end with what went wrong.
    return f"{type(error).__name__}: {clipped(text if len(text) < 300 else f'{text[:100]} ... {text[-150:]}', 300)}"
