"""What fills a slot of an objective: a function, made a pytree of the numbers bound to it.

And what does not: a function that its slot cannot call, and slots that do not go together.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from gpo_jax import _checks, levels, weightings

_PACKAGE = __name__.partition(".")[0]

# What each slot's function is called with; a function of this package names it so, too.
_ARGUMENTS = {
  "surrogate": ("log_ratio", "advantages"),
  "level": ("log_ratio", "rollout"),
  "divergence": ("ref_log_ratio", "log_ratio", "rollout"),
  "corrections": ("log_probs", "rollout"),
  "weighting": ("mask", "segment_ids"),
  "advantage": ("rewards", "where"),
}
_MODULES = ("surrogates", "levels", "divergences", "corrections", "weightings", "advantages")
_REMEDIES = {
  "entropy_mask": ": pass rollout.replace(factor=entropy_mask(entropy, rollout))",
  "sequence_exact": ": bind the KL, lambda _, log_ratio, rollout: sequence_exact(kl, ...)",
}
_RESPONSE_LEVELS = (levels.sequence, levels.sequence_sum, levels.geometric)
_TOKEN_WEIGHTINGS = (weightings.token_mean, weightings.constant_length, weightings.token_sum)
_TAKE_ARRAYS = ("lengths", "weights")  # of `optimal_baseline` and `decoupled`


def as_slot(slot: str, function: Any) -> Partial:
  """Makes a slot's function a pytree; refuses what cannot be called as the slot calls it."""
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
  taken = tuple(signature.parameters)[: len(arguments)]
  if is_ours(function) and taken != arguments:
    remedy = _REMEDIES.get(name_of(function), "")
    raise ValueError(f"{expected}; {describe(function)} takes ({', '.join(taken)}){remedy}")
  return function


def is_ours(function: Any) -> bool:
  """Tells whether a function is one of this package for slots."""
  package, _, module = str(getattr(function.func, "__module__", None)).partition(".")
  return package == _PACKAGE and module in _MODULES


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
    for key, setting in value.keywords.items() if is_ours(value) else ():
      if key not in _TAKE_ARRAYS:
        check_numbers(key, setting)
  elif value is not None and jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar; got shape {list(jnp.shape(value))}: sweep it by jax.vmap"
    )


def check_combination(slots: Any) -> None:
  """Refuses an objective whose slots mean nothing together."""
  if (slots.divergence is None) != (slots.beta is None):
    raise ValueError(
      f"divergence and beta go together; got divergence={describe(slots.divergence)}, "
      f"beta={describe(slots.beta)}. Give both, or neither for no reference policy"
    )
  mixed = slots.level.func in _RESPONSE_LEVELS and slots.weighting.func in _TOKEN_WEIGHTINGS
  if mixed and not slots.allow_token_weighting:
    raise ValueError(
      f"level={describe(slots.level)} gives every token its response's ratio, so that "
      f"weighting={describe(slots.weighting)} would weigh a response by its length. If "
      "that is meant, use weightings.sequence_sum (LUSPO) or set allow_token_weighting=True; else "
      "use weightings.sequence_mean (GSPO) or levels.sequence_token"
    )


def name_of(function: Any) -> str:
  """Names the function of a slot."""
  return getattr(function.func, "__name__", type(function.func).__name__)


def describe(value: Any) -> str:
  """Shows the expression that makes a slot."""
  if isinstance(value, Partial):
    name = name_of(value)
    args = [describe(arg) for arg in value.args]
    args += [f"{k}={describe(v)}" for k, v in value.keywords.items() if v is not None]
    return f"{name}({', '.join(args)})" if args else name
  if isinstance(value, tuple):
    return f"({''.join(describe(item) + ', ' for item in value).strip()})"
  scalar = getattr(value, "shape", None) == () and hasattr(value, "__float__")
  if scalar and not isinstance(value, jax.core.Tracer):
    return f"{float(value):.6g}"
  return str(value)
