"""The loss of the head on a mesh: each device computes its tokens, for its part of the vocabulary.

B batch, T positions, D model, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from stellarbyte_jax.ops import cross_entropy as op
from stellarbyte_jax.ops.cross_entropy import Gradients, Low, Terms
from stellarbyte_jax.sharding.rules import current_mesh, entry_axes, kept_spec_of, spec_of, stream_axes


def linear_cross_entropy(
    x_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"] | None = None,
    *,
    low: Low | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
    tied: bool = False,
    implementation: str = "auto",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """:func:`ops.cross_entropy.linear_cross_entropy` of tokens in rows, on the mesh that is set.

    With the vocabulary split over ``tensor``, devices exchange maxima and sums of each token (Shoeybi et al. 2019,
    https://arxiv.org/abs/1909.08053). Gradients of the kernel are summed once, and cut as it is kept: by its own axes,
    or where it is ``tied`` by those of the table of the embedding.
    """
    terms = Terms(label_smoothing, z_loss, vocab_size or kernel_DV.shape[1], chunk_size, implementation)
    if current_mesh() is not None:
        return op.named_sums(_on_mesh(x_BTD, kernel_DV, low, targets_BT, weights_BT, terms, tied))
    weights_X = None if weights_BT is None else weights_BT.reshape(-1)
    x_XD, kernel_DV, low = _flat((x_BTD, kernel_DV, low))
    return op.linear_cross_entropy(x_XD, kernel_DV, targets_BT.reshape(-1), weights_X, low=low, **terms._asdict())


def token_losses(
    x_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    low: Low | None = None,
    vocab_size: int | None = None,
) -> Float[Array, "2 B T"]:
    """:func:`ops.cross_entropy.token_losses` of tokens in rows, on the mesh that is set."""

    def local(product: Any, targets_BT: Array, vocab_axis: str | None = None) -> Array:
        x_XD, kernel_DV, low = _flat(product)
        found = op.token_losses(
            x_XD, kernel_DV, targets_BT.reshape(-1), low=low, vocab_size=vocab_size, vocab_axis=vocab_axis
        )
        return found.reshape(2, *targets_BT.shape)

    product = (x_BTD, kernel_DV, low)
    if current_mesh() is None:
        return local(product, targets_BT)
    vocab_size = vocab_size or kernel_DV.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    tokens = spec_of(("batch", "sequence"), targets_BT.shape, mesh)
    columns = spec_of((None, "vocab"), kernel_DV.shape, mesh)
    (vocab_axis,) = entry_axes(columns[1]) or (None,)
    on_device = partial(local, vocab_axis=vocab_axis)
    out = PartitionSpec(None, *tokens)
    specs = (_specs(low, PartitionSpec(*tokens, None), columns), tokens)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(product, targets_BT)


def _flat(product: Any) -> Any:
    """What makes the logits, with tokens on one axis."""
    x_BTD, kernel_DV, low = product
    low = None if low is None else (low[0].reshape(-1, low[0].shape[-1]), low[1])
    return x_BTD.reshape(-1, x_BTD.shape[-1]), kernel_DV, low


def _specs(low: Any, tokens: PartitionSpec, columns: PartitionSpec) -> Any:
    """How what makes the logits is split."""
    return tokens, columns, None if low is None else (tokens, PartitionSpec(None, columns[1]))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _on_mesh(
    x_BTD: Array,
    kernel_DV: Array,
    low: Low | None,
    targets_BT: Array,
    weights_BT: Array | None,
    terms: Terms,
    tied: bool,
) -> Array:
    return _each_device((x_BTD, kernel_DV, low), targets_BT, weights_BT, terms, tied, None)[0]


def _forward(x_BTD: Any, kernel_DV: Any, low: Any, targets_BT: Any, weights_BT: Any, terms: Terms, tied: bool) -> Any:
    (product, targets_BT, weights_BT), wanted = op.given_values((x_BTD, kernel_DV, low), targets_BT, weights_BT)
    return _each_device(product, targets_BT, weights_BT, terms, tied, wanted)


def _backward(terms: Terms, tied: bool, gradients: Gradients, slope_4: Any) -> tuple[Any, ...]:
    del tied
    return op.scaled_gradients(terms, gradients, slope_4)


_on_mesh.defvjp(_forward, _backward, symbolic_zeros=True)


def _each_device(
    product: Any, targets_BT: Array, weights_BT: Array | None, terms: Terms, tied: bool, wanted: Gradients | None
) -> tuple[Array, Gradients | None]:
    x_BTD, kernel_DV, low = product
    mesh = jax.sharding.get_abstract_mesh()
    tokens = spec_of(("batch", "sequence"), targets_BT.shape, mesh)
    columns = spec_of((None, "vocab"), kernel_DV.shape, mesh)
    given = PartitionSpec(*tokens, None)
    D, V = kernel_DV.shape
    of_table = kept_spec_of(("vocab", "embed"), (V, D), mesh)
    kept = PartitionSpec(*reversed(of_table)) if tied else kept_spec_of(("embed", "vocab"), (D, V), mesh)
    (vocab_axis,) = entry_axes(columns[1]) or (None,)
    between = spec_of((*stream_axes(x_BTD.shape[1]), None), x_BTD.shape, mesh)
    cut = next((at for at in (0, 1) if vocab_axis in entry_axes(between[at])), None)
    token_axes = entry_axes(tokens[0]) + entry_axes(tokens[1])
    specs = _specs(low, given, columns)

    def local(product: Any, targets_BT: Array, weights_BT: Array | None) -> tuple[Array, Gradients | None]:
        shape = product[0].shape
        flat = _flat(product)
        weights_X = None if weights_BT is None else weights_BT.reshape(-1)
        sums_4, found = op.cross_entropy_in_chunks(
            flat, targets_BT.reshape(-1), terms, wanted=wanted, weights_X=weights_X, vocab_axis=vocab_axis
        )
        sums_4 = jax.lax.psum(sums_4, token_axes)
        if found is None:
            return sums_4, None
        dx_BTD, dlow = found.x.reshape(shape), found.low
        if cut is not None:
            dx_BTD = jax.lax.psum_scatter(dx_BTD, vocab_axis, scatter_dimension=cut, tiled=True)
        elif vocab_axis is not None:
            dx_BTD = jax.lax.psum(dx_BTD, vocab_axis)
        if dlow is not None:
            dh_BTR = dlow[0].reshape(*shape[:2], -1)
            dh_BTR = dh_BTR if vocab_axis is None else jax.lax.psum(dh_BTR, vocab_axis)
            dlow = (dh_BTR, jax.lax.psum(dlow[1], token_axes))
        dkernel_DV = None if found.kernel is None else _summed(found.kernel, token_axes, kept)
        return sums_4, op.in_dtypes_of(product, Gradients(dx_BTD, dkernel_DV, dlow))

    made = None
    if wanted is not None:
        made = Gradients(given if cut is None else between, kept if wanted.kernel else None, specs[2])
    # Nothing is differentiated through it, so nothing has to be known of which results are equal on which devices.
    return jax.shard_map(
        local, mesh=mesh, in_specs=(specs, tokens, tokens), out_specs=(PartitionSpec(), made), check_vma=False
    )(product, targets_BT, weights_BT)


def _summed(dkernel_DV: Array, over: tuple[str, ...], kept: PartitionSpec) -> Array:
    """The sum over devices, of which each keeps the part that it keeps of the kernel."""
    for at, entry in enumerate(kept):
        if cut := tuple(axis for axis in entry_axes(entry) if axis in over):
            dkernel_DV = jax.lax.psum_scatter(dkernel_DV, cut, scatter_dimension=at, tiled=True)
            over = tuple(axis for axis in over if axis not in cut)
    return jax.lax.psum(dkernel_DV, over)
