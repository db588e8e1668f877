"""Packs a batch's responses into rows."""

import numpy as np

FIELDS = ("log_probs", "old_log_probs", "ref_log_probs", "sampler_log_probs")


def pack(data, rows=5, width=24, seed=1):
  """Packs the responses of a batch into rows, in random order, with random padding between.

  Returns what `prepare` takes (padding and missing rewards NaN), log_probs too, and each response's
  place, `[P, G, 2]`: its row and its first column.
  """
  rng = np.random.default_rng(seed)
  prompts, samples, length = data.mask.shape
  packed = {k: np.full((rows, width), np.nan, np.float32) for k in FIELDS}
  packed["mask"] = np.zeros((rows, width), bool)
  packed["segment_ids"] = np.zeros((rows, width), np.int32)
  rewards, group_ids = [[] for _ in range(rows)], [[] for _ in range(rows)]
  place = np.full((prompts, samples, 2), -1)
  row, start = 0, 0
  for index in rng.permutation(prompts * samples):
    p, g = divmod(int(index), samples)
    gap = int(rng.integers(0, 2))
    if start + gap + length > width:
      row, start, gap = row + 1, 0, 0
    at = slice(start + gap, start + gap + length)
    for k in ("mask", *FIELDS):
      packed[k][row, at] = getattr(data, k)[p, g]
    rewards[row].append(data.rewards[p, g])
    group_ids[row].append(p)
    packed["segment_ids"][row, at] = len(rewards[row])
    place[p, g] = row, at.start
    start = at.stop
  most = max(map(len, rewards))
  fill = lambda lists, x: np.array([r + [x] * (most - len(r)) for r in lists])
  packed["rewards"] = fill(rewards, np.nan).astype(np.float32)
  packed["group_ids"] = fill(group_ids, -1)
  return packed, place


def unpack(x, place, length):
  """Finds responses `[P, G, length]` in rows `[R, W]`."""
  return np.array([[x[r, at : at + length] for r, at in group] for group in place.tolist()])
