"""Divergences of whole distributions, from two policies' hidden states, a chunk at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpo_jax._mesh import vary
from gpo_jax.linear.head import Head, dot, scale_logits
from gpo_jax.linear.mesh import Sharding, layout_of


def divergence(
  function: Callable[[jax.Array, jax.Array], jax.Array],
  chunk_size: int,
  sharding: Sharding | None,
  hidden: jax.Array,
  head: Head,
  ref_hidden: jax.Array,
  ref_head: Head,
  mask: jax.Array,
) -> jax.Array:
  """Computes a divergence of each token, 0 where masked; JAX differentiates it."""
  layout, hidden, head = layout_of(sharding, hidden, head)
  ref_layout, ref_hidden, ref_head = layout_of(sharding, ref_hidden, ref_head)
  if layout.inside or ref_layout.inside:
    raise ValueError(
      "linear_divergence cannot be inside of a jax.shard_map over some axes of a mesh and sharded "
      "over others, JAX does not differentiate that: map over all axes, or call it outside"
    )
  narrow = head.unembedding.dtype

  def own(hidden, head, ref_hidden, ref_head, mask):
    heads = layout.whole.gather(head), ref_layout.whole.gather(ref_head)
    # Devices that hold parts of the vocabulary hold the same tokens: each takes a share of them.
    part, parts = layout.part
    size = -(-mask.size // parts)
    share = part * size + jnp.arange(size)

    def rows_of(hidden: jax.Array) -> jax.Array:
      rows = jnp.where(mask[..., None], hidden, 0).reshape(mask.size, -1)
      return rows.at[share].get(mode="fill", fill_value=0)

    def of_token(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
      head = heads[0]._replace(unembedding=heads[0].unembedding.astype(narrow))
      return function(_log_softmax(rows[0], head), _log_softmax(rows[1], heads[1]))

    rows = rows_of(hidden), rows_of(ref_hidden)
    found = jax.lax.map(jax.checkpoint(of_token), rows, batch_size=min(chunk_size, size))
    whole = jnp.zeros(mask.size, found.dtype).at[share].set(found, mode="drop")
    return jnp.where(mask, layout.over_vocabulary(whole).reshape(mask.shape), 0)

  # The head's gradient is added up, over chunks and devices, in its accumulator's dtype.
  wide = head._replace(unembedding=head.unembedding.astype(head.dtype))
  specs = (*layout.specs(head), *ref_layout.specs(ref_head), layout.tokens)
  arguments = vary((hidden, wide, ref_hidden, ref_head, mask))
  return layout.on_devices(own, specs, layout.tokens)(*arguments)


def _log_softmax(hidden: jax.Array, head: Head) -> jax.Array:
  return jax.nn.log_softmax(scale_logits(dot("h,vh->v", hidden, head.unembedding), head.bias, head))
