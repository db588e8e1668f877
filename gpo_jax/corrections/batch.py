"""Masks of tokens by a statistic over the batch: compute them once, and keep them as data."""

import chex
import jax
import jax.numpy as jnp

from gpo_jax._mesh import whole
from gpo_jax._padding import clean
from gpo_jax.corrections.policies import keep_unless
from gpo_jax.traits import slot_function
from gpo_jax.types import Rollout


def _quantile(values: jax.Array, mask: jax.Array, quantile: chex.Numeric) -> jax.Array:
  """Interpolates linearly between the ordered active values."""
  ordered = jnp.sort(whole(jnp.where(mask, values, jnp.finfo(values.dtype).max)), axis=None)
  last = jnp.maximum(jnp.sum(mask.astype(values.dtype)) - 1, 0)
  position = quantile * last
  below = jnp.floor(position)
  lower = ordered[below.astype(jnp.int32)]
  upper = ordered[jnp.minimum(below + 1, last).astype(jnp.int32)]
  return lower + (position - below) * (upper - lower)


@slot_function()
def covariance_mask(
  log_probs: jax.Array, rollout: Rollout, *, fraction: chex.Numeric = 2e-4
) -> jax.Array:
  """Drops the tokens whose update costs the most entropy.

      cov_t = (log π_t − mean(log π)) (A_t − mean(A));   0 for the top `fraction` of tokens, else 1

  The statistics are over the tokens of one call: before slicing a batch compute it once, as
  `rollout.factor`. (The paper drops that many at random among tokens above a bound; this drops the
  top ones.) To penalise them instead (kl-cov), keep `chosen = 1 - covariance_mask(…)` as data and
  add `jnp.sum(rollout.weights * chosen * jnp.abs(log_probs - old_log_probs), where=rollout.mask)`.

  Args:
    fraction: the share of active tokens to drop, in [0, 1).

  Example:
    >>> ones, advantages = jnp.ones((2, 2)), jnp.array([2.0, -2.0])
    >>> rollout = Rollout(advantages=advantages, mask=ones, weights=ones)
    >>> print(covariance_mask(jnp.array([[-0.1, -3.0], [-1.0, -1.1]]), rollout, fraction=0.25))
    [[0. 1.]
     [1. 1.]]

  Reference: Cui et al. (2025, clip-cov), arXiv:2505.22617.
  """
  log_probs, rollout = clean(log_probs, rollout)
  mask = rollout.mask

  def deviation(x: jax.Array) -> jax.Array:
    return x - jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(jnp.sum(mask.astype(x.dtype)), 1)

  covariance = deviation(jax.lax.stop_gradient(log_probs)) * deviation(rollout.advantages)
  limit = _quantile(covariance, mask, 1 - fraction)
  return keep_unless(mask & (covariance > limit), covariance, limit)


@slot_function(how="pass rollout.replace(factor=entropy_mask(entropy, rollout))")
def entropy_mask(
  entropy: jax.Array, rollout: Rollout, *, quantile: chex.Numeric = 0.8
) -> jax.Array:
  """Keeps the tokens of highest entropy.

      1 if the entropy is at or above its quantile over the batch, else 0

  Its argument is entropies, not log-probabilities, so compute it once and keep it as data:
  `rollout.replace(factor=entropy_mask(entropy, rollout))`.

  Args:
    entropy: of the policy at each token, `[..., T]`, in nats.
    quantile: the share of active tokens to drop, in [0, 1).

  Example:
    >>> rollout = Rollout(advantages=1.0, mask=jnp.ones(4), weights=jnp.ones(4))
    >>> print(entropy_mask(jnp.array([0.1, 0.2, 0.3, 2.0]), rollout, quantile=0.7))
    [0. 0. 0. 1.]

  Reference: Wang et al. (2025), "Beyond the 80/20 rule", arXiv:2506.01939.
  """
  entropy, rollout = clean(entropy, rollout, name="entropy")
  entropy = jax.lax.stop_gradient(entropy)
  limit = _quantile(entropy, rollout.mask, quantile)
  return keep_unless(rollout.mask & (entropy < limit), entropy, limit)
