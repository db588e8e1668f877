"""Levels: whose likelihood ratio the surrogate sees, a token's or a whole response's.

Each is `(log_ratio, rollout, *, …) -> log_ratio`, `[..., T]` to `[..., T]`: a level of responses
gives every token its response's value, so that weights summing to a response's share count it once.
Segment-aware: in a packed row each response has its own.
"""

import chex
import jax
import jax.numpy as jnp

from gpo_jax import _segments
from gpo_jax._checks import with_token_axis
from gpo_jax._numerics import with_slope
from gpo_jax.types import Rollout


def token(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Leaves each token its own ratio: log ρ_t.

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: not used.

  Returns:
    `log_ratio`.

  Example:
    >>> from gpo_jax import Rollout
    >>> print(token(jnp.array([0.1, 0.3]), Rollout(jnp.ones(()), jnp.ones(2), jnp.ones(2))))
    [0.1 0.3]

  Reference: Shao et al. (2024, GRPO), arXiv:2402.03300, Eq. 3.
  """
  del rollout
  return log_ratio


def sequence(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Takes the geometric mean of a response's ratios.

      log s = (1/L) Σ_t log ρ_t,   the gradient flowing to every token

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    log s at every token of the response, `[..., T]`.

  Example:
    >>> from gpo_jax import Rollout
    >>> rollout = Rollout(jnp.ones(()), jnp.array([1, 1, 0]), jnp.ones(3))
    >>> print(sequence(jnp.array([0.0, 1.0, 9.0]), rollout))
    [0.5 0.5 0.5]

  Reference: Zheng et al. (2025, GSPO), arXiv:2507.18071, Eq. 7.
  """
  return _segments.mean(log_ratio, rollout.mask, rollout.segment_ids)


def sequence_token(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Takes the value of `sequence` and the gradient of `token`.

      log s_t = sg(log s) + log ρ_t − sg(log ρ_t)

  The same gradient as `sequence` where all tokens of a response have one advantage; for advantages
  that differ from token to token.

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    log s_t, `[..., T]`.

  Example:
    >>> from gpo_jax import Rollout
    >>> rollout = Rollout(jnp.ones(()), jnp.array([1, 1]), jnp.ones(2))
    >>> print(jax.grad(lambda x: sequence_token(x, rollout)[0])(jnp.array([0.0, 1.0])))
    [1. 0.]

  Reference: Zheng et al. (2025, GSPO), arXiv:2507.18071, Eq. 14.
  """
  return with_slope(sequence(log_ratio, rollout), jnp.ones_like(log_ratio), log_ratio)


def sequence_sum(log_ratio: jax.Array, rollout: Rollout) -> jax.Array:
  """Takes the likelihood ratio of the whole response.

      log ρ = Σ_t log ρ_t,   not divided by the length

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its mask and segment_ids are used.

  Returns:
    log ρ at every token of the response, `[..., T]`.

  Example:
    >>> from gpo_jax import Rollout
    >>> rollout = Rollout(jnp.ones(()), jnp.array([1, 1, 0]), jnp.ones(3))
    >>> print(sequence_sum(jnp.array([0.5, 1.0, 9.0]), rollout))
    [1.5 1.5 1.5]

  Reference: DeepSeek-AI (2025, DeepSeek-R1), arXiv:2501.12948, the ratio of whole outputs.
  """
  active = jnp.where(rollout.mask.astype(bool), log_ratio, 0)
  return _segments.total(active, rollout.segment_ids)


def geometric(log_ratio: jax.Array, rollout: Rollout, *, clip: chex.Numeric = 0.4) -> jax.Array:
  """Clips each token's log-ratio, one-sided by the advantage's sign, then averages as `sequence`.

      log s = (1/L) Σ_t sgn(A) min(sgn(A) log ρ_t, sgn(A) clip(log ρ_t, −c, c))

  With the surrogate `importance_weighted` this is GMPO. At a limit the gradient is the unclipped
  one. A = 0 is clipped like A < 0, which the loss cannot show: there A multiplies by 0.

  Args:
    log_ratio: log ρ_t, `[..., T]`.
    rollout: its advantages, mask and segment_ids are used.
    clip: c > 0, in log space.

  Returns:
    log s at every token of the response, `[..., T]`.

  Example:
    >>> from gpo_jax import Rollout
    >>> rollout = Rollout(jnp.ones(()), jnp.array([1, 1]), jnp.ones(2))
    >>> print(geometric(jnp.array([1.0, -1.0]), rollout))
    [-0.3 -0.3]

  Reference: Zhao et al. (2025, GMPO), arXiv:2507.20673.
  """
  advantages = with_token_axis(rollout.advantages, log_ratio)
  limit = jnp.where(advantages > 0, clip, -jnp.asarray(clip))
  beyond = jnp.where(advantages > 0, log_ratio > clip, log_ratio < -jnp.asarray(clip))
  # 0, in value and slope, where x is finite: an infinite log-ratio must not end as a limit.
  zero = log_ratio - log_ratio
  limited = limit + with_slope(zero, zero, log_ratio)
  return sequence(jnp.where(beyond | jnp.isnan(limit), limited, log_ratio), rollout)
