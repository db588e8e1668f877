"""Corrections: factors on the surrogate, without gradient, for stale or mismatched samples.

Each is `(log_probs, rollout, *, …) -> factor`, `[..., T]`. An objective multiplies the surrogate,
never the divergence, by all of its corrections: what one of them drops is dropped. log π_old is the
rollout's, or `log_probs` if it has none; μ is the sampler, `rollout.sampler_log_probs`.

A dropped token keeps its share of the denominators: weights stay what `prepare` made of the mask,
and the loss is as if its surrogate were 0. To divide by what is left instead, compute the factor
first: `rollout.replace(factor=keep, weights=objective.weighting(rollout.mask & (keep != 0),
rollout.segment_ids))`. Compute a statistic over the batch once, too, over the data of one optimizer
step, and keep it as data: `rollout.replace(factor=covariance_mask(log_probs, rollout))`; or weights
normalised to a mean of 1: `rollout.replace(factor=w / jnp.mean(w, where=rollout.mask))`.
"""

from gpo_jax.corrections.batch import covariance_mask, entropy_mask
from gpo_jax.corrections.drift import binary_kl_mask, off_policy_sequence_mask, total_variation_mask
from gpo_jax.corrections.importance import mask_importance, reject, truncate_importance
from gpo_jax.corrections.responses import topr, vespo

__all__ = [
  "binary_kl_mask",
  "covariance_mask",
  "entropy_mask",
  "mask_importance",
  "off_policy_sequence_mask",
  "reject",
  "topr",
  "total_variation_mask",
  "truncate_importance",
  "vespo",
]
