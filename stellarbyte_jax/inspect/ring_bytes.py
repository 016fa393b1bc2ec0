"""Bytes of attention over rows that a mesh splits by position (``sharding.ring``): held and passed on."""

from dataclasses import dataclass

import jax.numpy as jnp

from stellarbyte_jax.config import ByteConfig
from stellarbyte_jax.ops.attention.blocks_cudnn import CudnnBlocks
from stellarbyte_jax.ops.attention.blocks_xla import TILE, XlaBlocks

_FLOAT32 = _INT32 = 4
_SCORES = 4  # float32 copies of a tile's scores in the backward pass: scores, weights, and the gradients of both


@dataclass(frozen=True)
class Ring:
    """One layer's attention on one device.

    Attributes:
      devices: of the ring.
      rows: of the device.
      positions: that it has of each row.
      heads: query heads.
      q: channels of all its query heads.
      kv: channels of all its key heads.
      width: bytes of a number of the compute dtype.
      fused: whether cuDNN's kernels compute blocks; products of XLA else.
      packed: whether rows hold several documents.
    """

    devices: int
    rows: int
    positions: int
    heads: int
    q: int
    kv: int
    width: int
    fused: bool
    packed: bool

    @classmethod
    def of(
        cls, config: ByteConfig, rows: int, length: int, devices: int, tensor: int = 1, *, packed: bool = True
    ) -> "Ring":
        """The ring of a model.

        Args:
          config: of the model.
          rows: of a device, those that are computed at once.
          length: tokens of a whole row.
          devices: of the ring.
          tensor: devices that heads are split over; with fewer key heads than these, each has all of them.
          packed: whether rows hold several documents.
        """
        H, positions = config.head_size, length // devices
        heads = config.num_attention_heads // tensor
        kv_heads = config.kv_heads // (1 if config.kv_heads % tensor else tensor)
        width = jnp.dtype(config.compute_dtype).itemsize
        return cls(
            devices,
            rows,
            positions,
            heads,
            heads * H,
            kv_heads * H,
            width,
            _is_fused(config, positions, length),
            packed,
        )

    @property
    def working(self) -> int:
        """What the backward pass holds beside inputs, result, and the keys of :meth:`sent` with their gradients.

        Of each number of the device's queries a float32 sum of gradients, and those of two blocks, each of half of the
        queries and half of the keys. Of the one whose halves are chosen there are copies of queries, result and slope.
        Scores are those of a tile of XLA's products, of which the fused kernels leave none but the squares of packed
        documents.
        """
        tokens = self.rows * self.positions
        gradients = tokens * _FLOAT32 * (2 * self.q + 2 * self.kv)
        chosen = tokens // 2 * self.width * 3 * self.q
        return gradients + chosen + _SCORES * _FLOAT32 * self.heads * self._scores()

    def _scores(self) -> int:
        """Scores of one head that exist at once."""
        if self.fused and not self.packed:
            return 0
        whole = CudnnBlocks.whole if self.fused else XlaBlocks.whole
        rows, positions = self.rows, self.positions
        while positions > whole and positions % 2 == 0:  # blocks.Blocks.attend_own
            rows, positions = 2 * rows, positions // 2
        own = _of_tile(rows, positions)
        return own if self.fused else max(own, _of_tile(self.rows, self.positions // 2))

    def sent(self, forward_passes: int) -> int:
        """What a device passes on in a step.

        Keys and values, with what a mask says of them, go from device to device in each pass, forward and backward.
        Their gradients, float32 sums, make one hop more, home, for which XLA narrows them to the compute dtype on GPUs.
        It does so for the first hop too where they come from a kernel of that dtype and nothing was added to them.

        Args:
          forward_passes: 1, or 2 where the backward pass computes attention again.
        """
        tokens, hops = self.rows * self.positions, self.devices - 1
        said = tokens * _INT32 * ((not self.fused) + self.packed)  # positions, segments
        keys = 2 * tokens * self.kv * self.width + said
        narrow = hops == 1 and self.fused and not self.packed
        gradients = 2 * tokens * self.kv * (hops * (self.width if narrow else _FLOAT32) + self.width)
        shared = forward_passes - 1  # the first hop of the backward pass, which its two rings have in common
        return (hops * (forward_passes + 1) - shared) * keys + gradients


def _is_fused(config: ByteConfig, positions: int, length: int) -> bool:
    """Whether ``blocks_cudnn.refuse_blocks`` accepts every layer, on a GPU."""
    hides = any(window is not None and window < length for window in config.windows)
    H = config.head_size
    return (
        config.attention_implementation in ("auto", "cudnn")
        and jnp.dtype(config.compute_dtype).itemsize == 2
        and H % 8 == 0
        and H <= 256
        and positions % 4 == 0
        and config.attention_logit_softcap is None
        and not hides
    )


def _of_tile(rows: int, positions: int) -> int:
    """Scores that ``blocks_xla`` makes at once of so many rows of a block: those of some rows or of a tile."""
    side = -(-positions // -(-positions // TILE))
    return min(rows, max(1, (TILE // side) ** 2)) * side * side
