"""The data that an objective works on, and what each of its slots is.

Axes: `[..., G, T]`, T tokens last, G samples of one prompt before it, leading axes free.
`log_ratio` is log π − log π_old, `ref_log_ratio` is log π − log π_ref. A slot's function is called
with clean arrays: float32 or wider, masks of bools, 0 at every masked position, advantages
`[..., G, 1]` (one per response) or `[..., G, T]`, no gradient but that of `log_probs`.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gpo_jax import _segments


class Surrogate(Protocol):
  """What a token contributes to the objective, maximised."""

  def __call__(self, log_ratio: jax.Array, advantages: jax.Array, /) -> jax.Array:
    """Returns the contributions, of log_ratio's shape."""
    ...


class Level(Protocol):
  """Whose likelihood ratio the surrogate sees: a token's or a response's."""

  def __call__(self, log_ratio: jax.Array, rollout: "Rollout", /) -> jax.Array:
    """Returns log-ratios at the level, of log_ratio's shape."""
    ...


class Divergence(Protocol):
  """The penalty for leaving the reference policy, minimised."""

  def __call__(self, ref_log_ratio: Any, log_ratio: jax.Array, rollout: "Rollout", /) -> jax.Array:
    """Returns the penalties, of log_ratio's shape; without a reference ref_log_ratio is None."""
    ...


class Correction(Protocol):
  """A factor on the surrogate, without gradient, for stale or mismatched samples."""

  def __call__(self, log_probs: jax.Array, rollout: "Rollout", /) -> jax.Array:
    """Returns the factors, of log_probs' shape."""
    ...


class Weighting(Protocol):
  """Each token's share of the loss, as data."""

  def __call__(self, mask: jax.Array, segment_ids: jax.Array | None, /) -> jax.Array:
    """Returns the weights, of mask's shape."""
    ...


class Advantage(Protocol):
  """A sample's reward relative to its group, which is the last axis."""

  def __call__(self, rewards: jax.Array, where: jax.Array | None, /) -> jax.Array:
    """Returns the advantages, of rewards' shape; `where` marks the samples that count."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
  """The data of one optimizer step: a pytree that can be sliced along any row axis.

  `weights` and `advantages` are computed once, over the data of one optimizer step
  (`Objective.prepare`). From then on the loss is a plain sum over tokens, so microbatches, devices
  and packed rows add up to the same loss and gradient. A masked position may hold anything.

  Attributes:
    advantages: A, `[..., G]`, `[..., G, 1]` or `[..., G, T]`.
    mask: the tokens that count, `[..., G, T]`, bool or 0/1.
    weights: each token's share of the loss, `[..., G, T]`.
    old_log_probs: log π_old, the denominator of the ratio, `[..., G, T]`; None if that is the
      current policy (one update per batch).
    ref_log_probs: log π_ref of the reference policy, `[..., G, T]`, for a divergence.
    sampler_log_probs: log-probabilities as the sampler reported them, `[..., G, T]`, for
      corrections.
    segment_ids: the response of each token in a packed row, `[..., G, T]` integers: 1, 2, … in
      order. A masked token inside a response carries its id too; `prepare` sees to that. None if a
      row holds one response.
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

  def total(self, x: jax.Array) -> jax.Array:
    """Sums x over each response's active tokens; every token gets its response's sum.

    Args:
      x: `[..., G, T]`; masked positions do not count.

    Returns:
      Sums, `[..., G, T]`; in a packed row each response has its own.

    Example:
      >>> import gpo_jax as gpo
      >>> ids = jnp.array([[1, 1, 2]])
      >>> mask = jnp.ones((1, 3), bool)
      >>> rollout = gpo.Rollout(advantages=0, mask=mask, weights=mask, segment_ids=ids)
      >>> print(rollout.total(jnp.array([[1.0, 2.0, 4.0]])))
      [[3. 3. 4.]]
    """
    return _segments.total(jnp.where(self.mask.astype(bool), x, 0), self.segment_ids)

  def mean(self, x: jax.Array) -> jax.Array:
    """Averages x over each response's active tokens; 0 if it has none.

    Args:
      x: `[..., G, T]`; masked positions do not count.

    Returns:
      Means, `[..., G, T]`; in a packed row each response has its own.
    """
    return self.total(x) / jnp.maximum(self.total(jnp.ones_like(x)), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
  """What the loss is made of, token by token, `[..., G, T]`, without gradient.

  Attributes:
    loss: β·divergence − factor·surrogate, before weighting.
    surrogate: the surrogate, maximised.
    gate: ∂surrogate/∂log_ratio: 0 where a token is clipped.
    log_ratio: log(π/π_old) as the surrogate saw it: at the objective's level, bounded to ±20.
    token_log_ratio: log(π/π_old) of each token, bounded to ±20.
    divergence: the divergence, or None.
    factor: the product of the corrections, or None.
    entropy: of the policy, in nats, if it came with the log-probabilities (`linear_loss`), or None.
  """

  loss: jax.Array
  surrogate: jax.Array
  gate: jax.Array
  log_ratio: jax.Array
  token_log_ratio: jax.Array
  divergence: jax.Array | None
  factor: jax.Array | None
  entropy: jax.Array | None = None
