"""Levels: whether the surrogate sees each token's likelihood ratio or its response's (GSPO).

Each is `(log_ratio, rollout, *, …) -> log_ratio`, `[..., T]` to `[..., T]`: a level of responses
gives every token its response's value; weights that sum to one share per response count it once.
In a packed row each response has its own. One of your own is three lines with `rollout.total` and
`rollout.mean`.
"""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax._numerics import with_slope
from gpo_jax.traits import slot_function
from gpo_jax.types import Rollout


@slot_function(tokenwise=True)
def token(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Leaves each token its own ratio.

      log ρ_t

  Reference: Shao et al. (2024, GRPO), arXiv:2402.03300, Eq. 3.
  """
  del rollout
  return log_ratio


@slot_function(of_response=True)
def sequence(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes the geometric mean of a response's ratios: GSPO's ratio.

      log s = (1/L) Σ_t log ρ_t,   the gradient flowing to every token

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    log s at every token of the response, `[..., T]`.

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.array([1, 1, 0]), weights=jnp.ones(3))
    >>> print(sequence(jnp.array([0.0, 1.0, 9.0]), rollout))
    [0.5 0.5 0.5]

  Reference: Zheng et al. (2025, GSPO), arXiv:2507.18071, Eq. 7.
  """
  return rollout.mean(log_ratio)


@slot_function()
def sequence_token(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Combines the value of `sequence` with the gradient of `token`.

      log s_t = sg(log s) + log ρ_t − sg(log ρ_t)

  The gradient equals that of `sequence` if all tokens of a response have one advantage and one
  correction factor; use it if advantages differ from token to token.

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    log s_t, `[..., T]`.

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.ones(2), weights=jnp.ones(2))
    >>> print(jax.grad(lambda x: sequence_token(x, rollout)[0])(jnp.array([0.0, 1.0])))
    [1. 0.]

  Reference: Zheng et al. (2025, GSPO), arXiv:2507.18071, Eq. 14.
  """
  return with_slope(sequence(log_ratio, rollout), jnp.ones_like(log_ratio), log_ratio)


@slot_function(of_response=True)
def sequence_product(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Computes the likelihood ratio of the whole response.

      log ρ = Σ_t log ρ_t,   not divided by the length

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    log ρ at every token of the response, `[..., T]`.

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.array([1, 1, 0]), weights=jnp.ones(3))
    >>> print(sequence_product(jnp.array([0.5, 1.0, 9.0]), rollout))
    [1.5 1.5 1.5]

  Reference: DeepSeek-AI (2025, DeepSeek-R1), arXiv:2501.12948, the ratio of whole outputs.
  """
  return rollout.total(log_ratio)


@slot_function(of_response=True)
def sequence_max(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Finds the largest log-ratio of the response: its worst token, for `corrections.reject`.

      log ρ = max_t log ρ_t,   the gradient flowing to the token that has it, shared by ties

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    The maximum at every token of the response, `[..., T]`; 0 if it has no token.

  Example:
    >>> rollout = Rollout(advantages=0, mask=jnp.array([1, 1, 0]), weights=jnp.ones(3))
    >>> print(sequence_max(jnp.array([0.5, 1.0, 9.0]), rollout))
    [1. 1. 1.]

  Reference: the `seq_max` options of verl's `rollout_rs`.
  """
  mask, value = rollout.mask.astype(bool), jax.lax.stop_gradient(log_ratio)
  top = _segments.largest(jnp.where(mask, value, -jnp.inf), rollout.segment_ids)
  share = (mask & (value == top)).astype(value.dtype)
  share = share / jnp.maximum(rollout.total(share), 1)
  # The sum is 0 in value, or NaN if a log-ratio is not finite, which a maximum may overlook.
  return jnp.where(top == -jnp.inf, 0, top) + rollout.total(share * (log_ratio - value))


@slot_function(of_response=True)
def clipped_sequence(
  log_ratio: jax.Array,
  rollout: Rollout,
  *,
  low: chex.Numeric = 0.4,
  high: chex.Numeric | None = None,
) -> jax.Array:
  """Clips each token's log-ratio, above if A > 0, else below, then averages as `sequence`.

      log s = (1/L) Σ_t (min(log ρ_t, high) if A > 0 else max(log ρ_t, −low))

  With the surrogate `importance_weighted` this is GMPO. At a limit the gradient is the unclipped
  one. A = 0 is clipped like A < 0, which shows only if advantages differ within a response.

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its advantages, mask and segment_ids are used.
    low: ≥ 0, in log space.
    high: ≥ 0, in log space; `low` if None.

  Returns:
    log s at every token of the response, `[..., T]`.

  Example:
    >>> rollout = Rollout(advantages=jnp.ones(1), mask=jnp.ones(2), weights=jnp.ones(2))
    >>> print(clipped_sequence(jnp.array([1.0, -1.0]), rollout))
    [-0.3 -0.3]

  Reference: Zhao et al. (2025, GMPO), arXiv:2507.20673.
  """
  positive = rollout.advantages > 0
  limit = jnp.where(positive, low if high is None else high, -jnp.asarray(low))
  beyond = jnp.where(positive, log_ratio > limit, log_ratio < limit)
  # 0, in value and slope, if x is finite: an infinite log-ratio must not end as a limit.
  zero = log_ratio - log_ratio
  limited = limit + with_slope(zero, zero, log_ratio)
  return sequence(jnp.where(beyond | jnp.isnan(limit), limited, log_ratio), rollout)
