"""The arrays that all contestants get, of this interpreter or another: NumPy, from one seed."""

from typing import NamedTuple

import numpy as np

Size = dict[str, int]


class Batch(NamedTuple):
  """Responses of a slightly stale sampler, `[rows, tokens]`, in groups of eight rows."""

  rewards: np.ndarray
  advantages: np.ndarray
  mask: np.ndarray
  log_probs: np.ndarray
  old: np.ndarray
  ref: np.ndarray


def batch(size: Size, padding: float, level: float = -1.5) -> Batch:
  """Draws log-probabilities around `level`; lengths are spread evenly, short of that padding."""
  shape = size["rows"], size["tokens"]
  rng = np.random.default_rng(0)
  rewards = rng.permutation(np.arange(shape[0]) % 2).astype(np.float32)
  lengths = np.linspace(1 - 2 * padding, 1, shape[0]) * shape[1]
  groups = rewards.reshape(-1, 8)
  centered = groups - groups.mean(-1, keepdims=True)
  advantages = (centered / (groups.std(-1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
  log_probs = rng.normal(level, 0.5, shape).astype(np.float32)
  old, ref = (log_probs + rng.normal(0, 0.1, shape).astype(np.float32) for _ in range(2))
  return Batch(rewards, advantages, np.arange(shape[1]) < lengths[:, None], log_probs, old, ref)


def tokens(size: Size) -> np.ndarray:
  """Draws the sampled tokens, `[rows, tokens]`."""
  shape = size["rows"], size["tokens"]
  return np.random.default_rng(1).integers(0, size["vocabulary"], shape, np.int32)


def logits(size: Size) -> np.ndarray:
  """Draws logits, `[rows, tokens, vocabulary]`."""
  shape = size["rows"], size["tokens"], size["vocabulary"]
  return np.random.default_rng(2).standard_normal(shape, np.float32)


def head(size: Size) -> tuple[np.ndarray, np.ndarray]:
  """Draws hidden states, `[rows, tokens, hidden]`, and the unembedding, `[vocabulary, hidden]`."""
  rng, width = np.random.default_rng(3), size["hidden"]
  states = rng.standard_normal((size["rows"], size["tokens"], width), np.float32)
  unembedding = rng.standard_normal((size["vocabulary"], width), np.float32)
  return states, unembedding / np.float32(width**0.5)
