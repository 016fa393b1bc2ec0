"""A real pretrained model on tasks of its own, beside lm-eval's backend for transformers, to the last digit printed."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers.local_tasks import write_tasks
from helpers.smollm2 import smollm2

from stellarbyte_jax.checkpoint.bundle import load_bundle
from stellarbyte_jax.inference.reconfigure import reconfigure

pytest.importorskip("lm_eval", reason="the peer is lm-eval: pip install -e '.[eval]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of lm-eval and datasets

from stellarbyte_jax.evaluation.adapter import as_lm  # noqa: E402
from stellarbyte_jax.evaluation.tasks import evaluate_tasks  # noqa: E402


def test_numbers_are_those_of_lm_evals_own_backend(tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's backend for transformers needs it")
    from lm_eval.models.huggingface import HFLM

    directory = smollm2()
    files = write_tasks(tmp_path / "tasks")
    tasks = [str(path) for path in files.values()]
    bundle = load_bundle(directory)
    bundle = replace(bundle, model=reconfigure(bundle.model, ["compute_dtype=float32"]))
    with warnings.catch_warnings(action="ignore"):
        peer = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=8)
        precise = HFLM(pretrained=str(directory), dtype="float64", device="cpu", batch_size=1)
    found = evaluate_tasks(as_lm(bundle, batch_size=8), tasks, limit=3)
    wanted = evaluate_tasks(peer, tasks, limit=3)
    exact = {result.metric: result.value for result in evaluate_tasks(precise, [str(files["corpus"])], limit=3)}
    assert len(found) == 9
    for ours, theirs in zip(found, wanted, strict=True):
        print(ours, theirs.value)
        if ours.metric == "word_perplexity":  # an exponential of 12.5, so the peer's float32 sums show
            assert ours.value == pytest.approx(theirs.value, rel=1e-4)
            # An exponential is off relatively by what its exponent is off by absolutely. The exponent is a mean of
            # float32 log-probabilities: of a logit, the logarithm of a sum, their difference, and what the products
            # before them rounded in an order that is the CPU's. Each may be off by eps of the exponent's size.
            rounded = math.log(exact[ours.metric]) * float(np.finfo(np.float32).eps)
            assert ours.value == pytest.approx(exact[ours.metric], rel=4 * rounded)
        else:
            assert f"{ours.value:.4f}" == f"{theirs.value:.4f}", ours.metric
        assert ours.stderr == (None if theirs.stderr is None else pytest.approx(theirs.stderr, abs=5e-5))
