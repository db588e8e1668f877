"""Sums along the token axis: over rows that hold one response, or several packed side by side.

Jitted as a whole, so that eager callers do not compile each operation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def _starts(segment_ids: jax.Array) -> jax.Array:
  """Marks the first token of each segment."""
  changes = segment_ids[..., 1:] != segment_ids[..., :-1]
  return jnp.concatenate([jnp.ones_like(segment_ids[..., :1], bool), changes], axis=-1)


@jax.jit
def fill(segment_ids: jax.Array, mask: jax.Array) -> jax.Array:
  """Gives each masked token the id of the active token before it: segments stay contiguous.

  Ids are 1, 2, … in order, so that the last one is the largest so far, and 1 before the first.
  """
  active = jnp.where(mask, segment_ids, 1)
  return jnp.where(mask, segment_ids, jax.lax.cummax(active, axis=active.ndim - 1))


@jax.jit
def earlier(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Sums the tokens before each token of its segment.

  By a shift: the difference of a running sum and the token itself loses digits in the gradient.
  """
  x = jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)
  if segment_ids is None:
    return jnp.cumsum(x, axis=-1)
  x = jnp.where(_starts(segment_ids), 0, x)

  def combine(left, right):
    left_start, left_sum = left
    right_start, right_sum = right
    return left_start | right_start, jnp.where(right_start, right_sum, left_sum + right_sum)

  return jax.lax.associative_scan(combine, (_starts(segment_ids), x), axis=-1)[1]


@jax.jit
def total(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Sums each segment (each row without `segment_ids`); every token gets its segment's sum."""
  if segment_ids is None:
    return jnp.broadcast_to(jnp.sum(x, axis=-1, keepdims=True), x.shape)
  # A linear function that is its own transpose: JAX finds none through a loop of unknown length.
  return jax.lax.custom_linear_solve(
    lambda x: x, x, lambda _, x: _reduce(_SUM, x, segment_ids), symmetric=True
  )


@jax.jit
def largest(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Finds each segment's largest number, without a derivative; every token gets its segment's."""
  if segment_ids is None:
    return jnp.broadcast_to(jnp.max(x, axis=-1, keepdims=True), x.shape)
  return _reduce(_MAX, jax.lax.stop_gradient(x), segment_ids)


class _Reduction(NamedTuple):
  """What it leaves of no number, of many, and of many that are scattered."""

  empty: float
  reduce: Callable
  scatter: str


_SUM, _MAX = _Reduction(0, jnp.sum, "add"), _Reduction(-jnp.inf, jnp.max, "max")


def _reduce(how: _Reduction, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Reduces each segment; scatters are fast on CPUs, and slow on most accelerators."""
  by_scatter, by_windows = functools.partial(_by_scatter, how), functools.partial(_by_windows, how)
  return jax.lax.platform_dependent(x, segment_ids, cpu=by_scatter, default=by_windows)


def _by_scatter(how: _Reduction, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
  def of_row(x: jax.Array, index: jax.Array) -> jax.Array:
    return getattr(jnp.full_like(x, how.empty).at[index], how.scatter)(x)[index]

  # Renumbering a row's segments bounds the index by the row's length, whatever the ids are.
  index = jnp.cumsum(_starts(segment_ids).astype(jnp.int32), axis=-1) - 1
  for _ in range(x.ndim - 1):
    of_row = jax.vmap(of_row)
  return of_row(x, index)


_WINDOW = 8  # segments of a row that one pass over the tokens reduces


def _by_windows(how: _Reduction, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Reduces segments of a few neighbouring ids in each pass, from the largest id down."""
  least = jnp.iinfo(segment_ids.dtype).min

  def window(state: tuple) -> tuple:
    _, top, values = state
    bottom = jnp.maximum(top, least + _WINDOW - 1) - (_WINDOW - 1)
    members = [segment_ids == bottom + i for i in range(_WINDOW)]
    found = [how.reduce(jnp.where(m, x, how.empty), axis=-1, keepdims=True) for m in members]
    # One pass to reduce, one to spread: a TPU's compiler would make it one each per segment.
    for m, value in zip(members, jax.lax.optimization_barrier(found), strict=True):
      values = jnp.where(m, value, values)
    below = segment_ids < bottom
    return jnp.any(below), jnp.max(jnp.where(below, segment_ids, least)), values

  top = jnp.max(segment_ids, initial=least)
  # True and zeros; what varies over devices must do so from the start.
  state = top == top, top, jnp.where(segment_ids <= top, 0, x)
  with jax.named_scope("windows"):
    return jax.lax.while_loop(lambda state: state[0], window, state)[2]


@functools.partial(jax.jit, static_argnames="size")
def present(mask: jax.Array, segment_ids: jax.Array | None, size: int) -> jax.Array:
  """Marks the segments 1 … size (the rows without `segment_ids`) that have an active token."""
  if segment_ids is None:
    return jnp.any(mask, axis=-1)
  # Ids outside 1 … size have no column.
  members = jax.nn.one_hot(segment_ids - 1, size, dtype=bool)
  return jnp.any(jnp.expand_dims(mask, -1) & members, axis=-2)


def to_tokens(values: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Gives each token the value of its segment, that of segment s at s − 1."""
  if segment_ids is None:
    return values
  # An id outside 1 … S must not find another response's value: it becomes NaN, loudly.
  index = jnp.where(segment_ids < 1, values.shape[-1], segment_ids - 1)
  return jnp.take_along_axis(values, index, axis=-1, mode="fill", fill_value=jnp.nan)


@jax.jit
def count(active: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """Counts the segments (the rows without `segment_ids`) that have an active token."""
  some = total(active, segment_ids) > 0
  if segment_ids is None:
    return jnp.sum(some[..., 0].astype(active.dtype))
  return jnp.sum((some & _starts(segment_ids)).astype(active.dtype))
