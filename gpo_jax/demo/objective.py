"""The objective of the demo: from a batch's log-probabilities and rewards to a loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpo_jax import gpo_loss

Metrics = dict[str, jax.Array]
Objective = Callable[..., tuple[jax.Array, Metrics]]


def standardise(rewards: jax.Array) -> jax.Array:
  """Computes advantages [P, G]: rewards [P, G] centred and scaled within each prompt's group.

  A group of equal rewards has advantage exactly 0, which a small constant in the divisor would not
  guarantee: the computed mean of equal numbers may differ from them in the last digit.
  """
  centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
  deviation = jnp.std(rewards, axis=1, keepdims=True)
  equal = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
  return jnp.where(equal, 0, centred / jnp.where(equal, 1, deviation))


def group_policy_loss(
  log_probs: jax.Array,
  rewards: jax.Array,
  mask: jax.Array,
  old_log_probs: jax.Array,
  ref_log_probs: jax.Array,
  *,
  epsilon: float = 0.2,
  beta: float = 0.01,
) -> tuple[jax.Array, Metrics]:
  """Computes the specification's loss on token likelihoods, averaged over the batch's tokens.

  Args:
    log_probs: of the answers' tokens under the policy, shape [P, G, T].
    rewards: of the answers, shape [P, G].
    mask: which tokens belong to an answer, bool, shape [P, G, T].
    old_log_probs: under the policy that sampled them, shape [P, G, T].
    ref_log_probs: under the reference, shape [P, G, T].
    epsilon: half-width of the clip range.
    beta: weight of the penalty.

  Returns:
    The loss, and what to show of the batch: the reward, and the fraction of tokens whose ratio is
    clipped, so that the surrogate gives them no gradient.
  """
  advantages = jnp.broadcast_to(standardise(rewards)[..., None], mask.shape)
  ratios = jnp.exp(log_probs - old_log_probs)
  losses = gpo_loss(
    ratios.ravel(),
    advantages.ravel(),
    jnp.exp(log_probs).ravel(),
    jnp.exp(ref_log_probs).ravel(),
    epsilon,
    beta,
    where=mask.ravel(),
  )
  above, below = ratios > 1 + epsilon, ratios < 1 - epsilon
  clipped = (above & (advantages > 0)) | (below & (advantages < 0))
  metrics = {"reward": jnp.mean(rewards), "clipped": jnp.mean(clipped, where=mask)}
  return jnp.sum(losses) / jnp.sum(mask, dtype=losses.dtype), metrics
