"""The padding guarantee: what a masked position holds is invisible, bit for bit.

Inputs are cleaned once, where they enter: validated, converted to one dtype, without gradient but
that of the log-probabilities, and 0 wherever the mask is 0. No slot function can meet what was
there, in value or in gradient, so none has to guard against it. Of hidden states `linear.chunks`
gathers the active ones instead.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gpo_jax._inputs import (
  as_array,
  as_log_probs,
  as_mask,
  as_segment_ids,
  check_same_shape,
  describe,
  promote,
)
from gpo_jax.types import Rollout

_PER_TOKEN = ("weights", "old_log_probs", "ref_log_probs", "sampler_log_probs", "factor")


def clean(log_probs: Any, rollout: Rollout, name: str = "log_probs") -> tuple[jax.Array, Rollout]:
  """Cleans what an objective is called with."""
  rollout = validate(rollout)
  log_probs = as_log_probs(name, log_probs)
  check_same_shape(**{"mask": rollout.mask, name: log_probs})
  given = [field for field in _PER_TOKEN if getattr(rollout, field) is not None]
  fixed = jax.lax.stop_gradient([getattr(rollout, field) for field in ("advantages", *given)])
  log_probs, advantages, *fixed = promote(log_probs, *fixed)
  mask = rollout.mask
  fields = {field: jnp.where(mask, x, 0) for field, x in zip(given, fixed, strict=True)}
  # One advantage per row stays one per row: broadcast to tokens it would cost a third of the loss.
  counts = mask if advantages.shape == mask.shape else jnp.any(mask, axis=-1, keepdims=True)
  fields["advantages"] = jnp.where(counts, advantages, 0)
  return jnp.where(mask, log_probs, 0), rollout.replace(**fields)


def mask_of(rollout: Rollout) -> jax.Array:
  """Checks for a rollout, and returns its mask as bools."""
  if not isinstance(rollout, Rollout):
    raise ValueError(
      f"rollout must be a Rollout, from `prepare`; got {type(rollout).__name__}: call "
      "objective(log_probs, rollout)"
    )
  return as_mask("mask", rollout.mask)


def validate(rollout: Rollout) -> Rollout:
  """Checks that a rollout's arrays fit its mask; gives advantages a token axis."""
  mask = mask_of(rollout)
  fields = {name: getattr(rollout, name) for name in _PER_TOKEN}
  needed = {k: v for k, v in fields.items() if v is not None or k == "weights"}
  convert = {name: as_log_probs if name.endswith("log_probs") else as_array for name in needed}
  arrays = {name: jnp.asarray(convert[name](name, value)) for name, value in needed.items()}
  check_same_shape(mask=mask, **arrays)
  given = jnp.asarray(as_array("advantages", rollout.advantages))
  advantages = given[..., None] if given.ndim < mask.ndim else given
  if advantages.shape not in (mask.shape, (*mask.shape[:-1], 1)):
    raise ValueError(
      "advantages must be [..., G], [..., G, 1] or [..., G, T] for a mask [..., G, T]; got "
      f"{describe(advantages=given, mask=mask)}"
    )
  ids = rollout.segment_ids
  ids = None if ids is None else as_segment_ids(ids, mask)
  return rollout.replace(advantages=advantages, mask=mask, segment_ids=ids, **arrays)
