"""Surrogates: what a token contributes to the objective, maximised.

Each is `(log_ratio, advantages, *, …) -> objective`, elementwise, with ρ = exp(log_ratio): log ρ
and A have one shape, or A broadcasts, and the result has the shape of log ρ. On-policy, at ρ = 1,
all have ∂/∂log_ratio = A.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from gpo_jax._numerics import clip_ratio, sigmoid, with_slope
from gpo_jax.traits import slot_function


@slot_function(tokenwise=True)
def clip(
  log_ratio: jax.Array,
  advantages: jax.Array,
  *,
  epsilon_low: chex.Numeric = 0.2,
  epsilon_high: chex.Numeric | None = None,
  max_ratio: chex.Numeric | None = None,
) -> jax.Array:
  """Clips the ratio on the side that would raise the objective.

      min(ρA, clip(ρ, 1−ε_low, 1+ε_high) A)
      min(min(ρ, max_ratio)A, clip(ρ, 1−ε_low, 1+ε_high) A)      with `max_ratio`

  At a limit the gradient is the unclipped branch's.

  Args:
    epsilon_low: ε_low ≥ 0.
    epsilon_high: ε_high ≥ 0; ε_low if None.
    max_ratio: a cap ≥ 1 on ρ, which a clip leaves unbounded for A < 0; there one below 1+ε_high
      counts as 1+ε_high. None disables it.

  Example:
    >>> log_ratio = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5]))
    >>> advantages = jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> print(clip(log_ratio, advantages, epsilon_low=0.25, epsilon_high=0.25))
    [ 1.25  0.5  -1.5  -0.75]

  Reference: Schulman et al. (2017), arXiv:1707.06347, Eq. 7; unequal limits, Yu et al. (2025),
  arXiv:2503.14476, Eq. 8 (DAPO); the cap, INTELLECT-2 (2025), arXiv:2505.07291.
  """
  epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
  ratio = _clipped_ratio(log_ratio, advantages, epsilon_low, epsilon_high)
  if max_ratio is not None:
    cap = jnp.where(advantages < 0, jnp.maximum(max_ratio, 1 + epsilon_high), max_ratio)
    ratio = _capped(ratio, cap)
  return ratio * advantages


def _clipped_ratio(
  log_ratio: jax.Array, advantages: jax.Array, epsilon_low: Any, epsilon_high: Any
) -> jax.Array:
  reach = jnp.where(advantages > 0, epsilon_high, -jnp.asarray(epsilon_low))
  open_end = reach <= -1  # 1 − ε ≤ 0: no ratio is that low
  # exp(log1p(ε)) rounds like exp(log_ratio).
  limit = jnp.where(open_end, 0, jnp.exp(jnp.log1p(jnp.where(open_end, 0, reach))))
  return clip_ratio(jnp.exp(log_ratio), advantages, limit)


def _capped(ratio: jax.Array, cap: Any) -> jax.Array:
  return jnp.where((ratio > cap) | jnp.isnan(cap), cap, ratio)


@slot_function(tokenwise=True)
def dual_clip(
  log_ratio: jax.Array,
  advantages: jax.Array,
  *,
  epsilon_low: chex.Numeric = 0.2,
  epsilon_high: chex.Numeric | None = None,
  bound: chex.Numeric = 3.0,
) -> jax.Array:
  """Clips as `clip` does, and bounds what a bad sample can cost: `bound` times its advantage.

      A ≥ 0: min(ρA, clip(ρ)A);   A < 0: max(min(ρA, clip(ρ)A), bound·A)

  Args:
    epsilon_low: as in `clip`.
    epsilon_high: as in `clip`.
    bound: ≥ 1.

  Example:
    >>> print(dual_clip(jnp.log(jnp.array([8.0, 8.0])), jnp.array([1.0, -1.0]), epsilon_low=0.25))
    [ 1.25 -3.  ]

  Reference: Ye et al. (2020), arXiv:1912.09729, Eq. 5.
  """
  epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
  ratio = _clipped_ratio(log_ratio, advantages, epsilon_low, epsilon_high)
  return _capped(ratio, jnp.where(advantages < 0, bound, jnp.inf)) * advantages


@slot_function(tokenwise=True)
def cispo(
  log_ratio: jax.Array,
  advantages: jax.Array,
  *,
  low: chex.Numeric | None = None,
  high: chex.Numeric,
) -> jax.Array:
  """Clips the importance weight, so that every token keeps a gradient.

      sg(clip(ρ, low, high)) · A · log π      (up to a constant: log_ratio stands for log π)

  The paper's gradient, not its value.

  Args:
    low: the smallest weight, an absolute bound in [0, 1]; None disables it, as in TRL; verl,
      NeMo-RL and slime use 1−ε.
    high: the largest weight, an absolute bound > 0. Below 1 it shrinks on-policy gradients too.

  Example:
    >>> print(jax.grad(lambda x: cispo(x, 2.0, high=4.0))(jnp.log(8.0)))
    8.0

  Reference: MiniMax (2025), arXiv:2506.13585, Eq. 4 and 5. The paper does not disclose `high`.
  """
  weight = jnp.clip(jnp.exp(log_ratio), low, high)
  return with_slope(weight * log_ratio, weight, log_ratio) * advantages


@slot_function(tokenwise=True)
def sapo(
  log_ratio: jax.Array,
  advantages: jax.Array,
  *,
  temperature_pos: chex.Numeric = 1.0,
  temperature_neg: chex.Numeric = 1.05,
) -> jax.Array:
  """Fades a token's gradient out as its ratio leaves 1, instead of clipping it.

      (4/τ) σ(τ(ρ−1)) A,   τ = temperature_pos if A > 0 else temperature_neg

  Args:
    temperature_pos: τ > 0 of good samples.
    temperature_neg: τ > 0 of bad samples; larger fades faster.

  Example:
    >>> print(jax.grad(sapo)(0.0, 2.0))
    2.0

  Reference: Gao et al. (2025), arXiv:2511.20347.
  """
  temperature = jnp.where(advantages > 0, temperature_pos, temperature_neg)
  # `expm1` is no more exact here, and JAX's derivative of it loses digits of ρ.
  gate = sigmoid(temperature * (jnp.exp(log_ratio) - 1))
  return 4 / temperature * gate * advantages


@slot_function(tokenwise=True)
def reinforce(log_ratio: jax.Array, advantages: jax.Array) -> jax.Array:
  """Weighs log-probabilities by advantages; the gradient does not depend on the ratio.

      A · log π      (up to a constant: log_ratio stands for log π)

  Example:
    >>> print(jax.grad(reinforce)(0.7, 2.0))
    2.0

  Reference: Williams (1992); for groups, Chu et al. (2025, GPG), arXiv:2504.02546.
  """
  return log_ratio * advantages


@slot_function(tokenwise=True)
def importance_weighted(log_ratio: jax.Array, advantages: jax.Array) -> jax.Array:
  """Weighs advantages by the ratio, unclipped.

      ρ A

  Example:
    >>> print(importance_weighted(jnp.log(jnp.array([2.0])), jnp.array([3.0])))
    [6.]

  Reference: Schulman et al. (2017), arXiv:1707.06347, Eq. 6.
  """
  return jnp.exp(log_ratio) * advantages


@slot_function(tokenwise=True)
def dro(log_ratio: jax.Array, advantages: jax.Array, *, beta: chex.Numeric) -> jax.Array:
  """Pulls the log-ratio towards A/β by a quadratic penalty, in place of a clip.

      A · log ρ − (β/2) (log ρ)²

  Args:
    beta: β > 0.

  Example:
    >>> print(dro(jnp.array([2.0]), jnp.array([3.0]), beta=0.5))
    [5.]

  Reference: Richemond et al. (2024), arXiv:2405.19107, with the value function's part in A.
  """
  return log_ratio * advantages - beta / 2 * log_ratio**2
