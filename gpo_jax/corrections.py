"""Corrections: factors on the surrogate, without gradient, for stale or mismatched samples.

Each is `(log_probs, rollout, *, …) -> factor`, `[..., T]`. An objective multiplies the surrogate,
never the divergence, by all of its corrections. log π_old is the rollout's, or `log_probs` if it
has none; μ is the sampler, `rollout.sampler_log_probs`. Compute a statistic over the batch once,
over the data of one optimizer step, and keep it as data:
`rollout.replace(factor=covariance_mask(log_probs, rollout))`.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from gpo_jax import levels
from gpo_jax._mesh import whole
from gpo_jax._numerics import bound
from gpo_jax._padding import clean
from gpo_jax.traits import slot_function
from gpo_jax.types import Level, Rollout


def _old(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  return log_probs if rollout.old_log_probs is None else rollout.old_log_probs


def _sampler(rollout: Rollout, name: str) -> jax.Array:
  if rollout.sampler_log_probs is None:
    raise ValueError(
      f"{name} needs rollout.sampler_log_probs: pass sampler_log_probs=, the log-probabilities "
      "that the sampler reported, to prepare"
    )
  return rollout.sampler_log_probs


def _behaviour(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  """The policy the samples came from, as closely as it is known."""
  if rollout.sampler_log_probs is not None:
    return rollout.sampler_log_probs
  return _old(log_probs, rollout)


def _drop(dropped: jax.Array, statistic: jax.Array, *limits: chex.Numeric) -> jax.Array:
  # A comparison hides a NaN: x − x is 0, or NaN if the statistic is not finite. A limit that is
  # NaN, unlike an infinite one, is a mistake.
  bad = functools.reduce(jnp.logical_or, map(jnp.isnan, limits), jnp.zeros((), bool))
  return jnp.where(bad, jnp.nan, jnp.where(dropped, 0, 1) + (statistic - statistic))


def _importance(log_probs: jax.Array, rollout: Rollout, level: Level, name: str) -> jax.Array:
  log_weight = _old(log_probs, rollout) - _sampler(rollout, name)
  return jnp.exp(bound(level(jax.lax.stop_gradient(log_weight), rollout)))


@slot_function(tokenwise=True)
def truncate_importance(
  log_probs: jax.Array,
  rollout: Rollout,
  *,
  cap: chex.Numeric = 2.0,
  level: Level = levels.token,
) -> jax.Array:
  """Reweighs samples from the sampler to the trainer's old policy, with a cap.

      min(w, cap),   w = π_old/μ at the level

  Args:
    rollout: needs `sampler_log_probs`.
    cap: the largest weight, > 0.
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
  return jnp.minimum(_importance(log_probs, rollout, level, "truncate_importance"), cap)


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
  return weight * _drop((weight < low) | (weight > high), weight, low, high)


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
  drift = levels.sequence(_behaviour(log_probs, rollout) - log_probs, rollout)
  dropped = (rollout.advantages < 0) & (drift > threshold)
  return _drop(dropped, drift, threshold)


def _away(drift: jax.Array, rollout: Rollout) -> jax.Array:
  """Marks tokens at which the surrogate's gradient moves π away from μ; drift is log π/μ."""
  advantages = rollout.advantages
  return ((advantages > 0) & (drift > 0)) | ((advantages < 0) & (drift < 0))


@slot_function(tokenwise=True)
def total_variation_mask(
  log_probs: jax.Array, rollout: Rollout, *, threshold: chex.Numeric = 0.2
) -> jax.Array:
  """Drops tokens whose probability has already moved too far in the advantage's direction.

      0 if (A > 0 and π − μ > threshold) or (A < 0 and μ − π > threshold) else 1

  Args:
    rollout: μ is its sampler_log_probs, or its old_log_probs if it has none.
    threshold: δ in (0, 1), in probability.

  Example:
    >>> old = jnp.log(jnp.array([0.5, 0.01]))
    >>> one = jnp.ones(2)
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, old_log_probs=old)
    >>> print(total_variation_mask(jnp.log(jnp.array([0.8, 0.1])), rollout))
    [0. 1.]

  Reference: DPPO (2026), arXiv:2602.04879, the binary total variation form.
  """
  old = _behaviour(log_probs, rollout)
  moved, drift = jnp.abs(jnp.exp(log_probs) - jnp.exp(old)), log_probs - old
  return _drop(_away(drift, rollout) & (moved > threshold), drift, threshold)


@slot_function(tokenwise=True)
def binary_kl_mask(log_probs: jax.Array, rollout: Rollout, *, threshold: chex.Numeric) -> jax.Array:
  """Drops tokens as `total_variation_mask` does, by the KL divergence of "this token or not".

      KL = μ log(μ/π) + (1−μ) log((1−μ)/(1−π));   0 if KL > threshold and π moves away from μ else 1

  Args:
    rollout: μ is its sampler_log_probs, or its old_log_probs if it has none.
    threshold: δ > 0, in nats.

  Example:
    >>> old = jnp.log(jnp.array([0.5, 0.01]))
    >>> one = jnp.ones(2)
    >>> rollout = Rollout(advantages=one, mask=one, weights=one, old_log_probs=old)
    >>> print(binary_kl_mask(jnp.log(jnp.array([0.8, 0.02])), rollout, threshold=0.1))
    [0. 1.]

  Reference: DPPO (2026), arXiv:2602.04879, the binary KL form.
  """
  old = _behaviour(log_probs, rollout)
  # log(1 − e^x): a token of probability 1 leaves nothing for the others, and 0·log 0 is 0.
  tiny = jnp.finfo(log_probs.dtype).tiny
  rest, old_rest = (jnp.maximum(-jnp.expm1(x), tiny) for x in (log_probs, old))
  drift = log_probs - old
  kl = old_rest * (jnp.log(old_rest) - jnp.log(rest)) - jnp.exp(old) * drift
  return _drop(_away(drift, rollout) & (kl > threshold), drift, threshold)


def _response_log_ratio(log_probs: jax.Array, rollout: Rollout) -> jax.Array:
  log_ratio = jax.lax.stop_gradient(log_probs - _old(log_probs, rollout))
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
    k_pos: k > 0 if A ≥ 0.
    lambda_pos: λ > 0 if A ≥ 0.
    k_neg: k > 0 if A < 0.
    lambda_neg: λ > 0 if A < 0.

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
  return _drop(mask & (covariance > limit), covariance, limit)


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
  return _drop(rollout.mask & (entropy < limit), entropy, limit)
