"""Random rollouts for the tests: ragged, with holes, empty rows, equal rewards, stale samplers."""

import dataclasses

import jax
import numpy as np

import gpo_jax as gpo
from gpo_jax import presets

NEEDED = {"dr_grpo": {"length": 8}}
MADE = {name: preset(**NEEDED.get(name, {})) for name, preset in presets.PRESETS.items()}
PRESETS = {name: preset for name, preset in MADE.items() if preset.advantage}  # of rewards
# One of each kind: clip and KL, a response's ratio, an unbiased KL with a correction, no clip.
COVERING = ("grpo", "gspo", "deepseek_v32", "vespo", "cispo")


@dataclasses.dataclass
class Batch:
  """Arrays of one batch, `[P, G, T]` and rewards `[P, G]`."""

  rewards: np.ndarray
  mask: np.ndarray
  log_probs: np.ndarray
  old_log_probs: np.ndarray
  ref_log_probs: np.ndarray
  sampler_log_probs: np.ndarray

  def prepare(self, objective, **changes):
    """Prepares a rollout with everything in it."""
    arrays = dataclasses.asdict(self) | changes
    arrays.pop("log_probs")
    rewards, mask, old = (arrays.pop(name) for name in ("rewards", "mask", "old_log_probs"))
    return objective.prepare(rewards, mask, old, **arrays)


def batch(prompts=4, samples=4, length=6, seed=0, drift=0.3, dtype=np.float32):
  """Makes a batch whose second group has equal rewards and whose first row is empty."""
  rng = np.random.default_rng(seed)
  shape = (prompts, samples, length)
  lengths = rng.integers(1, length + 1, (prompts, samples))
  mask = np.arange(length) < lengths[..., None]
  mask &= rng.random(shape) < 0.8
  mask[0, 0] = False
  mask[1:, :, 0] = True
  rewards = rng.normal(size=(prompts, samples))
  if prompts > 1:
    rewards[1] = 0.1
  current = -rng.exponential(1.0, shape)
  others = [np.minimum(current + rng.normal(0, drift, shape), 0) for _ in range(3)]
  return Batch(rewards.astype(dtype), mask, *(x.astype(dtype) for x in (current, *others)))


@jax.jit
def value_and_grad(objective, log_probs, rollout):
  """Computes the loss and its gradient, compiled."""
  return jax.value_and_grad(lambda x: objective(x, rollout)[0])(log_probs)


def relative_error(value, expected):
  """The largest error in terms of the largest expected value."""
  value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
  return np.max(np.abs(value - expected)) / max(np.max(np.abs(expected)), 1e-30)


def grpo_with(weighting, **settings):
  """GRPO under another weighting."""
  return gpo.grpo(**settings).replace(weighting=weighting)
