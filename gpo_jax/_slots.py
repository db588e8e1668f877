"""What fills a slot of an objective: a function, made a pytree of the numbers bound to it.

And what cannot: a function that its slot cannot call, and slots that do not go together.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from gpo_jax import types
from gpo_jax._inputs import as_array
from gpo_jax._ranges import check_range
from gpo_jax.traits import traits_of


def _arguments(protocol: Any) -> tuple[str, ...]:
  return tuple(inspect.signature(protocol.__call__).parameters)[1:]


# What each slot's function is called with.
_ARGUMENTS = {
  "surrogate": _arguments(types.Surrogate),
  "level": _arguments(types.Level),
  "divergence": _arguments(types.Divergence),
  "corrections": _arguments(types.Correction),
  "weighting": _arguments(types.Weighting),
  "advantage": _arguments(types.Advantage),
}


def as_slot(slot: str, function: Any) -> Partial:
  """Makes a slot's function a pytree, if the slot can call it."""
  if not callable(function):
    raise ValueError(f"{slot} must be a function; got {function!r:.60}")
  function, arguments = as_data(slot, function), _ARGUMENTS[slot]
  expected = f"{slot} must take ({', '.join(arguments)})"
  try:
    signature = inspect.signature(function.func)
  except (TypeError, ValueError):  # a builtin has none
    return function
  try:
    signature.bind(*function.args, *arguments, **function.keywords)
  except TypeError as error:
    raise ValueError(f"{expected}; {describe(function)} does not: {error}") from error
  taken = tuple(signature.parameters)[len(function.args) :][: len(arguments)]
  how = traits_of(function).how
  # Arguments named exactly as another slot's: that is where the function belongs.
  if how or (taken != arguments and taken in _ARGUMENTS.values()):
    remedy = f": {how}" if how else ""
    raise ValueError(f"{expected}; {describe(function)} takes ({', '.join(taken)}){remedy}")
  return function


def as_data(name: str, value: Any) -> Any:
  """Makes functions `Partial`s of numbers and arrays: leaves, while functions are structure."""
  if value is None:
    return None
  if isinstance(value, functools.partial):
    # A Partial hides another one inside; a functools.partial merges with it.
    while isinstance(inner := getattr(value.func, "fun", None), functools.partial):
      value = functools.partial(
        functools.partial(inner.func, *inner.args, **inner.keywords), *value.args, **value.keywords
      )
    args = [as_data(name, arg) for arg in value.args]
    keywords = {key: as_data(key, bound) for key, bound in _without_none(value).items()}
    function = Partial(value.func, *args, **keywords)
    return _floats(function) if traits_of(function).ours else function
  if callable(value):
    return Partial(value)
  return as_number(name, value)


def as_number(name: str, value: Any) -> Any:
  """Converts floats to the default float dtype; integers and bools stay exact."""
  if isinstance(value, bool | int):
    return value
  try:
    array = as_array(name, value)
  except ValueError as error:
    remedy = "bind numbers and arrays to a slot's function, and close over anything else"
    raise ValueError(f"{error}; {remedy}") from error
  given = value if hasattr(value, "dtype") else array
  if not jnp.issubdtype(given.dtype, jnp.floating):
    return given
  return array.astype(jax.dtypes.canonicalize_dtype(float))


def _floats(function: Partial) -> Partial:
  """Converts what is bound to a function of this package, whose numbers are real, to floats."""
  traits = traits_of(function)
  parameters = inspect.signature(function.func).parameters

  def convert(key: str, value: Any) -> Any:
    default = parameters[key].default if key in parameters else None
    if isinstance(value, Partial) != inspect.isfunction(default):
      kind = "a function" if inspect.isfunction(default) else "a number"
      raise ValueError(
        f"{key} of {describe(Partial(function.func))} must be {kind}; got {describe(value)}"
      )
    if isinstance(value, Partial):
      return value
    if key not in traits.arrays:
      check_scalar(key, value)
    if key in traits.ranges:
      check_range(key, value, traits.ranges[key])
    return as_array(key, value).astype(jax.dtypes.canonicalize_dtype(float))

  keywords = {key: convert(key, value) for key, value in function.keywords.items()}
  return Partial(function.func, *function.args, **keywords)


def _without_none(bound: functools.partial) -> dict[str, Any]:
  """Leaves out None where it is the default, so that a file, which cannot say it, loses nothing."""
  nones = [name for name, value in bound.keywords.items() if value is None]
  parameters = inspect.signature(bound.func).parameters if nones else {}
  named = [name for name in nones if name in parameters]
  for name in named:
    if parameters[name].default is not None:
      raise ValueError(
        f"{name} of {describe(Partial(bound.func))} must be a number; got None: bind a number, or "
        "leave it out for its default"
      )
  return {name: value for name, value in bound.keywords.items() if name not in named}


def check_scalar(name: str, value: Any) -> None:
  """Checks that a number is not an array."""
  if value is not None and jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar; got shape {list(jnp.shape(value))}: sweep it with jax.vmap"
    )


def check_numbers(slot: Any) -> None:
  """Checks that the numbers of a function of this package are scalars still, once it is called.

  Between the two, JAX fills an objective with what it likes: a sweep holds arrays outside of vmap.
  """
  traits = traits_of(slot)
  for key, value in slot.keywords.items():
    if isinstance(value, Partial):
      check_numbers(value)
    elif traits.ours and key not in traits.arrays:
      check_scalar(key, value)


def check_combination(slots: Any) -> None:
  """Checks that an objective's slots go together."""
  if (slots.divergence is None) != (slots.beta is None):
    raise ValueError(
      f"divergence and beta go together; got divergence={describe(slots.divergence)}, "
      f"beta={describe(slots.beta)}. Pass both, or neither for no reference policy"
    )
  mixed = traits_of(slots.level).of_response and traits_of(slots.weighting).by_length
  if mixed and not slots.allow_token_weighting:
    raise ValueError(
      f"level={describe(slots.level)} gives every token its response's ratio, so "
      f"weighting={describe(slots.weighting)} would weigh a response by its length. If that is "
      "meant, use weightings.sequence_sum (LUSPO) or set allow_token_weighting=True; else use "
      "weightings.sequence_mean (GSPO) or levels.sequence_token"
    )


def describe(value: Any) -> str:
  """Shows the expression that makes a slot."""
  if isinstance(value, Partial):
    name = getattr(value.func, "__name__", type(value.func).__name__)
    args = [describe(arg) for arg in value.args]
    args += [
      f"{key}={describe(bound)}" for key, bound in value.keywords.items() if bound is not None
    ]
    return f"{name}({', '.join(args)})" if args else name
  if isinstance(value, tuple):
    return f"({''.join(describe(item) + ', ' for item in value).strip()})"
  if isinstance(value, bool | int):
    return str(value)
  scalar = getattr(value, "shape", None) == () and hasattr(value, "__float__")
  if scalar and not isinstance(value, jax.core.Tracer):
    return f"{float(value):.6g}"
  return str(value)
