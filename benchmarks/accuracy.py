"""D: relative errors of the penalty k3 = e^d − d − 1 and of its slope in float32."""

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo

LIMITS = (1e-4, 1e-2, 1.0, 20.0)
PER_DECADE = 2000


def ours(d):
  return gpo.divergences.k3(-d, -d, None)


FORMULAS = {
  "gpo_jax": ours,
  "e^d − d − 1": lambda d: jnp.exp(d) - d - 1,
  "expm1(d) − d": lambda d: jnp.expm1(d) - d,
}


def series(d: np.ndarray) -> np.ndarray:
  """e^d − d − 1 by its series where the difference cancels, in float64."""
  terms = np.cumprod(d[:, None] / np.arange(1, 12), axis=-1)[:, 1:]
  return np.where(np.abs(d) < 0.1, terms.sum(-1), np.expm1(d) - d)


def errors(formula, d: np.ndarray) -> tuple[float, float]:
  """The largest relative errors of value and slope."""
  value, slope = jax.jit(jax.vmap(jax.value_and_grad(formula)))(jnp.asarray(d))
  exact = d.astype(np.float64)
  pairs = (value, series(exact)), (slope, np.expm1(exact))
  value, slope = (float(np.max(np.abs(np.asarray(x) / truth - 1))) for x, truth in pairs)
  return value, slope


def rows() -> list[dict]:
  """Gives errors for each formula and range of |d|."""
  result, low = [], 1e-6
  for high in LIMITS:
    size = np.geomspace(low, high, int(PER_DECADE * np.log10(high / low)), dtype=np.float32)
    for name, formula in FORMULAS.items():
      value, slope = errors(formula, np.concatenate([size, -size]))
      result.append({"contestant": name, "above": low, "to": high, "value": value, "slope": slope})
    low = high
  return result
