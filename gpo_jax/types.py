"""What passes between the slots of an objective, and what each slot is, in words.

Axes: `[..., G, T]`, T tokens last, G samples of one prompt before it, leading axes free.

    surrogate(log_ratio, advantages)                   -> objective, maximised
    level(log_ratio, rollout)                          -> log_ratio, of tokens or of responses
    divergence(ref_log_ratio, log_ratio, rollout)      -> penalty, minimised
    correction(log_probs, rollout)                     -> factor on the surrogate, no gradient
    weighting(mask, segment_ids)                       -> weights
    advantage(rewards, where)                          -> advantages, group = last axis

All but the last return arrays `[..., G, T]` and take them, except that advantages are `[..., G, 1]`
where a response has one. Within an objective masks are bools and masked positions hold 0.
`log_ratio` is log π − log π_old, `ref_log_ratio` is log π − log π_ref.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Surrogate = Callable[[jax.Array, jax.Array], jax.Array]
Level = Callable[[jax.Array, "Rollout"], jax.Array]
Divergence = Callable[[jax.Array, jax.Array, "Rollout"], jax.Array]
Correction = Callable[[jax.Array, "Rollout"], jax.Array]
Weighting = Callable[[jax.Array, jax.Array | None], jax.Array]
Advantage = Callable[[jax.Array, jax.Array | None], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """What one optimizer step sees of the samples: a pytree that can be cut along any row axis.

  `weights` and `advantages` are computed once, over everything that one optimizer step sees
  (`Objective.prepare`). From then on the loss is a plain sum over tokens, so microbatches, devices
  and packed rows add up to the same loss and gradient. A masked position may hold anything.

  Attributes:
    advantages: A, `[..., G]`, `[..., G, 1]` or `[..., G, T]`.
    mask: the tokens that count, `[..., G, T]`, bool or 0/1.
    weights: each token's share of the loss, `[..., G, T]`.
    old_log_probs: log π_old of the policy that the ratio is taken to, `[..., G, T]`; None if that
      is the current policy (one update per batch).
    ref_log_probs: log π_ref of the reference policy, `[..., G, T]`, for a divergence.
    sampler_log_probs: log-probabilities as the sampler reported them, `[..., G, T]`, for
      corrections.
    segment_ids: which response each token of a packed row belongs to, `[..., G, T]` integers: 1, 2,
      … in order. A masked token inside a response carries its id too, as `prepare` sees to. None if
      a row holds one response.
    factor: a correction computed beforehand over the whole batch, `[..., G, T]`.
  """

  advantages: jax.Array
  mask: jax.Array
  weights: jax.Array
  old_log_probs: jax.Array | None = None
  ref_log_probs: jax.Array | None = None
  sampler_log_probs: jax.Array | None = None
  segment_ids: jax.Array | None = None
  factor: jax.Array | None = None

  def replace(self, **fields: Any) -> "Rollout":
    """Returns a copy with these fields replaced."""
    return dataclasses.replace(self, **fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
  """What the loss is made of, token by token, `[..., G, T]`, without gradient.

  Attributes:
    loss: β·divergence − factor·surrogate, before weighting.
    surrogate: the surrogate, to be maximised.
    gate: ∂surrogate/∂log_ratio: 0 where a token is clipped.
    log_ratio: log(π/π_old) as the surrogate saw it: at the objective's level, bounded to ±20.
    token_log_ratio: log(π/π_old) of each token, bounded to ±20.
    divergence: the divergence, or None.
    factor: the product of the corrections, or None.
    entropy: of the policy, in nats, where it came with the log-probabilities (`linear_loss`), or
      None.
  """

  loss: jax.Array
  surrogate: jax.Array
  gate: jax.Array
  log_ratio: jax.Array
  token_log_ratio: jax.Array
  divergence: jax.Array | None
  factor: jax.Array | None
  entropy: jax.Array | None = None
