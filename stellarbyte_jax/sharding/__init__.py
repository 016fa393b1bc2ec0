"""Meshes of devices: what is split over which axes, and the operations that need to know it.

Model code is that of one device. ``jax.set_mesh`` says which mesh there is; :func:`constrain` and the operations here
read it, and do nothing of their own without one.
"""

from stellarbyte_jax.sharding.hosts import device_mesh, give_part, on_host, part_on_host, split_array
from stellarbyte_jax.sharding.rules import (
    ACTIVATION_AXES,
    AXES,
    RULES,
    WEIGHT_AXES,
    Rules,
    axis_size,
    constrain,
    current_mesh,
    enter,
    gather,
    kept_spec_of,
    make_mesh,
    spec_of,
    stream_axes,
)

__all__ = [
    "ACTIVATION_AXES",
    "AXES",
    "RULES",
    "WEIGHT_AXES",
    "Rules",
    "axis_size",
    "constrain",
    "current_mesh",
    "device_mesh",
    "enter",
    "gather",
    "give_part",
    "kept_spec_of",
    "make_mesh",
    "on_host",
    "part_on_host",
    "spec_of",
    "split_array",
    "stream_axes",
]
