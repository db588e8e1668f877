"""Statistics that know how large the batch is."""

import numpy as np


def error(x: np.ndarray) -> float:
  """Computes the standard error of a mean."""
  return float(np.std(x, ddof=1) / np.sqrt(x.size)) if x.size > 1 else np.inf


def score(x: np.ndarray) -> float:
  """Computes a mean in units of its standard error."""
  mean, unit = float(np.mean(x)), error(x)
  return mean / unit if unit > 0 else float(np.sign(mean)) * np.inf if mean else 0.0


def share_at_least(count: int, total: int) -> float:
  """Computes the lower end of Wilson's interval for a share, at 2.6 standard errors."""
  z, share = 2.6, count / total
  spread = np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
  return float((share + z**2 / (2 * total) - z * spread) / (1 + z**2 / total))


def effective_share(log_weights: np.ndarray) -> float:
  """Computes the effective sample size of weights, relative to their number."""
  weights = np.exp(log_weights - log_weights.max())
  return float(np.mean(weights) ** 2 / np.mean(weights**2))


def beyond_precision(difference: np.ndarray) -> tuple[float, bool]:
  """Computes mean(e^min(|Δ|, 1)) − 1, and whether it exceeds what rounding explains.

  Without the bound a few large differences would make the mean's error as large as the mean.
  """
  excess = np.expm1(np.minimum(np.abs(difference), 1))
  return float(np.mean(excess)), bool(np.mean(excess) - 3 * error(excess) > 0.05)


def centered(values: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Subtracts each group's mean."""
  return values - (np.bincount(group, values) / np.bincount(group))[group]


def groups_that_differ(values: np.ndarray, group: np.ndarray) -> np.ndarray:
  """Tells for each group whether its values differ."""
  first = np.zeros(group.max() + 1)
  first[group] = values
  return np.bincount(group, values != first[group]) > 0


def largest_spread(values: np.ndarray, group: np.ndarray) -> float:
  """Computes the largest relative range of values within a group."""
  high, low = np.full(group.max() + 1, -np.inf), np.full(group.max() + 1, np.inf)
  np.maximum.at(high, group, values)
  np.minimum.at(low, group, values)
  some = high > -np.inf
  return float(np.max((high[some] - low[some]) / high[some]))
