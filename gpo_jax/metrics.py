"""Metrics of a step, from the terms that an objective returns beside the loss."""

import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax._inputs import as_array, check_same_shape, promote
from gpo_jax._numerics import MAX_LOG_RATIO, bound, exp_excess
from gpo_jax._padding import clean, validate
from gpo_jax.types import Rollout, Terms


def summarize(
  terms: Terms, rollout: Rollout, rewards: jax.Array | None = None
) -> dict[str, jax.Array]:
  """Reduces the terms of a step to scalars.

  Call it once on the data of one optimizer step: the terms of microbatches concatenate, in the
  order of the rollout's rows. Or call it on each microbatch and pass the results to
  `merge_metrics`. Compiled code drops terms that nobody reads.

  Args:
    terms: from the objective, `[..., G, T]` each.
    rollout: the rollout it was called with.
    rewards: as passed to `prepare`, `[..., G]`, or `[..., S]` for packed rows; several kinds of
      reward summed.

  Returns:
    Scalars by name, 0 for a batch without a token. ρ is at the objective's level. With
    w = π_old/μ, if the old and the sampler's log-probabilities are both known.

    - `loss`, `surrogate`, `divergence`: weighted sums over tokens, like the loss.
    - `divergence_mean`: per token, not weighted.
    - `clip_fraction`: tokens whose surrogate has slope 0 although A ≠ 0: `clip_fraction_low` with
      ρ ≤ 1, `clip_fraction_high` with ρ > 1. What a level or a correction clips, and CISPO's
      weights, do not count.
    - `ratio_mean`, `ratio_max`, `ratio_min`: of ρ over tokens.
    - `effective_sample_size`: (Σρ)²/(NΣρ²), in (0, 1].
    - `old_kl`: an estimate of KL(π_old‖π), in nats per token.
    - `bounded_fraction`: tokens with log ρ at the bound of ±20.
    - `zero_advantage_fraction`: tokens with A = 0.
    - `dead_groups`: groups whose advantages are all 0. A group is the axis before the tokens, or a
      packed row: after `prepare(group_ids=…)` use `diagnose`, which takes them.
    - `tokens`, `responses`, `groups`: how many there are; `response_length`: tokens per response.
    - `reward_mean`, `reward_std`: over responses, if `rewards` are given.
    - `factor_mean`, `factor_std`, `factor_max`, `factor_effective_sample_size`: of the corrections'
      factor over tokens; `dropped_fraction`: tokens with factor 0; `truncated_fraction`: tokens
      whose factor is the largest and above 1, as a cap leaves them.
    - `response_factor_…`: the same four of each response's mean factor;
      `response_truncated_fraction`: responses with a truncated token.
    - `entropy`: in nats per token, if `terms.entropy` has it.
    - `sampler_kl`: an estimate of KL(μ‖π_old), in nats per token.
    - `sampler_weight_mean`, `sampler_effective_sample_size`, `sampler_chi2`: of w over tokens; χ²
      is mean(w²) − 1. `response_sampler_…`: of the product of w over each response.
    - `sampler_difference_max`: the largest distance of log w from 0.
    - `old_log_prob_mean`, `old_log_prob_std`, `sampler_log_prob_mean`, `sampler_log_prob_std`,
      `sampler_correlation`: of log π_old and log μ over tokens.

  Raises:
    ValueError: if it is not given `Terms`, or the rollout or the rewards do not fit them.

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
  if rewards is not None:
    (rewards,) = promote(as_array("rewards", rewards))
  return _summarize(terms, rollout, rewards)


@jax.jit
def _summarize(terms: Terms, rollout: Rollout, rewards: jax.Array | None) -> dict[str, jax.Array]:
  mask, weights, advantages = rollout.mask, rollout.weights, rollout.advantages
  # Each pass over the tokens costs as much as the loss itself, so passes are shared.
  tokens = mask.astype(weights.dtype)
  if advantages.shape != mask.shape:  # one advantage per row, for as many tokens as the row has
    tokens = jnp.sum(tokens, axis=-1, keepdims=True)
  number = jnp.sum(tokens)
  count = jnp.maximum(number, 1)

  def weighted(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, weights * x, 0))

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, x.astype(weights.dtype), 0)) / count

  clipped = (terms.gate == 0) & (advantages != 0)
  low, high = (mean(clipped & side) for side in (terms.log_ratio <= 0, terms.log_ratio > 0))
  responses = _Responses(rollout)
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
    **_of_groups(advantages, tokens, rollout.segment_ids),
    "tokens": number,
    "responses": responses.count,
    "response_length": number / jnp.maximum(responses.count, 1),
  }
  if rewards is not None:
    metrics |= _of_rewards(rewards, rollout)
  if terms.divergence is not None:
    metrics |= {"divergence": weighted(terms.divergence), "divergence_mean": mean(terms.divergence)}
  if terms.factor is not None:
    metrics |= _of_factor(terms.factor, mask, mean, responses)
  if terms.entropy is not None:
    metrics["entropy"] = mean(terms.entropy)
  if rollout.sampler_log_probs is not None and rollout.old_log_probs is not None:
    old, sampler = rollout.old_log_probs, rollout.sampler_log_probs
    metrics |= _of_sampler(old, sampler, mean, responses)
  return metrics


class _Responses:
  """Sums and means per response.

  A response is a row. In packed rows every token has its response's value, and counts for 1/L.
  """

  def __init__(self, rollout: Rollout):
    active = rollout.mask.astype(rollout.weights.dtype)
    self.packed, self.rollout = rollout.segment_ids is not None, rollout
    self.length = self.total(active)
    self.share = (active if self.packed else self.length) / jnp.maximum(self.length, 1)
    self.count = _segments.count(active, rollout.segment_ids)

  def total(self, x: jax.Array) -> jax.Array:
    """Sums tokens, `[..., T]` to `[..., 1]`, or to `[..., T]` in packed rows."""
    if self.packed:
      return self.rollout.total(x)
    return jnp.sum(jnp.where(self.rollout.mask, x, 0), axis=-1, keepdims=True)

  def mean(self, x: jax.Array) -> jax.Array:
    """Averages what `total` returns over responses."""
    return jnp.sum(self.share * x) / jnp.maximum(self.count, 1)


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
    "effective_sample_size": _effective_sample_size(mean, square),
  }


def _effective_sample_size(mean: jax.Array, square: jax.Array) -> jax.Array:
  return mean**2 / jnp.where(square == 0, 1, square)


def _of_groups(advantages, tokens, segment_ids) -> dict[str, jax.Array]:
  axes = (-1,) if segment_ids is not None or tokens.ndim == 1 else (-2, -1)
  some = jnp.any(tokens > 0, axis=axes)
  dead = some & jnp.all(advantages == 0, axis=axes)
  groups = jnp.sum(some.astype(tokens.dtype))
  dead_groups = jnp.sum(dead.astype(tokens.dtype)) / jnp.maximum(groups, 1)
  return {"dead_groups": dead_groups, "groups": groups}


def _of_rewards(rewards: jax.Array, rollout: Rollout) -> dict[str, jax.Array]:
  present = _segments.present(rollout.mask, rollout.segment_ids, (1, *rewards.shape)[-1])
  remedy = ". Pass one reward per response, as to prepare; sum several kinds"
  check_same_shape(remedy, responses=present, rewards=rewards)
  count = jnp.maximum(jnp.sum(present.astype(rewards.dtype)), 1)
  mean = jnp.sum(jnp.where(present, rewards, 0)) / count
  std = jnp.sqrt(jnp.sum(jnp.where(present, rewards - mean, 0) ** 2) / count)
  return {"reward_mean": mean, "reward_std": std}


def _of_factor(factor, mask, mean, responses) -> dict[str, jax.Array]:
  factor = jnp.where(mask, factor, 0)
  largest = jnp.max(factor)
  truncated = mask & (factor == largest) & (largest > 1)
  some = jnp.minimum(responses.total(truncated.astype(factor.dtype)), 1)
  of_response = responses.total(factor) / jnp.maximum(responses.length, 1)
  return {
    "dropped_fraction": mean(factor == 0),
    "truncated_fraction": mean(truncated),
    **_of_weights("factor", factor, mean),
    "response_truncated_fraction": responses.mean(some),
    **_of_weights("response_factor", of_response, responses.mean),
  }


def _of_weights(name, weights, mean) -> dict[str, jax.Array]:
  center = mean(weights)
  return {
    f"{name}_mean": center,
    f"{name}_std": jnp.sqrt(mean((weights - center) ** 2)),
    f"{name}_max": jnp.max(weights) + (center - center),
    f"{name}_effective_sample_size": _effective_sample_size(center, mean(weights**2)),
  }


def _of_sampler(old, sampler, mean, responses) -> dict[str, jax.Array]:
  log_weight = old - sampler
  metrics = {"sampler_kl": mean(exp_excess(bound(log_weight)))}
  of_response = responses.total(log_weight)
  for name, logs, average in (
    ("sampler", log_weight, mean),
    ("response_sampler", of_response, responses.mean),
  ):
    weight = jnp.exp(bound(logs))
    center, square = average(weight), average(weight**2)
    metrics |= {
      f"{name}_weight_mean": center,
      f"{name}_effective_sample_size": _effective_sample_size(center, square),
      f"{name}_chi2": jnp.where(square == 0, 0, square - 1),
    }
  old_mean, sampler_mean = mean(old), mean(sampler)
  old_std, sampler_std = (
    jnp.sqrt(mean((x - center) ** 2)) for x, center in ((old, old_mean), (sampler, sampler_mean))
  )
  covariance, scale = mean((old - old_mean) * (sampler - sampler_mean)), old_std * sampler_std
  return metrics | {
    "sampler_difference_max": jnp.max(jnp.abs(log_weight)) + (old_mean - old_mean),
    "old_log_prob_mean": old_mean,
    "old_log_prob_std": old_std,
    "sampler_log_prob_mean": sampler_mean,
    "sampler_log_prob_std": sampler_std,
    "sampler_correlation": covariance / jnp.where(scale == 0, 1, scale),
  }
