"""Masks of samples that the policy has drifted away from, where the surrogate would move it on."""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import levels
from gpo_jax.corrections.policies import behaviour, keep_unless
from gpo_jax.traits import slot_function
from gpo_jax.types import Rollout


@slot_function()
def off_policy_sequence_mask(
  log_probs: jax.Array, rollout: Rollout, *, threshold: chex.Numeric
) -> jax.Array:
  """Drops bad responses that the policy has drifted away from.

      0 if A < 0 and mean_t log(μ_t/π_t) > threshold else 1

  Args:
    rollout: μ is its sampler_log_probs, or its old_log_probs if it has none.
    threshold: δ ≥ 0, in nats per token.

  Example:
    >>> old = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
    >>> ones, signs = jnp.ones((2, 2)), jnp.array([[-1.0], [1.0]])
    >>> rollout = Rollout(advantages=signs, mask=ones, weights=ones, old_log_probs=old)
    >>> print(off_policy_sequence_mask(old - 1.0, rollout, threshold=0.5))
    [[0. 0.]
     [1. 1.]]

  Reference: DeepSeek-AI (2025, DeepSeek-V3.2), arXiv:2512.02556, Eq. 8 and 9.
  """
  drift = levels.sequence(behaviour(log_probs, rollout) - log_probs, rollout)
  dropped = (rollout.advantages < 0) & (drift > threshold)
  return keep_unless(dropped, drift, threshold)


def _beyond(
  moved: jax.Array, drift: jax.Array, rollout: Rollout, low: chex.Numeric, high: chex.Numeric | None
) -> jax.Array:
  """Drops tokens that the surrogate would move further from μ, and that moved beyond a limit."""
  high = low if high is None else high
  rose = (rollout.advantages > 0) & (drift > 0) & (moved > high)
  fell = (rollout.advantages < 0) & (drift < 0) & (moved > low)
  return keep_unless(rose | fell, drift, low, high)


@slot_function(tokenwise=True)
def total_variation_mask(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  low: chex.Numeric = 0.2,
  high: chex.Numeric | None = None,
) -> jax.Array:
  """Drops tokens whose probability has already moved too far in the advantage's direction.

      0 if (A > 0 and π − μ > high) or (A < 0 and μ − π > low) else 1

  Args:
    rollout: μ is its sampler_log_probs, or its old_log_probs if it has none.
    low: how far a probability may fall, ≥ 0; from 1 on it never drops.
    high: how far it may rise; `low` if None.

  Example:
    >>> old = jnp.log(jnp.array([0.5, 0.01]))
    >>> one = jnp.ones(2)
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, old_log_probs=old)
    >>> print(total_variation_mask(jnp.log(jnp.array([0.8, 0.1])), rollout))
    [0. 1.]

  Reference: DPPO (2026), arXiv:2602.04879, the binary total variation form.
  """
  sampled = behaviour(log_probs, rollout)
  moved = jnp.abs(jnp.exp(log_probs) - jnp.exp(sampled))
  return _beyond(moved, log_probs - sampled, rollout, low, high)


@slot_function(tokenwise=True)
def binary_kl_mask(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  low: chex.Numeric,
  high: chex.Numeric | None = None,
) -> jax.Array:
  """Drops tokens as `total_variation_mask` does, by the KL divergence of "this token or not".

      KL = μ log(μ/π) + (1−μ) log((1−μ)/(1−π))
      0 if (A > 0 and π > μ and KL > high) or (A < 0 and π < μ and KL > low) else 1

  Args:
    rollout: μ is its sampler_log_probs, or its old_log_probs if it has none.
    low: the largest KL of a token that falls, in nats, ≥ 0.
    high: the largest of one that rises; `low` if None.

  Example:
    >>> old = jnp.log(jnp.array([0.5, 0.01]))
    >>> one = jnp.ones(2)
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, old_log_probs=old)
    >>> print(binary_kl_mask(jnp.log(jnp.array([0.8, 0.02])), rollout, low=0.1))
    [0. 1.]

  Reference: DPPO (2026), arXiv:2602.04879, the binary KL form.
  """
  sampled = behaviour(log_probs, rollout)
  # log(1 − e^x): a token of probability 1 leaves nothing for the others, and 0·log 0 is 0.
  tiny = jnp.finfo(log_probs.dtype).tiny
  rest, sampled_rest = (jnp.maximum(-jnp.expm1(x), tiny) for x in (log_probs, sampled))
  drift = log_probs - sampled
  kl = sampled_rest * (jnp.log(sampled_rest) - jnp.log(rest)) - jnp.exp(sampled) * drift
  return _beyond(kl, drift, rollout, low, high)
