"""Signals in a run of several processes: all act on one after the same step, whichever process it came to."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stellarbyte_jax.launch import Interrupt, processes


class SharedInterrupt(Interrupt):
    """The signal that came to any process.

    Each process gives its own to a program that runs on all devices and returns the greatest number; what it returned
    is read at the next exchange, so that no process waits for the others. :meth:`agree` and :meth:`came` exchange: all
    processes have to call them equally often, in the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Takes the mesh of all processes' devices."""
        super().__init__()
        self._where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._devices = mesh.size
        self._greatest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None
        self._agreed: int | None = None

    @property
    def signal(self) -> int | None:
        """The signal that all processes know of."""
        return self._agreed

    def agree(self) -> None:
        """Gives away what came to this process, and takes what had come to all at the exchange before."""
        own = np.full(1, self.received or 0, np.int32)
        before, self._before = (
            self._before,
            self._greatest(jax.make_array_from_callback((self._devices,), self._where, lambda _: own)),
        )
        if before is not None and (number := int(before)):
            self._agreed = number

    def came(self) -> bool:
        """Whether a signal came to any process."""
        self.agree()
        return self._agreed is not None

    def _told(self, text: str) -> None:
        super()._told(text if processes.is_main() else f"\n{processes.name()}: {text.lstrip()}")

    def _leave(self, number: int) -> None:
        processes.leave(number, "a second ")


def make_interrupt(mesh: Mesh) -> Interrupt:
    """The signals of a run on this mesh."""
    return SharedInterrupt(mesh) if processes.count() > 1 else Interrupt()
