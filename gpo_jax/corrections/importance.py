"""Weights and limits for the mismatch between the sampler and the trainer's old policy."""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import divergences, levels
from gpo_jax._numerics import bound
from gpo_jax.corrections.policies import keep_unless, old, sampler
from gpo_jax.traits import slot_function
from gpo_jax.types import Divergence, Level, Rollout


def _importance(log_probs: jax.Array, rollout: Rollout, level: Level, name: str) -> jax.Array:
  log_weight = old(log_probs, rollout) - sampler(rollout, name)
  return jnp.exp(bound(level(jax.lax.stop_gradient(log_weight), rollout)))


@slot_function(tokenwise=True)
def truncate_importance(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  cap: chex.Numeric = 2.0,
  floor: chex.Numeric | None = None,
  level: Level = levels.token,
) -> jax.Array:
  """Reweighs samples from the sampler to the trainer's old policy, with a cap.

      min(max(w, floor), cap),   w = π_old/μ at the level

  Args:
    rollout: needs `sampler_log_probs`.
    cap: the largest weight, > 0.
    floor: the smallest weight; None disables it.
    level: a function of `gpo_jax.levels`: `token`, `sequence` or `sequence_product`.

  Example:
    >>> old, sampler = jnp.log(jnp.array([0.6, 0.9])), jnp.log(jnp.array([0.5, 0.1]))
    >>> one, logs = jnp.ones(2), {"old_log_probs": old, "sampler_log_probs": sampler}
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, **logs)
    >>> print(truncate_importance(old, rollout))
    [1.2 2. ]

  Reference: Yao et al. (2025), "Your efficient RL framework secretly brings you off-policy
  training".
  """
  weight = _importance(log_probs, rollout, level, "truncate_importance")
  return jnp.minimum(weight if floor is None else jnp.maximum(weight, floor), cap)


@slot_function(tokenwise=True)
def mask_importance(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  low: chex.Numeric = 0.5,
  high: chex.Numeric = 5.0,
  level: Level = levels.token,
) -> jax.Array:
  """Reweighs samples from the sampler to the trainer's old policy, and drops those too far off.

      w if low ≤ w ≤ high else 0,   w = π_old/μ at the level

  Args:
    rollout: needs `sampler_log_probs`.
    low: the smallest weight kept, ≥ 0.
    high: the largest weight kept.
    level: a function of `gpo_jax.levels`: `token`, `sequence` or `sequence_product`.

  Example:
    >>> old, sampler = jnp.log(jnp.array([0.6, 0.9])), jnp.log(jnp.array([0.5, 0.1]))
    >>> one, logs = jnp.ones(2), {"old_log_probs": old, "sampler_log_probs": sampler}
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, **logs)
    >>> print(mask_importance(old, rollout))
    [1.2 0. ]

  Reference: Ring-1T (2025, IcePop), arXiv:2510.18855.
  """
  weight = _importance(log_probs, rollout, level, "mask_importance")
  return weight * keep_unless((weight < low) | (weight > high), weight, low, high)


@slot_function(tokenwise=True)
def reject(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  low: chex.Numeric | None = None,
  high: chex.Numeric,
  statistic: Divergence = divergences.k3,
  level: Level = levels.token,
) -> jax.Array:
  """Drops samples whose trainer and sampler disagree too much, and reweighs none.

      1 if low ≤ level(statistic(log μ − log π_old)) ≤ high else 0

  A statistic estimates KL(μ‖π_old), of samples of μ, as a divergence does: `k1` is log μ/π_old, so
  bounds a ≤ π_old/μ ≤ b are `low=-log(b)`, `high=-log(a)`. A veto by the worst token of a response,
  π_old/μ < a, is `high=-log(a)` of `k1` at the level `sequence_max`.

  Args:
    rollout: needs `sampler_log_probs`.
    low: the smallest statistic kept, in nats; None for no limit.
    high: the largest statistic kept, in nats; the limits themselves are kept.
    statistic: of each token: a divergence, `k1`, `k2`, `k3`, `absolute` or one of your own.
    level: what becomes of a response's: `token` leaves each its own, `sequence` is their mean,
      `sequence_product` their sum, `sequence_max` the largest.

  Example:
    >>> old, sampler = jnp.log(jnp.array([0.6, 0.9])), jnp.log(jnp.array([0.5, 0.1]))
    >>> one, logs = jnp.ones(2), {"old_log_probs": old, "sampler_log_probs": sampler}
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, **logs)
    >>> print(reject(old, rollout, high=0.1))
    [1. 0.]
    >>> print(reject(old, rollout, high=0.1, level=levels.sequence))
    [0. 0.]

  Reference: verl's `rollout_rs`, from Liu et al. (2025), "When speed kills stability".
  """
  log_ratio = bound(sampler(rollout, "reject") - old(log_probs, rollout))
  log_ratio = jax.lax.stop_gradient(log_ratio)
  value = level(statistic(log_ratio, jnp.zeros_like(log_ratio), rollout), rollout)
  low = -jnp.inf if low is None else low
  return keep_unless((value < low) | (value > high), value, low, high)
