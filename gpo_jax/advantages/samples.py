"""Rewards as samples that count or do not, in groups along the last axis."""

import jax
import jax.numpy as jnp

from gpo_jax._inputs import as_array, check_same_shape, promote


def samples(rewards: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """Cleans rewards, 0 where they do not count, and marks those that do."""
  (rewards,) = promote(as_array("rewards", rewards))
  if not rewards.ndim or not rewards.size:
    raise ValueError(f"rewards must be [..., G] and not empty; got shape {list(rewards.shape)}")
  counts = jnp.ones_like(rewards) if where is None else as_array("where", where)
  check_same_shape(rewards=rewards, where=counts)
  where = jnp.asarray(counts).astype(bool)
  return jnp.where(where, jax.lax.stop_gradient(rewards), 0), where


def groups(rewards: jax.Array, where: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cleans the rewards of groups; also marks and counts the samples that count, 1 at least."""
  return _of_groups(*samples(rewards, where))


@jax.jit
def _of_groups(rewards: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  # By every formula NaN and ±∞ make their whole group NaN. Set explicitly, because XLA's maximum
  # over 4096 numbers on CPU may overlook a NaN.
  bad = jnp.any(~jnp.isfinite(rewards), axis=-1, keepdims=True)
  rewards = jnp.where(bad & where, jnp.nan, rewards)
  count = jnp.sum(where.astype(rewards.dtype), axis=-1, keepdims=True)
  return rewards, where, jnp.maximum(count, 1)


def highest(rewards: jax.Array, where: jax.Array) -> jax.Array:
  """Finds the group's highest reward, `[..., 1]`; −∞ if no sample counts."""
  return jnp.max(rewards, axis=-1, keepdims=True, where=where, initial=-jnp.inf)


@jax.jit
def all_equal(rewards: jax.Array, where: jax.Array) -> jax.Array:
  """Tells groups of equal rewards, `[..., 1]`: also those with one sample or none; not NaN."""
  return jnp.all(~where | (rewards == highest(rewards, where)), axis=-1, keepdims=True)


@jax.jit
def deviations(
  rewards: jax.Array, where: jax.Array, count: jax.Array, more: jax.Array | float = 0.0
) -> jax.Array:
  """Computes (1 + more)(R − mean(R)): rounded once, at any offset; exactly 0 for equal rewards."""

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, x, 0), axis=-1, keepdims=True) / count

  # The mean of large rewards may be off by more than they differ: a second one corrects that.
  first = mean(rewards)
  deviation = rewards - first
  taken = rewards - deviation  # what was subtracted is not `first`, but for rounding
  rounded = (rewards - (deviation + taken)) - (first - taken)
  rest = rounded - mean(deviation)
  deviation = deviation + (rest + more * (deviation + rest))
  return jnp.where(where & ~all_equal(rewards, where), deviation, 0)
