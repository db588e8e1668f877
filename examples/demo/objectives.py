"""The objectives to train with: every preset, by name."""

import inspect

from gpo_jax import Objective
from gpo_jax.presets import PRESETS

from . import task


def build(name: str) -> Objective:
  """Makes an objective with the constants of its paper."""
  preset = PRESETS[name]
  # The one number that has no default: the longest answer.
  if "length" in inspect.signature(preset).parameters:
    return preset(length=task.ANSWER_LENGTH)
  return preset()
