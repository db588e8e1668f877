"""Sums along the token axis: over rows that hold one response, or several packed side by side."""

import jax
import jax.numpy as jnp


def cumsum(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Sums along the last axis, up to and including each token, anew in each segment."""
  if segment_ids is None:
    return jnp.cumsum(x, axis=-1)
  starts = jnp.ones_like(segment_ids, bool)
  starts = starts.at[..., 1:].set(segment_ids[..., 1:] != segment_ids[..., :-1])

  def combine(left, right):
    left_start, left_sum = left
    right_start, right_sum = right
    return left_start | right_start, jnp.where(right_start, right_sum, left_sum + right_sum)

  return jax.lax.associative_scan(combine, (starts, x), axis=-1)[1]


def total(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Sums each segment (each row without `segment_ids`); every token gets its segment's sum."""
  if segment_ids is None:
    return jnp.broadcast_to(jnp.sum(x, axis=-1, keepdims=True), x.shape)
  backward = jnp.flip(cumsum(jnp.flip(x, -1), jnp.flip(segment_ids, -1)), -1)
  return cumsum(x, segment_ids) + backward - x


def mean(x: jax.Array, mask: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Averages each segment's active tokens; 0 where a segment has none."""
  active = mask.astype(x.dtype)
  count = jnp.maximum(total(active, segment_ids), 1)
  return total(jnp.where(mask.astype(bool), x, 0), segment_ids) / count
