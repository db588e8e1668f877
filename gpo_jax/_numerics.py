"""The ±20 bound on log-ratios, and functions that keep digits their textbook form loses."""

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def exp_excess(x: jax.Array) -> jax.Array:
  """Computes e^x − x − 1, to rounding, for every x.

  The textbook form keeps no correct digit below |x| = 3e-4 in float32, so a Taylor series replaces
  it for |x| < 1.5. The derivative e^x − 1, which is x more, has the same trap and the same remedy.

  Args:
    x: floats of any shape, float32 or wider.

  Returns:
    Values ≥ 0 of x's shape and dtype; 0 only where x² underflows.
  """
  order = 22 if x.dtype == jnp.float64 else 14
  series = jnp.full_like(x, 1 / math.factorial(order))
  for n in range(order - 1, 1, -1):
    series = series * x + 1 / math.factorial(n)
  return jnp.where(jnp.abs(x) < 1.5, x * x * series, jnp.exp(x) - 1 - x)


@exp_excess.defjvp
def _exp_excess_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]):
  (x,), (tangent,) = primals, tangents
  value = exp_excess(x)
  return value, tangent * jnp.where(jnp.abs(x) < 1.5, value + x, jnp.exp(x) - 1)


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
  """Computes σ(x) = 1/(1 + e^−x) with a derivative that keeps its digits where σ rounds to 1.

  The textbook derivative σ(1 − σ) has none left at x = 17 in float32; σ(x) σ(−x) loses none.
  """
  return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]):
  (x,), (tangent,) = primals, tangents
  return sigmoid(x), tangent * sigmoid(x) * sigmoid(-x)


def with_slope(value: jax.Array, slope: jax.Array, x: jax.Array) -> jax.Array:
  """Gives `value` the derivative `slope` in x, whatever the derivative of the formula behind it.

  value = sg(value) + sg(slope)·(x − sg(x)): x − sg(x) is 0 if x is finite and NaN if it is not, so
  an infinite log-probability is never hidden.
  """
  value, slope = jax.lax.stop_gradient((value, slope))
  return value + slope * (x - jax.lax.stop_gradient(x))


def clip_ratio(ratio: jax.Array, advantages: jax.Array, limit: jax.Array) -> jax.Array:
  """Clips ρ so that ρA is min(ρA, clip(ρ)A): at a limit from above if A > 0, from below else.

  By strict comparison a tie keeps the unclipped gradient, which `jnp.minimum` halves.
  """
  clipped = jnp.where(advantages > 0, ratio > limit, ratio < limit) | jnp.isnan(limit)
  return jnp.where(clipped, limit, ratio)


# e^20 is 5e8: far outside every clip range, and small enough that its square is finite in float32.
MAX_LOG_RATIO = 20.0


def bound(log_ratio: jax.Array) -> jax.Array:
  """Bounds a log-ratio to ±20 in value and passes its gradient through.

  Beyond the bound a function has the slope it has at the bound: finite, and not 0, so a penalty
  still pulls back a policy that has drifted any distance.
  """
  limit = jnp.asarray(MAX_LOG_RATIO, log_ratio.dtype)
  bounded = jax.lax.clamp(-limit, log_ratio, limit)
  return with_slope(bounded, jnp.ones_like(log_ratio), log_ratio)
