"""The policies that corrections compare, and how they drop a sample."""

import functools

import chex
import jax
import jax.numpy as jnp

from gpo_jax.types import Rollout


def old(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  """Finds log π_old: the current policy's, if the rollout has none."""
  return log_probs if rollout.old_log_probs is None else rollout.old_log_probs


def sampler(rollout: Rollout, name: str) -> jax.Array:
  """Finds log μ, which a correction of this name needs."""
  if rollout.sampler_log_probs is None:
    raise ValueError(
      f"{name} needs rollout.sampler_log_probs: pass sampler_log_probs=, the log-probabilities "
      "that the sampler reported, to prepare"
    )
  return rollout.sampler_log_probs


def behaviour(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  """Finds the policy that the samples came from, as closely as it is known."""
  if rollout.sampler_log_probs is not None:
    return rollout.sampler_log_probs
  return old(log_probs, rollout)


def keep_unless(dropped: jax.Array, statistic: jax.Array, *limits: chex.Numeric) -> jax.Array:
  """Makes the factor: 0 where dropped, else 1, and NaN for what no comparison is true of."""
  # A comparison hides a NaN: x − x is 0, or NaN if the statistic is not finite. A limit that is
  # NaN, unlike an infinite one, is a mistake.
  bad = functools.reduce(jnp.logical_or, map(jnp.isnan, limits), jnp.zeros((), bool))
  return jnp.where(bad, jnp.nan, jnp.where(dropped, 0, 1) + (statistic - statistic))
