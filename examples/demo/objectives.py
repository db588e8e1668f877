"""The objectives to train with: every preset that takes rewards, by name."""

import inspect

from gpo_jax import Objective, presets

from . import task

# Without a critic and without a teacher.
PRESETS = {k: v for k, v in presets.PRESETS.items() if k not in ("ppo", "distill")}


def build(name: str) -> Objective:
  """Makes an objective with the constants of its paper."""
  preset = presets.PRESETS[name]
  # The one number that has no default: the longest answer.
  if "length" in inspect.signature(preset).parameters:
    return preset(length=task.ANSWER_LENGTH)
  return preset()
