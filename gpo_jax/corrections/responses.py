"""Weights of whole responses by their likelihood ratio."""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import levels
from gpo_jax._numerics import bound
from gpo_jax.corrections.policies import old
from gpo_jax.traits import slot_function
from gpo_jax.types import Rollout


def _response_log_ratio(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  if rollout.old_log_probs is None and rollout.sampler_log_probs is not None:
    raise ValueError(
      "vespo and topr compare with rollout.old_log_probs; got sampler_log_probs alone: pass the "
      "sampler's log-probabilities to prepare as old_log_probs"
    )
  log_ratio = jax.lax.stop_gradient(log_probs - old(log_probs, rollout))
  return bound(levels.sequence_product(log_ratio, rollout))


@slot_function()
def vespo(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  k_pos: chex.Numeric = 2.0,
  lambda_pos: chex.Numeric = 3.0,
  k_neg: chex.Numeric = 3.0,
  lambda_neg: chex.Numeric = 2.0,
) -> jax.Array:
  """Weighs responses by a smooth function of their ratio: rising to W = k/λ, fading beyond.

      φ(W) = W^k e^(λ(1−W)),   W = Π_t ρ_t;   (k, λ) by the sign of A

  1 on-policy. For the surrogate `reinforce`.

  Args:
    rollout: ρ is relative to its old_log_probs: the policy that sampled.
    k_pos: k > 0 if A ≥ 0.
    lambda_pos: λ > 0 if A ≥ 0.
    k_neg: k > 0 if A < 0.
    lambda_neg: λ > 0 if A < 0.

  Raises:
    ValueError: if the rollout has sampler_log_probs and no old_log_probs: W would be 1.

  Example:
    >>> old = jnp.log(jnp.array([0.5, 0.5]))
    >>> one = jnp.ones(2)
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, old_log_probs=old)
    >>> print(vespo(old, rollout))
    [1. 1.]

  Reference: Shen et al. (2026, VESPO), arXiv:2602.10693.
  """
  negative = rollout.advantages < 0
  k = jnp.where(negative, k_neg, k_pos)
  scale = jnp.where(negative, lambda_neg, lambda_pos)
  log_weight = _response_log_ratio(log_probs, rollout)
  return jnp.exp(k * log_weight - scale * jnp.expm1(log_weight))


@slot_function()
def topr(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  """Tapers bad responses by their likelihood ratio and leaves good ones as they are.

      1 if A ≥ 0 else clip(Π_t ρ_t, 0, 1)

  For the surrogate `reinforce`.

  Args:
    rollout: ρ is relative to its old_log_probs: the policy that sampled.

  Raises:
    ValueError: if the rollout has sampler_log_probs and no old_log_probs: ρ would be 1.

  Example:
    >>> old = jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]]))
    >>> ones, signs = jnp.ones((2, 2)), jnp.array([[-1.0], [1.0]])
    >>> rollout = Rollout(advantages=signs, mask=ones, weights=ones, old_log_probs=old)
    >>> print(topr(old + jnp.log(0.5), rollout))
    [[0.25 0.25]
     [1.   1.  ]]

  Reference: Le Roux et al. (2025, TOPR), arXiv:2503.14286.
  """
  negative = rollout.advantages < 0
  ratio = jnp.exp(jnp.minimum(_response_log_ratio(log_probs, rollout), 0))
  return jnp.where(negative, ratio, jnp.ones_like(ratio))
