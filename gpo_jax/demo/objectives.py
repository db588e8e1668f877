"""The objectives to train with: every preset of `gpo_jax.presets`, by name."""

import inspect

from gpo_jax import Objective, presets
from gpo_jax.demo import task

PRESETS = {name: getattr(presets, name) for name in presets.__all__}


def build(name: str) -> Objective:
  """Makes an objective with the constants of its paper."""
  preset = PRESETS[name]
  # The one number that has no default: the longest answer.
  if "length" in inspect.signature(preset).parameters:
    return preset(length=task.ANSWER_LENGTH)
  return preset()
