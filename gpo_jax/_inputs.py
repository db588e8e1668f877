"""Arguments become arrays, or one clear `ValueError` at trace time."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax import _segments
from gpo_jax._ranges import check_range, is_unknown

Array = jax.Array | np.ndarray


def as_array(name: str, value: Any, what: str = "real numbers") -> Array:
  """Converts an array, a number or a list of numbers to an array of floats."""
  array = _convert(name, value, what)
  if jnp.issubdtype(array.dtype, jnp.floating):
    return array
  if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool:
    return array.astype(jax.dtypes.canonicalize_dtype(float))
  raise ValueError(f"{name} must hold {what}; got {_show(value, array.dtype)}")


def as_log_probs(name: str, value: Any) -> Array:
  """Converts an array of floats: integers are token ids, in the wrong place."""
  array = as_array(name, value)
  given = getattr(value, "dtype", array.dtype)
  if not jnp.issubdtype(given, jnp.floating):
    raise ValueError(
      f"{name} must hold floats; got dtype {given}: pass log-probabilities, such as "
      "token_log_probs(logits, tokens), not token ids"
    )
  return array


def _convert(name: str, value: Any, what: str) -> Array:
  if isinstance(value, jax.Array):
    return value
  if isinstance(value, np.ma.MaskedArray):
    raise ValueError(f"{name} must not be a masked array: pass its data, and its mask as a mask")
  try:
    array = np.asarray(value)
  except (TypeError, ValueError) as error:  # ragged lists, lists of traced values
    raise ValueError(
      f"{name} must be a rectangular array of {what}; got {value!r:.60}: {error}"
    ) from error
  if not array.dtype.isnative or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
    raise ValueError(f"{name} must hold {what} of a dtype that JAX has; got {array.dtype.str}")
  return array


def _show(value: Any, dtype: Any) -> str:
  if value is None:
    return "None"
  if getattr(dtype, "kind", "") != "O":  # a key's dtype has no kind
    text = isinstance(value, str) or jnp.issubdtype(dtype, np.str_)
    return f"text, {value!r:.60}" if text else f"dtype {dtype}"
  return f"{value!r:.60}: for a missing value use NaN and mask that response out"


def check_number(name: str, value: Any) -> None:
  """Checks that a configuration's value is not text or a bool, and says what YAML does."""
  if isinstance(value, str | bytes):
    raise ValueError(
      f"{name} must be a number; got text, {value!r:.60}: write 3.0e-4 in YAML, to which 3e-4 is "
      "text, and null for None; convert the text of a command line with float()"
    )
  if isinstance(value, bool):
    raise ValueError(f"{name} must be a number; got {value}, as which YAML reads yes, no, on, off")


def as_scalar(name: str, value: Any) -> Array:
  """Converts a number to the default float dtype: 0.2, 1 and array scalars share one trace."""
  number = as_array(name, value, "a number")
  if number.shape:
    raise ValueError(
      f"{name} must be a scalar; got shape {list(number.shape)}: sweep it with jax.vmap"
    )
  return number.astype(jax.dtypes.canonicalize_dtype(float))


def as_number_in_range(name: str, value: Any, dtype: Any) -> jax.Array:
  """Converts a number that has a range in the table."""
  return jnp.asarray(check_range(name, as_scalar(name, value)), dtype)


def _is_bool(x: Any) -> bool:
  return hasattr(x, "dtype") and x.dtype == bool


def as_mask(name: str, mask: Any) -> jax.Array:
  """Converts a mask of bools or of 0 and 1 to bools."""
  mask = as_array(name, mask, "bools or 0 and 1") if not _is_bool(mask) else mask
  if not mask.ndim or 0 in mask.shape:
    raise ValueError(
      f"{name} must be [..., G, T] with every axis at least 1; got {list(mask.shape)}"
    )
  if not _is_bool(mask) and not is_unknown(mask):
    values = np.asarray(mask, np.float32)
    if not np.isin(values, (0, 1)).all():
      other = values[~np.isin(values, (0, 1))][0]
      raise ValueError(
        f"{name} must hold bools or 0 and 1; got {other}: pass {name} == 0 of an additive mask, "
        f"{name} > 0 of a mask of -1 and 1"
      )
  return jnp.asarray(mask).astype(bool)


def as_ids(name: str, ids: Any, remedy: str) -> jax.Array:
  """Converts integers to the default integer dtype, which must hold them."""
  ids = _convert(name, ids, "integers")
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f"{name} must be integers; got dtype {ids.dtype}: {remedy}")
  fitting = ids.astype(jax.dtypes.canonicalize_dtype(int))
  # JAX would truncate 64-bit hashes to 32 bits, which may make two of them equal.
  if isinstance(ids, np.ndarray) and not np.array_equal(ids, fitting):
    raise ValueError(f"{name} must fit {fitting.dtype}; got {ids.dtype} beyond it: {remedy}")
  return jnp.asarray(fitting)


def as_segment_ids(ids: Any, mask: jax.Array) -> jax.Array:
  """Converts the segment ids of packed rows."""
  ids = as_ids("segment_ids", ids, "pass 1, 2, ... in each row, and 0 for padding")
  check_same_shape(mask=mask, segment_ids=ids)
  if not (is_unknown(ids) or is_unknown(mask)):
    values, counts = np.asarray(ids), np.asarray(mask)
    least = np.maximum.accumulate(np.where(counts & (values > 1), values, 1), axis=-1)
    wrong = counts & (values < least)
    if wrong.any():
      first = tuple(np.argwhere(wrong)[0])
      raise ValueError(
        "segment_ids must be 1, 2, ... in each row, in the order of its responses; got "
        f"{values[first]} at {list(map(int, first))}, where at least {least[first]} is expected: "
        "number a row's responses as they follow one another"
      )
  return ids


def as_filled_ids(ids: Any, mask: jax.Array) -> jax.Array | None:
  """Converts segment ids, if there are any; masked tokens, whose own do not count, join in."""
  return None if ids is None else _segments.fill(as_segment_ids(ids, mask), mask)


def describe(**arrays: chex.Array) -> str:
  """Names arrays with their shapes: `ratios [3], advantages [2]`."""
  return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


def check_same_shape(remedy: str = "", /, **arrays: chex.Array) -> None:
  """Checks that arrays have the shape of the first."""
  first, *others = arrays
  for name in others:
    if arrays[name].shape != arrays[first].shape:
      got = describe(**{first: arrays[first], name: arrays[name]})
      raise ValueError(f"{name} must have the shape of {first}; got {got}{remedy}")


def check_returned(name: str, value: Any, shape: tuple, one: str, dtype: Any = None) -> Any:
  """Checks that a slot's function returned one value per token, or per response."""
  got = None if value is None else type(value).__name__
  if hasattr(value, "shape"):
    got = f"{jnp.result_type(value)} {list(value.shape)}"
    if value.shape == shape and dtype in (None, jnp.result_type(value)):
      return value
  kind = "" if dtype is None else f"{dtype} "
  raise ValueError(f"{name} must return {kind}{list(shape)}, one value per {one}; got {got}")


def promote(*arrays: Array) -> list[jax.Array]:
  """Converts arrays to one dtype: float64 if one of them has it, float32 otherwise."""
  wide = any(jax.dtypes.canonicalize_dtype(array.dtype) == jnp.float64 for array in arrays)
  return [jnp.asarray(array, jnp.float64 if wide else jnp.float32) for array in arrays]


def as_size(name: str, size: Any) -> int:
  """Checks a size that is part of a program's structure."""
  if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 1:
    raise ValueError(f"{name} must be an integer of at least 1; got {size!r:.60}")
  return int(size)
