"""Objectives as plain dictionaries, for files in YAML, TOML or JSON and for command lines.

A function is its name, or `{"function": name, **numbers}` where numbers are bound to it. Only slot
functions of this package have names here: a file cannot import or run anything.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from gpo_jax import (
  advantages,
  corrections,
  divergences,
  levels,
  surrogates,
  weightings,
)
from gpo_jax._inputs import check_number
from gpo_jax._slots import check_numbers, check_scalar, describe
from gpo_jax.objective import Objective, check_objective
from gpo_jax.presets import PRESETS, preset
from gpo_jax.traits import traits_of

_MODULES: dict[str, ModuleType] = {
  "surrogate": surrogates,
  "level": levels,
  "advantage": advantages,
  "weighting": weightings,
  "divergence": divergences,
  "corrections": corrections,
}
_OF_ARGUMENT = _MODULES | {"statistic": divergences}
_REQUIRED = ("surrogate", "level", "weighting")
_KEYS = (*_MODULES, "beta", "allow_token_weighting")


def to_config(objective: Objective) -> dict[str, Any]:
  """Writes an objective of this package's functions as a dictionary of names and numbers.

  What is None or False is left out, since TOML cannot write it. Floats are the shortest decimals
  that `from_config` reads back as the same floats.

  Args:
    objective: the objective.

  Returns:
    Dictionaries, lists, text and numbers, as JSON, YAML and TOML have them.

  Raises:
    ValueError: for a function that is not this package's, such as a lambda; for numbers that are
      traced or swept.

  Example:
    >>> import gpo_jax as gpo
    >>> for item in to_config(gpo.cispo(high=5.0)).items():
    ...   print(item)
    ('surrogate', {'function': 'cispo', 'high': 5.0})
    ('level', 'token')
    ('advantage', 'standardize')
    ('weighting', 'token_mean')
  """
  check_objective(objective)
  check_scalar("beta", objective.beta)
  slots = {key: getattr(objective, key) for key in _MODULES}
  config = {key: _write(key, slot) for key, slot in slots.items() if slot not in (None, ())}
  if objective.beta is not None:
    config["beta"] = _number("beta", objective.beta)
  return config | ({"allow_token_weighting": True} if objective.allow_token_weighting else {})


def from_config(config: Mapping[str, Any]) -> Objective:
  """Reads an objective from a dictionary: its slots, or a preset and what differs from it.

  With `preset`, the other keys are the preset's numbers and slots that replace its own.

  Args:
    config: as `to_config` returns it, or `{"preset": name, ...}`; read from a file, or made of
      OmegaConf's types.

  Returns:
    The objective.

  Raises:
    ValueError: for keys, functions and numbers that are unknown or missing, and numbers given as
      text: YAML reads `3e-4` as text.

  Example:
    >>> import json
    >>> text = '{"preset": "dapo", "epsilon_high": 0.3, "weighting": "sequence_mean"}'
    >>> print(from_config(json.loads(text)))
    Objective(surrogate=clip(epsilon_low=0.2, epsilon_high=0.3), level=token, ...sequence_mean)
  """
  if not isinstance(config, Mapping):
    raise ValueError(f"config must be a dictionary; got {config!r:.60}")
  if "preset" not in config:
    slots = _slots(config)
    if missing := [key for key in _REQUIRED if key not in slots]:
      raise ValueError(f"config must have {', '.join(missing)}, or preset; got {list(config)}")
    slots.setdefault("advantage", None)
    return Objective(**slots)
  given = {str(key): value for key, value in config.items() if key != "preset"}
  function = PRESETS.get(config["preset"]) if isinstance(config["preset"], str) else None
  taken = inspect.signature(function).parameters if function else ()
  replaced = [key for key in given if key in _KEYS and key not in taken]
  numbers = {key: value for key, value in given.items() if key not in replaced}
  slots = _slots({key: given[key] for key in replaced})
  return preset(config["preset"], **numbers).replace(**slots)


def _write(key: str, slot: Any) -> Any:
  if isinstance(slot, tuple):
    return [_write(key, one) for one in slot]
  name, module = describe(Partial(slot.func)), _OF_ARGUMENT[key]
  if slot.args or _functions(key).get(name) is not slot.func:
    raise ValueError(
      f"{key}={name} has no name in a configuration: only the functions of {module.__name__} have; "
      f"set others in code, from_config(config).replace({key}=...)"
    )
  check_numbers(slot)
  bound = {k: value for k, value in slot.keywords.items() if value is not None}
  bound = {k: _write(k, v) if isinstance(v, Partial) else _number(k, v) for k, v in bound.items()}
  return {"function": name} | bound if bound else name


def _number(key: str, value: Any) -> Any:
  """Converts a leaf to Python's numbers; str() is the shortest decimal that is the same float."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f"{key} must be known; got {value}: call to_config outside of jax.jit")
  if isinstance(value, bool | int):
    return value
  array = np.asarray(value)
  if array.ndim:
    return [_number(key, one) for one in array]
  return float(str(array)) if array.dtype.kind == "f" else array.item()


def _functions(key: str) -> dict[str, Any]:
  """Finds the functions that a slot can have, by name."""
  known = {name: (f, traits_of(f)) for name, f in vars(_OF_ARGUMENT[key]).items()}
  return {name: f for name, (f, traits) in known.items() if traits.ours and not traits.how}


def _slots(config: Mapping[str, Any]) -> dict[str, Any]:
  if unknown := [key for key in config if key not in _KEYS]:
    raise ValueError(f"config takes preset, {', '.join(_KEYS)}; got {unknown[0]!r}")
  slots: dict[str, Any] = {}
  for key, value in config.items():
    if key == "corrections":
      many = value if not isinstance(value, str | Mapping) and np.iterable(value) else [value]
      slots[key] = tuple(_read(f"{key}[{i}]", key, one) for i, one in enumerate(many))
    elif key in _MODULES:
      slots[key] = None if value is None and key not in _REQUIRED else _read(key, key, value)
    elif key == "beta":
      check_number(key, value)
      slots[key] = value
    elif not isinstance(value, bool):
      raise ValueError(f"{key} must be true or false; got {value!r:.60}")
    else:
      slots[key] = value
  return slots


def _read(where: str, key: str, value: Any) -> Any:
  known, module = _functions(key), _OF_ARGUMENT[key].__name__
  numbers = dict(value) if isinstance(value, Mapping) else {"function": value}
  name = numbers.pop("function", None)
  if not isinstance(name, str) or name not in known:
    raise ValueError(
      f'{where} must be the name of a function of {module}, or {{"function": name, ...}} with its '
      f"numbers, of {', '.join(known)}; got {value!r:.60}"
    )
  parameters = inspect.signature(known[name]).parameters.values()
  takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  if unknown := [number for number in numbers if number not in takes]:
    raise ValueError(f"{where}={name} takes {', '.join(takes) or 'none'}; got {unknown[0]!r}")
  bound = {number: numbers[number] for number in takes if number in numbers}
  for number, given in bound.items():
    if number in _OF_ARGUMENT:
      bound[number] = _read(f"{where}.{number}", number, given)
    else:
      check_number(f"{where}.{number}", given)
  return partial(known[name], **bound)
