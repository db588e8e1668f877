"""The range of every number that the package's functions take, and what people usually mean.

One table, read by the check and by the documentation. A value that is not known, inside of
`jax.jit` or `jax.vmap`, is not checked.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np


class Range(NamedTuple):
  """An interval, in the usual notation: a limit at a round bracket does not belong to it."""

  brackets: str
  low: float
  high: float
  usual: str = ""

  def holds(self, x: np.ndarray) -> bool:
    """Tells whether all of x lies in the range; a NaN lies in none."""
    above = x > self.low if self.brackets[0] == "(" else x >= self.low
    below = x < self.high if self.brackets[1] == ")" else x <= self.high
    return bool(np.all(above & below))

  def __str__(self) -> str:
    """Shows the range, as in [0, 1)."""
    return f"{self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"


INF = float("inf")
_EPSILON = Range("[]", 0, INF, "a distance from a ratio of 1, such as 0.2, or 3e-4 for responses")
_POSITIVE = Range("()", 0, INF)
_SHARE = Range("[)", 0, 1, "a share of the tokens")
_DISTANCE = Range("[]", 0, INF, "a distance, not its sign")
_LOG = Range("[]", 0, INF, "a distance from a log-ratio of 0, such as 0.4")

# By name, or by function and name if one name means two things.
RANGES = {
  "epsilon_low": _EPSILON,
  "epsilon_high": _EPSILON,
  "max_ratio": Range("[]", 1, INF, "a ratio above 1 + epsilon_high, such as 4"),
  "bound": Range("[]", 1, INF, "a multiple of the advantage, such as 3"),
  "cispo.low": Range("[]", 0, 1, "a ratio, 1 - epsilon, not epsilon"),
  "cispo.high": Range("(]", 0, INF, "a ratio, 1 + epsilon, not epsilon"),
  "temperature_pos": _POSITIVE,
  "temperature_neg": _POSITIVE,
  "clipped_sequence.low": _LOG,
  "clipped_sequence.high": _LOG,
  "beta": Range("[)", 0, INF, "a weight such as 0.04; None disables the divergence"),
  "dro.beta": _POSITIVE,
  "jensen_shannon.beta": Range("()", 0, 1, "0.5; forward_kl and kl are its ends"),
  "cap": Range("(]", 0, INF, "the largest weight, such as 2"),
  "floor": Range("[)", 0, INF, "the smallest weight, such as 0.5; None disables it"),
  "mask_importance.low": Range("[]", 0, INF, "a weight below 1, such as 0.5"),
  "mask_importance.high": Range("(]", 0, INF, "a weight above 1, such as 5"),
  "reject.low": Range("[]", -INF, INF, "nats: log(0.5) for a ratio of 0.5"),
  "reject.high": Range("[]", -INF, INF, "nats: log(2) for a ratio of 2"),
  "total_variation_mask.low": _DISTANCE,
  "total_variation_mask.high": _DISTANCE,
  "binary_kl_mask.low": _DISTANCE,
  "binary_kl_mask.high": _DISTANCE,
  "threshold": _DISTANCE,
  "k_pos": _POSITIVE,
  "lambda_pos": _POSITIVE,
  "k_neg": _POSITIVE,
  "lambda_neg": _POSITIVE,
  "fraction": _SHARE,
  "quantile": _SHARE,
  "discount": Range("[]", 0, 1, "gamma, 1 for language models"),
  "decay": Range("[]", 0, 1, "lambda, such as 0.95"),
  "length": Range("()", 0, INF, "the longest allowed response, in tokens"),
  "lengths": Range("[)", 0, INF, "tokens per response"),
  "decoupled.weights": Range("()", -INF, INF, "one number per kind of reward"),
  "ddof": Range("[]", 0, 1, "0 or 1"),
  "eps": Range("[)", 0, INF, "a small number, such as 1e-4"),
  "temperature": Range("()", 0, INF, "the sampler's; greedy decoding samples nothing"),
  "softcap": Range("()", 0, INF, "None, for no softcap"),
}


def ranges_of(function: str, names: Iterable[str]) -> dict[str, Range]:
  """Looks up the ranges of a function's numbers, each of which must have one."""
  return {name: RANGES.get(f"{function}.{name}") or RANGES[name] for name in names}


def check_range(name: str, value: Any, limits: Range | None = None) -> Any:
  """Checks a number, if its value is known, and returns it."""
  if value is None or callable(value) or any(map(is_unknown, jax.tree.leaves(value))):
    return value
  try:
    known = np.asarray(value)
    if known.dtype.kind not in "biufV":
      return value
    known = known.astype(np.float64)
  except (TypeError, ValueError):  # not numbers, which their conversion reports
    return value
  limits = limits or RANGES[name]
  if not limits.holds(known):
    hint = f": usually {limits.usual}" if limits.usual else ""
    got = f"{known:g}" if not known.ndim else f"{known}"
    raise ValueError(f"{name} must be in {limits}; got {got:.60}{hint}")
  return value


def is_unknown(x: Any) -> bool:
  """Tells whether values are out of reach: traced, or partly on another host."""
  return isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True)
