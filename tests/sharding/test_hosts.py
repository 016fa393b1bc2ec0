"""Arrays between hosts and the devices of a mesh: the right numbers, and no more of them than are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stellarbyte_jax.sharding import make_mesh, part_on_host, split_array
from stellarbyte_jax.sharding.hosts import _cut

MESH = {"fsdp": 2, "expert": 2, "tensor": 2}
SHAPE, SPEC = (6, 8, 64, 2, 32), PartitionSpec(None, "expert", "fsdp", None, "tensor")  # experts of stacked layers
PARTS = [(3, 5, slice(None), 0), (0, 0, slice(None), 1), (2,), (slice(4), slice(3)), (1, slice(2, 7))]


def experts(dtype=np.float32):
    made = np.random.default_rng(0).normal(size=SHAPE).astype(dtype)
    made[0, 0, 0] = -0.0
    return made


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("index", [*PARTS, ()])
def test_a_part_has_the_bits_that_the_whole_has_there(index, dtype):
    array, mesh = experts(dtype), make_mesh(MESH)
    split = split_array(array, NamedSharding(mesh, SPEC))
    for given in (split, array, jax.device_put(array)):
        assert part_on_host(given, index).tobytes() == array[index].tobytes()
    with jax.set_mesh(mesh):
        assert part_on_host(split, index).tobytes() == array[index].tobytes()


@pytest.mark.parametrize("index", PARTS)
def test_a_device_gathers_a_part_and_no_more(index):
    split = split_array(experts(), NamedSharding(make_mesh(MESH), SPEC))
    numbers = [np.int32(i) if isinstance(i, int) else None for i in index]
    slices = tuple(None if isinstance(i, int) else (i.start, i.stop) for i in index)
    used = _cut.lower(split, numbers, slices, split.sharding).compile().memory_analysis()
    part = experts()[index].nbytes
    assert used.output_size_in_bytes == part and used.temp_size_in_bytes <= 1.5 * part


def test_split_arrays_share_no_memory_with_what_they_were_made_of():
    array = np.zeros((8, 4096), np.float32)  # rows begin where a device could take them over
    split = split_array(array, NamedSharding(make_mesh({"fsdp": 8}), PartitionSpec("fsdp")))
    assert [shard.data.shape for shard in split.addressable_shards] == [(1, 4096)] * 8
    array[:] = 1
    assert not np.asarray(split).any()
