"""Metrics of a step, from the terms that an objective returns beside the loss."""

import jax
import jax.numpy as jnp

from gpo_jax._numerics import MAX_LOG_RATIO, bound, exp_excess
from gpo_jax._padding import clean, validate
from gpo_jax.types import Rollout, Terms


def summarize(terms: Terms, rollout: Rollout) -> dict[str, jax.Array]:
  """Reduces the terms of a step to scalars.

  Call it once on the data of one optimizer step: the terms of microbatches concatenate, in the
  order of the rollout's rows. Compiled code drops terms that nobody reads.

  Args:
    terms: from the objective, `[..., G, T]` each.
    rollout: the rollout it was called with.

  Returns:
    Scalars by name, 0 for a batch without a token. ρ is at the objective's level.

    - `loss`, `surrogate`, `divergence`: weighted sums over tokens, like the loss.
    - `clip_fraction`: tokens whose surrogate has slope 0 although A ≠ 0: `clip_fraction_low` with
      ρ ≤ 1, `clip_fraction_high` with ρ > 1. What a level or a correction clips, and CISPO's
      weights, do not count.
    - `ratio_mean`, `ratio_max`, `ratio_min`: of ρ over tokens.
    - `effective_sample_size`: (Σρ)²/(NΣρ²), in (0, 1].
    - `old_kl`: an estimate of KL(π_old‖π), in nats per token.
    - `bounded_fraction`: tokens with log ρ at the bound of ±20.
    - `zero_advantage_fraction`: tokens with A = 0.
    - `factor_mean`, `dropped_fraction`: of the corrections' factor, and of factors that are 0.
    - `entropy`: in nats per token, if `terms.entropy` has it.
    - `sampler_kl`: an estimate of KL(μ‖π_old), in nats per token, if both are known.

  Raises:
    ValueError: if it is not given `Terms`, or the rollout does not fit them.

  Example:
    >>> import gpo_jax as gpo
    >>> objective = gpo.dapo()
    >>> rollout = objective.prepare([[1.0, 0.0]], jnp.ones((1, 2, 1)), jnp.zeros((1, 2, 1)))
    >>> _, terms = objective(jnp.array([[[0.5], [0.0]]]), rollout)
    >>> metrics = gpo.summarize(terms, rollout)
    >>> print(metrics["clip_fraction_high"], metrics["ratio_max"].round(2))
    0.5 1.65
  """
  if not isinstance(terms, Terms):
    raise ValueError(
      f"terms must be Terms; got {type(terms).__name__}: call loss, terms = objective(log_probs, "
      "rollout), then summarize(terms, rollout)"
    )
  shape, expected = jnp.shape(terms.loss), validate(rollout).mask.shape
  if shape != expected:
    raise ValueError(
      f"terms must have the shape of rollout.mask, {list(expected)}; got {list(shape)}: "
      "concatenate the terms of microbatches (AccumulationType.CONCAT in optax), do not sum them"
    )
  _, rollout = clean(terms.loss, rollout, name="terms")
  mask, weights, advantages = rollout.mask, rollout.weights, rollout.advantages
  # Each pass over the tokens costs as much as the loss itself, so passes are shared.
  tokens = mask.astype(weights.dtype)
  if advantages.shape != mask.shape:  # one advantage per row, for as many tokens as the row has
    tokens = jnp.sum(tokens, axis=-1, keepdims=True)
  count = jnp.maximum(jnp.sum(tokens), 1)

  def weighted(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, weights * x, 0))

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, x.astype(weights.dtype), 0)) / count

  clipped = (terms.gate == 0) & (advantages != 0)
  low, high = (mean(clipped & side) for side in (terms.log_ratio <= 0, terms.log_ratio > 0))
  metrics = {
    "loss": weighted(terms.loss),
    "surrogate": weighted(terms.surrogate),
    "clip_fraction": low + high,
    "clip_fraction_low": low,
    "clip_fraction_high": high,
    **_of_ratio(jnp.where(mask, jnp.exp(terms.log_ratio), 0), mask, count),
    "old_kl": mean(exp_excess(terms.token_log_ratio)),
    "bounded_fraction": mean(jnp.abs(terms.log_ratio) >= MAX_LOG_RATIO),
    "zero_advantage_fraction": jnp.sum(jnp.where(advantages == 0, tokens, 0)) / count,
  }
  if terms.divergence is not None:
    metrics["divergence"] = weighted(terms.divergence)
  if terms.factor is not None:
    metrics["factor_mean"] = mean(terms.factor)
    metrics["dropped_fraction"] = mean(terms.factor == 0)
  if terms.entropy is not None:
    metrics["entropy"] = mean(terms.entropy)
  if rollout.sampler_log_probs is not None and rollout.old_log_probs is not None:
    log_weight = bound(rollout.old_log_probs - rollout.sampler_log_probs)
    metrics["sampler_kl"] = mean(exp_excess(log_weight))
  return metrics


def _of_ratio(ratio: jax.Array, mask: jax.Array, count: jax.Array) -> dict[str, jax.Array]:
  mean, square = jnp.sum(ratio) / count, jnp.sum(ratio**2) / count
  some = jnp.any(mask)
  # XLA's maximum of many numbers on CPU may overlook a NaN; a sum does not.
  nan = mean - mean
  return {
    "ratio_mean": mean,
    "ratio_max": jnp.max(ratio) + nan,
    "ratio_min": jnp.where(some, jnp.min(jnp.where(mask, ratio, jnp.finfo(ratio.dtype).max)), 0)
    + nan,
    "effective_sample_size": mean**2 / jnp.where(some, square, 1),
  }
