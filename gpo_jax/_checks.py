"""Conversions and checks at the public boundary: a clear `ValueError` before any computation."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax.types import Rollout

ArrayLike = chex.Array | Sequence


def as_array(name: str, value: Any) -> jax.Array | np.ndarray:
  """Converts lists, scalars and integers to float arrays; refuses what is not real numbers."""
  value = _convert(name, value)
  if jnp.issubdtype(value.dtype, jnp.floating):
    return value
  if jnp.issubdtype(value.dtype, np.integer) or value.dtype == bool:
    return _to_float(value)
  raise ValueError(f"{name} must hold real numbers; got dtype {value.dtype}")


def _convert(name: str, value: Any, what: str = "real numbers") -> jax.Array | np.ndarray:
  """Makes an array of a dtype that JAX has, if it has one for such values."""
  if value is None:
    raise ValueError(f"{name} must hold {what}; got None")
  if isinstance(value, np.ma.MaskedArray):
    raise ValueError(f"{name} must not be a masked array: give its data, and its mask as a mask")
  if isinstance(value, jax.Array):
    return value
  try:
    value = _stack(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name} must be a rectangular array; got {value!r:.60}: {error}") from error
  # JAX knows the machine's byte order only, and nothing longer than a double.
  long = value.dtype == np.longdouble
  return value.astype(np.float64 if long else value.dtype.newbyteorder("="), copy=False)


def _stack(value: Any) -> jax.Array | np.ndarray:
  try:
    return np.asarray(value)
  except jax.errors.TracerArrayConversionError:  # a list that holds traced values
    return jnp.stack([jnp.asarray(item) for item in value])


def _to_float(value: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  return value.astype(jax.dtypes.canonicalize_dtype(float))


def as_scalar(name: str, value: Any) -> jax.Array | np.ndarray:
  """Gives a hyperparameter the default float dtype: 0.2, 1 and array scalars share one trace."""
  value = as_array(name, value)
  if value.shape:
    raise ValueError(
      f"{name} must be a scalar; got shape {list(value.shape)}: sweep it by jax.vmap"
    )
  return _to_float(value)


def as_parameter(name: str, value: Any) -> jax.Array | np.ndarray:
  """Gives a number bound to a slot the default float dtype; arrays keep their shape, for sweeps."""
  try:
    return _to_float(as_array(name, value))
  except ValueError as error:
    remedy = "bind numbers and arrays to a slot's function, and close over anything else"
    raise ValueError(f"{error}; {remedy}") from error


def describe(**arrays: chex.Array) -> str:
  """Names arrays with their shapes: `ratios [3], advantages [2]`."""
  return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


def like_first(remedy: str = "", /, **arrays: chex.Array) -> None:
  """Refuses arrays that do not have the shape of the first."""
  first, *others = arrays
  for name in others:
    if arrays[name].shape != arrays[first].shape:
      got = describe(**{first: arrays[first], name: arrays[name]})
      raise ValueError(f"{name} must have the shape of {first}; got {got}{remedy}")


def with_token_axis(advantages: chex.Array, tokens: chex.Array) -> jax.Array:
  """Gives advantages of responses, `[..., G]`, the axis that tokens have: `[..., G, 1]`."""
  advantages = jnp.asarray(advantages)
  return jnp.expand_dims(advantages, -1) if advantages.ndim < tokens.ndim else advantages


def same_shape(axes: str, **arrays: chex.Array) -> None:
  """Refuses arrays that do not share one shape with these axes, or have an axis of size 0."""
  message = f"expected one shape {axes}, every axis at least 1; got {describe(**arrays)}"
  rank = axes.count(",") + 1
  chex.assert_rank(list(arrays.values()), rank, custom_message=message, exception_type=ValueError)
  chex.assert_equal_shape(list(arrays.values()), custom_message=message, exception_type=ValueError)
  if 0 in next(iter(arrays.values())).shape:
    raise ValueError(message)


def promote(*arrays: chex.Array) -> list[jax.Array]:
  """Gives all arrays one dtype: float64 if one of them has it, float32 otherwise."""
  wide = any(jax.dtypes.canonicalize_dtype(array.dtype) == jnp.float64 for array in arrays)
  return [jnp.asarray(array, jnp.float64 if wide else jnp.float32) for array in arrays]


def as_mask(name: str, mask: Any) -> jax.Array:
  """Converts a mask of bools or of 0 and 1 to bools."""
  mask = as_array(name, mask).astype(bool)
  if not mask.ndim or 0 in mask.shape:
    raise ValueError(
      f"{name} must be [..., G, T] with every axis at least 1; got {list(mask.shape)}"
    )
  return jnp.asarray(mask)


def as_ids(name: str, ids: Any, remedy: str) -> jax.Array:
  """Converts ids to the default integer dtype; refuses what is not integers, or does not fit."""
  ids = _convert(name, ids, "integers")
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers; got dtype {ids.dtype}: {remedy}")
  fitting = ids.astype(jax.dtypes.canonicalize_dtype(int))
  # JAX would cut 64-bit hashes to 32 bits, where two of them may be one.
  if isinstance(ids, np.ndarray) and not np.array_equal(ids, fitting):
    raise ValueError(f"{name} must fit {fitting.dtype}; got {ids.dtype} beyond it: {remedy}")
  return jnp.asarray(fitting)


def as_segment_ids(ids: Any, mask: jax.Array) -> jax.Array:
  """Converts the segment ids of packed rows."""
  ids = as_ids("segment_ids", ids, "give 1, 2, ... in each row, and 0 for padding")
  like_first(mask=mask, segment_ids=ids)
  return ids


def returned(name: str, value: Any, shape: tuple[int, ...], one: str, dtype: Any = None) -> Any:
  """Refuses what a slot's function returned if it is not one value per token, or per response."""
  got = None if value is None else type(value).__name__
  if hasattr(value, "shape"):
    got = f"{jnp.result_type(value)} {list(value.shape)}"
    if value.shape == shape and dtype in (None, jnp.result_type(value)):
      return value
  kind = "" if dtype is None else f"{dtype} "
  raise ValueError(f"{name} must return {kind}{list(shape)}, one value per {one}; got {got}")


def like(name: str, value: Any, expected: jax.Array) -> jax.Array:
  """Refuses what a slot's function returned if it is not one float per token."""
  return returned(name, value, expected.shape, "token", expected.dtype)


_PER_TOKEN = ("weights", "old_log_probs", "ref_log_probs", "sampler_log_probs", "factor")


def check_rollout(rollout: Rollout) -> Rollout:
  """Refuses what is no rollout, and one whose arrays do not fit its mask."""
  if not isinstance(rollout, Rollout):
    raise ValueError(
      f"rollout must be a Rollout, from `prepare`; got {type(rollout).__name__}: call "
      "objective(log_probs, rollout)"
    )
  mask = as_mask("mask", rollout.mask)
  fields = {name: getattr(rollout, name) for name in _PER_TOKEN}
  needed = {k: v for k, v in fields.items() if v is not None or k == "weights"}
  arrays = {name: jnp.asarray(as_array(name, value)) for name, value in needed.items()}
  like_first(mask=mask, **arrays)
  given = as_array("advantages", rollout.advantages)
  advantages = with_token_axis(given, mask)
  if advantages.shape not in (mask.shape, (*mask.shape[:-1], 1)):
    raise ValueError(
      "advantages must be [..., G], [..., G, 1] or [..., G, T] for a mask [..., G, T]; got "
      f"{describe(advantages=given, mask=mask)}"
    )
  segment_ids = rollout.segment_ids
  if segment_ids is not None:
    segment_ids = as_segment_ids(segment_ids, mask)
  return rollout.replace(advantages=advantages, mask=mask, segment_ids=segment_ids, **arrays)


def clean(log_probs: Any, rollout: Rollout, name: str = "log_probs") -> tuple[jax.Array, Rollout]:
  """Checks the inputs of an objective, gives them one dtype and puts 0 wherever the mask is 0.

  From there on no function can meet what was in a masked position, in value or in gradient.
  """
  rollout = check_rollout(rollout)
  log_probs = as_array(name, log_probs)
  like_first(**{"mask": rollout.mask, name: log_probs})
  mask, names = rollout.mask, [name for name in _PER_TOKEN if getattr(rollout, name) is not None]
  fixed = jax.lax.stop_gradient([getattr(rollout, name) for name in ("advantages", *names)])
  log_probs, advantages, *fixed = promote(log_probs, *fixed)
  # One advantage per row stays one per row: broadcast to tokens it would cost a third of the loss.
  counts = mask if advantages.shape == mask.shape else jnp.any(mask, axis=-1, keepdims=True)
  fields = {name: jnp.where(mask, array, 0) for name, array in zip(names, fixed, strict=True)}
  fields["advantages"] = jnp.where(counts, advantages, 0)
  return jnp.where(mask, log_probs, 0), rollout.replace(**fields)
