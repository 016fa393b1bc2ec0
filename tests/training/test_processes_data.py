"""Several processes follow one order of the data: from checkpoint to checkpoint, mixed, and to its end."""

import json

import numpy as np
import pytest
from helpers.runs import ROOT, log_of, write_config
from helpers.several import COMMON, assert_done, assert_same_run, batches_of, numbers, run

from stellarbyte_jax.checkpoint.weights import stored_steps

pytestmark = pytest.mark.slow


def last_place(directory):
    """The step of the last checkpoint, and what it keeps of the data."""
    step = stored_steps(directory)[-1]
    return step, json.loads((directory / "checkpoints" / str(step) / "data" / "metadata").read_text())


def test_a_mixture_goes_on_with_four_processes_and_with_two(tmp_path):
    """Each time a signal comes to one of them, in the middle of a group of documents, whose rest is to be read."""
    (tmp_path / "one").mkdir()
    alone, config = write_config(tmp_path / "one"), write_config(tmp_path)
    texts = [ROOT / "data" / f"tiny_{name}_valid.jsonl" for name in ("bilingual", "chat")]
    chat = tmp_path / "chat.jsonl"
    with chat.open("w") as file:
        for line in texts[1].read_text().splitlines():
            said = " ".join(message["content"] for message in json.loads(line)["messages"])
            file.write(json.dumps({"text": said}) + "\n")
    mixed = (*COMMON, "steps=12", f'data.train=["{texts[0]}","{chat}"]', "data.weights=[1,3]")
    straight = run(alone, 1, *mixed)
    assert_done(straight)
    expected = batches_of(straight)
    assert len(expected) == 12 and len(np.unique(expected.reshape(12 * 4, -1), axis=0)) == 12 * 4

    done = 0
    for count, rank, after in ((1, 0, 3), (4, 2, 6), (2, 1, 9)):
        stop = f"if rank == {rank}: at_step({after}, lambda: os.kill(os.getpid(), signal.SIGTERM))"
        ended = run(config, count, *mixed, "checkpoint.interval=100", "checkpoint.keep_best=0", before=stop)
        assert_done(ended, 143)
        stopped, kept = last_place(tmp_path / "run")
        assert after <= stopped < after + 3 and f"SIGTERM: stopped at step {stopped} of 12" in ended[0].out
        assert done == 0 or f"resumed at step {done}" in ended[0].out
        assert kept["loader"]["offset"] > 0, "tokens of the group that rows have"
        assert {len(each.batches) for each in ended} == {stopped - done}
        np.testing.assert_array_equal(batches_of(ended), expected[done:stopped])
        done = stopped
    last = run(config, 1, *mixed)
    assert_done(last)
    np.testing.assert_array_equal(batches_of(last), expected[done:])
    assert_same_run(numbers(tmp_path / "run"), numbers(tmp_path / "one" / "run"))


def test_processes_come_to_the_end_of_the_data_and_of_validation_together(tmp_path):
    """Of the last batch the first process alone has tokens; validation is shorter than it may be, and ends likewise."""
    lines = (ROOT / "data" / "tiny_bilingual_valid.jsonl").read_text().splitlines()
    letters = "".join(filter(str.isascii, "".join(json.loads(line)["text"] for line in lines)))
    texts = [json.dumps({"text": letters[200 * i :][:200]}) + "\n" for i in range(9)]
    for name, taken in (("train", texts[:7]), ("validation", texts[7:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(taken))
    files = [f'data.{split}=["{tmp_path / split}.jsonl"]' for split in ("train", "validation")]
    ends = (*COMMON, *files, "steps=50", "schedule.name=constant", "data.epochs=1", "evaluation.batches=20")
    ended, places = {}, {}
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        ended[name] = run(write_config(tmp_path / name), count, *ends, f"mesh.fsdp={count}")
        assert_done(ended[name])
        places[name] = last_place(tmp_path / name / "run")
    expected = batches_of(ended["one"])
    steps = len(expected)
    assert 6 < steps < 50
    assert [len(set(row)) > 1 for row in expected[-1].tolist()] == [True, False, False, False], "padding"
    for name, of_it in ended.items():
        assert f"the data ended after 1 epochs, at step {steps} of 50" in of_it[0].out
        assert [len(each.batches) for each in of_it] == [steps] * len(of_it)
        step, kept = places[name]
        assert step == steps == kept["validated"] and kept["validation"]["whole"]
        assert 1 < kept["validation"]["batches"] < 20
    np.testing.assert_array_equal(batches_of(ended["two"]), expected)
    assert places["one"][1]["validation"] == places["two"][1]["validation"]
    assert_same_run(numbers(tmp_path / "two" / "run"), numbers(tmp_path / "one" / "run"))
    training, validation = log_of(tmp_path / "two" / "run")
    assert max(training) == max(validation) == steps
