"""A run of several processes: it is that of one, its parts of files are written once, and it ends as one."""

import json
import shutil
import signal
import struct

import jax
import numpy as np
import pytest
from helpers.runs import cli, write_config
from helpers.several import COMMON, assert_done, assert_same_run, batches_of, numbers, run
from helpers.training import settings
from tensorboardX.proto import event_pb2

from stellarbyte_jax.checkpoint.weights import load_training_facts, load_weights
from stellarbyte_jax.config import ConfigError, MeshConfig
from stellarbyte_jax.data.loader import Loader
from stellarbyte_jax.hf.directory import save_pretrained
from stellarbyte_jax.launch import processes
from stellarbyte_jax.model.decoder import ByteTransformer
from stellarbyte_jax.sharding import make_mesh
from stellarbyte_jax.training import placement
from stellarbyte_jax.training.agreement import SharedInterrupt


def run_here(config, *settings):
    """A run of this process alone; the batches that it trains on, int [batches, rows, length]."""
    batches, following = [], Loader.__next__

    def recorded(self):
        batch = following(self)
        if not self._restart:  # training
            batches.append(np.asarray(batch["tokens"]))
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__next__", recorded)
        assert cli(config, *settings) == 0
    return np.array(batches)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: its directory, numbers and batches."""
    config = write_config(tmp_path_factory.mktemp("alone"))
    batches = run_here(config, *COMMON)
    directory = config.parent / "run"
    return directory, numbers(directory), batches


WATCH_EXPORT = """
from stellarbyte_jax.hf import leaves
from stellarbyte_jax.sharding import hosts
gather, taken, given, largest = hosts._gathered, [0], [0], [0]
def gathered(*args):
    part = gather(*args)
    largest[0] = max(largest[0], part.nbytes)
    return part
hosts._gathered = gathered
take, give = leaves.part_on_host, leaves.give_part
def part_on_host(*args):
    taken[0] += 1
    return take(*args)
def give_part(*args):
    given[0] += 1
    return give(*args)
leaves.part_on_host, leaves.give_part = part_on_host, give_part
def refuse(*args, **kwargs):
    raise AssertionError("all of an array is gathered")
from stellarbyte_jax.training import finish
exported = finish.export
def export(*args, **kwargs):
    from jax.experimental import multihost_utils
    multihost_utils.process_allgather, before = refuse, multihost_utils.process_allgather
    exported(*args, **kwargs)
    multihost_utils.process_allgather = before
    print("EXPORT", taken[0], given[0], largest[0], file=sys.stderr)
finish.export = export
"""


def test_two_processes_are_one(alone, tmp_path):
    config = write_config(tmp_path)
    opened = (
        "[p for p in (os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')) if '/run/' in p]"
    )
    told = f"print('OPEN', {opened}, 'tensorboardX' in sys.modules, file=sys.stderr)"
    # Once the checkpoint of step 2 is written: meanwhile its files are open.
    before = f"if rank == 1: at_step(3, lambda: (saved(2), {told}))"
    ends = ("export_at_end=true", 'sample_prompts=["a"]')
    settings = (*COMMON, *ends, 'logging.trackers=["tensorboard"]', "mesh.fsdp=2")
    ended = run(config, 2, *settings, before=f"{before}\n{WATCH_EXPORT}")
    assert_done(ended)
    _, expected, batches = alone
    assert_same_run(numbers(tmp_path / "run"), expected)
    np.testing.assert_array_equal(batches_of(ended), batches)
    own = [set().union(*(batch.keys() for batch in each.batches)) for each in ended]
    assert own == [{0, 1}, {2, 3}]  # each process puts its rows, and no others, on its devices
    main, other = ended
    assert "of 2 processes" in main.out and "sample: a|" in main.out and "data.train holds text" in main.out
    said, _, export = other.err.partition("\nEXPORT ")
    # It prints nothing, has no file of the run open, and no tracker.
    assert (other.out, said) == ("", "OPEN [] False")
    assert scalars(tmp_path / "run" / "tensorboard") == [
        (line["step"], name, np.float32(value))
        for line in lines_of(tmp_path / "run")
        for name, value in line.items()
        if name != "step"
    ]
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 1
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("step 6/6  loss") == 1
    gathers_one_tensor_at_a_time(tmp_path, main.err.partition("EXPORT ")[2].split(), export.split())


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(directory):
    """All that TensorBoard's files hold, as (step, name, value), of the one process that writes one."""
    (file,) = directory.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        event = event_pb2.Event.FromString(data[12 : 12 + length])  # between two checksums
        found += [(event.step, each.tag, np.float32(each.simple_value)) for each in event.summary.value]
        data = data[12 + length + 4 :]
    return [each for each in found if not each[1].startswith("samples/")]


def gathers_one_tensor_at_a_time(tmp_path, main, other):
    """For the process that writes; the file is that of one process."""
    (taken, _, largest), (none, given, _) = map(int, main), map(int, other)
    stored, params = load_weights(tmp_path / "run")
    assert taken == given > 0 and none == 0
    assert largest == 1280 * 16 * 4  # the embedding, which is one tensor
    target = tmp_path / "again"
    tokenizer, facts = tmp_path / "run" / "tokenizer", load_training_facts(tmp_path / "run")
    save_pretrained(target, ByteTransformer(stored.model), params, tokenizer=tokenizer, training=facts)
    name = "model.safetensors"
    assert (target / name).read_bytes() == (tmp_path / "run" / "hf" / name).read_bytes()


def test_a_run_goes_on_with_more_and_fewer_processes_and_a_signal_to_one_stops_all_after_the_same_step(
    alone, tmp_path, capsys
):
    config = write_config(tmp_path)
    directory, expected, batches = alone
    copy = tmp_path / "run"
    shutil.copytree(directory, copy)
    for step in (4, 6):
        shutil.rmtree(copy / "checkpoints" / str(step))
    before = "if rank == 1: at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))"
    two = run(config, 2, *COMMON, "checkpoint.interval=100", before=before)
    assert_done(two, 143)
    stopped = max(int(path.name) for path in (copy / "checkpoints").iterdir())
    assert 3 <= stopped < 6
    assert "resumed at step 2" in two[0].out and f"SIGTERM: stopped at step {stopped} of 6" in two[0].out
    assert {len(each.batches) for each in two} == {stopped - 2}
    hint = "SIGTERM: saving a checkpoint after this step, then leaving; a second signal leaves at once"
    assert two[1].out == f"\nprocess 1 of 2: {hint}" and hint not in two[0].out, "said where it came"
    np.testing.assert_array_equal(batches_of(two), batches[2:stopped])
    np.testing.assert_array_equal(run_here(config, *COMMON), batches[stopped:])
    assert f"resumed at step {stopped}" in capsys.readouterr().out
    assert_same_run(numbers(copy), expected)


TWICE = """
if rank == RANK:
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.NUMBER)
            __import__("time").sleep(1.2)  # two that come together are one
    at_step(2, twice)
"""
BEFORE_TRAINING = """
if rank == RANK:
    from stellarbyte_jax.training import begin
    begin.complete = lambda config: os.kill(os.getpid(), signal.NUMBER) or __import__("time").sleep(60)
"""


@pytest.mark.parametrize(
    ("before", "rank", "number", "code", "why"),
    [
        pytest.param(TWICE, 1, "SIGINT", 130, "a second SIGINT", marks=pytest.mark.slow),
        (TWICE, 0, "SIGTERM", 143, "a second SIGTERM"),
        (BEFORE_TRAINING, 1, "SIGTERM", 143, "SIGTERM"),
        pytest.param(BEFORE_TRAINING, 0, "SIGINT", 130, "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_leaves_at_once_tells_the_others(before, rank, number, code, why, tmp_path):
    config = write_config(tmp_path)
    before = before.replace("RANK", str(rank)).replace("NUMBER", number)
    ended = run(config, 2, *COMMON, "checkpoint.interval=100", "evaluation.interval=100", before=before)
    assert_done(ended, code)
    told = f"process {rank} of 2 left at {why}; the same command goes on from the last checkpoint"
    for each in ended:
        said = [line for line in each.err.splitlines() if line]
        assert len(said) == 1 and told in said[0] and said[0].startswith("error: "), each.err
    left, other = ended[rank].ended_at, ended[1 - rank].ended_at
    assert abs(left - other) < 6, "sooner than silence would be noticed"
    if rank > 0:  # process 0 waits for the other, and may save meanwhile
        assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_signal_that_came_to_several_processes_is_that_signal():
    """Ctrl-C goes to every process of a terminal; what they exchange is known after the next step."""
    interrupt = SharedInterrupt(make_mesh({"data": 8}))
    assert not interrupt.came()
    interrupt.received = signal.SIGINT  # on all eight devices
    assert not interrupt.came() and interrupt.signal is None
    assert interrupt.came() and interrupt.exit_code == 130


def test_all_processes_take_part_in_the_mesh(monkeypatch):
    """One without a device in it would wait for the others for ever."""
    monkeypatch.setattr(placement, "devices", jax.devices)
    for where, name in ((jax, "process_count"), (processes, "count")):
        monkeypatch.setattr(where, name, lambda: 2)
    with pytest.raises(ConfigError, match=r"the mesh uses 1 of the 8 devices of 2 processes, .*: leave mesh\.data=-1"):
        placement.mesh_of(settings(mesh=MeshConfig(data=1)))
    assert placement.mesh_of(settings(mesh=MeshConfig(data=4, fsdp=2), global_batch_size=8)).size == 8


def test_an_error_of_the_main_process_ends_all(tmp_path):
    config = write_config(tmp_path)
    before = """
def full():
    raise OSError(28, "No space left on device", "metrics.jsonl")
if rank == 0: at_step(2, full)
"""
    main, other = run(config, 2, *COMMON, before=before)
    assert (main.code, other.code) == (1, 1)
    assert main.err.splitlines()[-1].startswith("error: ") and "No space left" in main.err
    assert other.err.startswith("error: process 1 of 2: process 0 of 2 failed: ") and "No space left" in other.err
    assert len(other.err.splitlines()) == 1
    assert abs(main.ended_at - other.ended_at) < 30


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_goes_on(tmp_path):
    config = write_config(tmp_path)
    before = "if rank == 2: at_step(3, lambda: (saved(2), os.kill(os.getpid(), signal.SIGKILL)))"
    ended = run(config, 4, *COMMON, before=before)
    assert [each.code for each in ended] == [1, 1, -9, 1]
    for rank in (0, 1, 3):
        last = ended[rank].err.splitlines()[-1]
        assert last.startswith("error: ") and "process 2 of 4 is gone" in last, ended[rank].err
    assert max(each.ended_at for each in ended) - ended[2].ended_at < 60
    again = run(config, 2, *COMMON)
    assert_done(again)
    assert "resumed at step 2" in again[0].out


@pytest.mark.slow
def test_the_others_end_with_a_killed_main_process(tmp_path):
    config = write_config(tmp_path)
    before = "if rank == 0: at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    main, other = run(config, 2, *COMMON, before=before)
    assert main.code == -9 and other.code != 0
    last = other.err.splitlines()[-1]
    assert last.startswith("error: process 1 of 2: ended with process 0, which is gone"), other.err
    assert other.ended_at - main.ended_at < 60


@pytest.mark.slow
def test_experts_that_begin_with_weights_are_those_of_one_process(alone, tmp_path):
    """Weights of another run, experts and heads over processes, and prompts that are continued together."""
    directory, _, _ = alone
    config = write_config(tmp_path)
    dense = (*COMMON, "steps=2", "schedule.warmup_steps=0", f"init_from={directory}", 'sample_prompts=["a","bc"]')
    ended = run(config, 2, *dense, "mesh.tensor=2", "mesh.data=2", devices=2)
    assert_done(ended)
    run_here(config, *dense, f"output_dir={tmp_path / 'one'}")
    assert_same_run(numbers(tmp_path / "run"), numbers(tmp_path / "one"))
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "one")]
    assert texts[0] == texts[1]
    experts = (
        *COMMON,
        "steps=2",
        "schedule.warmup_steps=0",
        "model.moe.num_experts=4",
        "model.moe.num_experts_per_tok=2",
    )
    assert_done(run(config, 2, *experts, "mesh.expert=2", f"output_dir={tmp_path / 'e2'}"))
    run_here(config, *experts, f"output_dir={tmp_path / 'e1'}")
    assert_same_run(numbers(tmp_path / "e2"), numbers(tmp_path / "e1"))
    loads = [(tmp_path / name / "router_load.jsonl").read_text() for name in ("e2", "e1")]
    assert loads[0] == loads[1]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_once_and_all_take_the_one_before(alone, tmp_path):
    config = write_config(tmp_path)
    shutil.copytree(alone[0], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "6" / "optimizer").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    ended = run(config, 2, *COMMON)
    assert_done(ended)
    assert ended[0].out.count("checkpoint 6 is unreadable") == 1 and "resumed at step 4 " in ended[0].out
    assert ended[1].err == ""
    assert any((tmp_path / "run" / "corrupt" / "6").rglob("*"))
    assert_same_run(numbers(tmp_path / "run"), alone[1])
