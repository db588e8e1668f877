"""Conversions and checks at the public boundary: a clear `ValueError` before anything is computed."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

ArrayLike = chex.Array | Sequence


def as_array(name: str, value: Any) -> jax.Array | np.ndarray:
  """Converts lists, scalars and integers to float arrays; refuses, by name, what is not real numbers."""
  if not isinstance(value, jax.Array | np.ndarray):
    try:
      value = np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list that holds traced values
      value = jnp.stack([jnp.asarray(item) for item in value])
    except ValueError as error:
      raise ValueError(f"{name} must be a rectangular array; got {value!r:.60}: {error}") from error
  if jnp.issubdtype(value.dtype, jnp.floating):
    return value
  if jnp.issubdtype(value.dtype, np.integer) or value.dtype == bool:
    return value.astype(jax.dtypes.canonicalize_dtype(float))
  raise ValueError(f"{name} must hold real numbers; got dtype {value.dtype}")


def as_scalar(name: str, value: Any) -> jax.Array | np.ndarray:
  """Gives a hyperparameter the default float dtype: 0.2, 1, NumPy and JAX scalars share one trace."""
  value = as_array(name, value)
  if value.shape:
    raise ValueError(f"{name} must be a scalar; got shape {list(value.shape)}")
  dtype = jax.dtypes.canonicalize_dtype(float)
  return jnp.asarray(value, dtype) if isinstance(value, jax.Array) else np.asarray(value, dtype)


def describe(**arrays: chex.Array) -> str:
  """Names arrays with their shapes: `ratios [3], advantages [2]`."""
  return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


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
