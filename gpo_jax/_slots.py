"""What fills a slot of an objective: a function, made a pytree of the numbers bound to it."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from gpo_jax import _checks

_PACKAGE = f"{__name__.partition('.')[0]}."


def as_data(name: str, value: Any) -> Any:
  """Makes functions `Partial`s of arrays, so that numbers are leaves and functions structure."""
  if value is None:
    return None
  if isinstance(value, functools.partial):
    _check_none(value)
    args = [as_data(name, arg) for arg in value.args]
    return Partial(value.func, *args, **{k: as_data(k, v) for k, v in value.keywords.items()})
  if callable(value):
    return Partial(value)
  return _checks.as_parameter(name, value)


def _check_none(bound: functools.partial) -> None:
  """Refuses None, which is no number, unless it is the default."""
  for name in [name for name, value in bound.keywords.items() if value is None]:
    parameter = inspect.signature(bound.func).parameters.get(name)
    if parameter is not None and parameter.default is not None:
      raise ValueError(
        f"{name} of {describe(Partial(bound.func))} must be a number; got None: bind a number, or "
        "leave it out for its default"
      )


def check_numbers(name: str, value: Any) -> None:
  """Refuses an array where this package takes a number; a function from elsewhere may have one."""
  if isinstance(value, Partial):
    ours = str(getattr(value.func, "__module__", None)).startswith(_PACKAGE)
    for key, setting in value.keywords.items() if ours else ():
      check_numbers(key, setting)
  elif value is not None and jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar; got shape {list(jnp.shape(value))}: sweep it by jax.vmap"
    )


def describe(value: Any) -> str:
  """Shows the expression that makes a slot."""
  if isinstance(value, Partial):
    name = getattr(value.func, "__name__", type(value.func).__name__)
    args = [describe(arg) for arg in value.args]
    args += [f"{k}={describe(v)}" for k, v in value.keywords.items() if v is not None]
    return f"{name}({', '.join(args)})" if args else name
  if isinstance(value, tuple):
    return f"({''.join(describe(item) + ', ' for item in value).strip()})"
  if getattr(value, "shape", None) == () and not isinstance(value, jax.core.Tracer):
    return f"{float(value):.6g}"
  return str(value)
