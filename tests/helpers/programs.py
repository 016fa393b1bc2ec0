"""Runs of one process share the programs that are the same for them, which jax would trace and compile for each."""

import contextlib
import json
from collections.abc import Iterator

import pytest

from stellarbyte_jax.sharding import device_mesh
from stellarbyte_jax.tokenizer.byte_lengths import token_byte_lengths
from stellarbyte_jax.training import run

# Settings that no program holds: where things lie, what is said, and when. All others tell programs apart.
_OUTSIDE = {
    *("output_dir", "init_from", "sample_prompts", "sample_interval", "export_at_end", "report_at_end"),
    *("evaluation", "checkpoint", "logging", "data.train", "data.validation", "data.tokenizer", "data.cache_dir"),
    *("data.workers", "data.prefetch", "data.epochs", "data.on_error", "data.shuffle", "data.add_bos", "data.add_eos"),
}
_OF_STEPS = {"steps", "schedule", "optimizer"}  # neither the first state nor a validation has them


def _told_apart(config, leave_out=()):
    """The settings that make one program another one, and the devices that it is for."""
    outside = {*_OUTSIDE, *leave_out, *(["steps"] if config.schedule.name == "constant" else [])}
    settings = {name: value for name, value in config.to_dict().items() if name not in outside}
    settings["data"] = {name: value for name, value in settings["data"].items() if f"data.{name}" not in outside}
    return json.dumps(settings, sort_keys=True), device_mesh()


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Within it, a run takes the programs of an earlier one with the same settings, as far as programs have them."""
    kept = {}

    def shared(name, key_of):
        make = getattr(run, name)

        def made(*given):
            key = name, key_of(given[0])
            if key not in kept:
                kept[key] = make(*given)
            return kept[key]

        patch.setattr(run, name, made)

    def of_validation(config):
        sizes = token_byte_lengths(config.data.tokenizer)
        return _told_apart(config, _OF_STEPS), None if sizes is None else sizes.tobytes()

    with pytest.MonkeyPatch.context() as patch:
        shared("compiled_create_state", lambda config: _told_apart(config, {"steps", "schedule"}))
        shared("compiled_train_step", _told_apart)
        shared("compiled_eval_step", of_validation)
        yield
