"""Every number has a range, which the edges belong to and a known value outside of does not."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import (
  _ranges,
  advantages,
  corrections,
  divergences,
  levels,
  presets,
  surrogates,
  vocabulary,
  weightings,
)
from gpo_jax.traits import traits_of

MODULES = (surrogates, levels, weightings, advantages, corrections)
FUNCTIONS = {
  name: function
  for module in MODULES
  for name, function in vars(module).items()
  if traits_of(function).ours and function.__module__.startswith(module.__name__)
}
NUMBERS = [
  (name, key, limits)
  for name, function in FUNCTIONS.items()
  for key, limits in traits_of(function).ranges.items()
]
EACH = pytest.mark.parametrize(
  ("name", "key", "limits"), NUMBERS, ids=[f"{n}-{k}" for n, k, _ in NUMBERS]
)
OLD = jnp.log(jnp.full((2, 3), 0.5))
ONES = jnp.ones((2, 3))
ROLLOUT = gpo.Rollout(
  advantages=jnp.array([[1.0], [-1.0]]),
  mask=jnp.ones((2, 3), bool),
  weights=ONES,
  old_log_probs=OLD,
  sampler_log_probs=OLD,
)
ARGUMENTS = {
  surrogates: (ONES, ONES),
  levels: (ONES, ROLLOUT),
  weightings: (jnp.ones((2, 3), bool),),
  advantages: (ONES,),
  corrections: (OLD, ROLLOUT),
}


def call(name, **numbers):
  """Calls a slot function with what else it needs."""
  function = FUNCTIONS[name]
  module = next(m for m in MODULES if vars(m).get(name) is function)
  needed = {
    key: {"lengths": np.ones((2, 3)), "high": 4.0}.get(key, 0.5)
    for key, p in inspect.signature(function).parameters.items()
    if p.kind is p.KEYWORD_ONLY and p.default is p.empty
  }
  return function(*ARGUMENTS[module], **needed | numbers)


def outside(limits):
  """Lists values just outside of a range, and a NaN."""
  below = limits.low if limits.brackets[0] == "(" else np.nextafter(limits.low, -np.inf)
  above = limits.high if limits.brackets[1] == ")" else np.nextafter(limits.high, np.inf)
  return [x for x in (below, above, np.nan) if not limits.holds(np.asarray(x))]


def shaped(name, key, value):
  """Gives arrays where a parameter takes them."""
  if key not in traits_of(FUNCTIONS[name]).arrays:
    return value
  return np.full({"lengths": (2, 3), "weights": (2,)}[key], value)


def test_every_number_of_every_slot_function_has_a_range():
  assert len(NUMBERS) > 20
  for name, function in FUNCTIONS.items():
    parameters = inspect.signature(function).parameters.values()
    numbers = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"level", "statistic"}
    assert numbers == traits_of(function).ranges.keys(), name


@EACH
def test_a_known_number_outside_of_its_range_raises(name, key, limits):
  for value in outside(limits):
    with pytest.raises(ValueError, match=rf"{key} must be in .*{limits.high:g}.*; got"):
      call(name, **{key: shaped(name, key, value)})


@EACH
def test_the_edges_of_a_range_belong_to_it(name, key, limits):
  for value, bracket in zip((limits.low, limits.high), limits.brackets):
    if bracket in "[]" and np.isfinite(value):
      call(name, **{key: shaped(name, key, float(value))})


@EACH
def test_a_traced_number_passes(name, key, limits):
  bad = np.float32(limits.low - 1 if np.isfinite(limits.low) else np.nan)
  array = np.asarray(shaped(name, key, bad), np.float32)
  one = lambda x: call(name, **{key: x})
  step = lambda carry, x: (carry, one(x))
  # Tracing is where a check could raise: nothing needs to be compiled.
  jax.eval_shape(one, array)
  jax.eval_shape(jax.vmap(one), array[None])
  jax.eval_shape(lambda xs: jax.lax.scan(step, 0, xs), array[None])


PRESET_NUMBERS = [
  (name, key)
  for name, preset in presets.PRESETS.items()
  for key in inspect.signature(preset).parameters
]


@pytest.mark.parametrize(
  ("name", "key"), PRESET_NUMBERS, ids=[f"{n}-{k}" for n, k in PRESET_NUMBERS]
)
def test_a_preset_checks_its_numbers(name, key):
  needed = {"length": 8.0} if name == "dr_grpo" else {}
  for value in (-0.5, np.nan):
    with pytest.raises(ValueError, match=r"must be in .*; got"):
      presets.PRESETS[name](**needed | {key: value})
  jax.jit(lambda x: presets.PRESETS[name](**needed | {key: x}))(-0.5)


def test_edges_that_mean_something_are_legal():
  gpo.grpo(epsilon_low=0, epsilon_high=3, beta=0)
  gpo.cispo(low=0)
  partial(corrections.mask_importance, high=np.inf)(OLD, ROLLOUT)
  assert gpo.dapo(epsilon_high=np.inf)


@pytest.mark.parametrize("key", ["temperature", "softcap"])
@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf])
def test_what_scales_logits_is_positive(key, value):
  logits, tokens = jnp.ones((2, 3)), jnp.array([0, 1])
  for call in (
    lambda: gpo.token_log_probs(logits, tokens, **{key: value}),
    lambda: gpo.token_entropy(logits, **{key: value}),
    lambda: gpo.exact_kl(logits, logits, **{key: value}),
    lambda: gpo.linear_token_log_probs(logits, gpo.Head(logits, **{key: value}), tokens),
  ):
    with pytest.raises(ValueError, match=rf"{key} must be in \(0, inf\); got"):
      call()


def test_functions_of_ones_own_are_not_checked():
  own = lambda log_ratio, advantages, *, epsilon_low: log_ratio * advantages * epsilon_low
  gpo.dapo().replace(surrogate=partial(own, epsilon_low=-1.0))


def test_the_table_has_no_name_that_nothing_uses():
  used = {key for _, key, _ in NUMBERS} | {"beta", "temperature", "softcap"}
  used |= {"discount", "decay"}  # of `generalized`, which fills no slot
  assert {name.split(".")[-1] for name in _ranges.RANGES} == used


DOCUMENTED = FUNCTIONS | presets.PRESETS | vars(vocabulary) | {"Head": gpo.Head}
DOCUMENTED |= {"token_log_probs": gpo.token_log_probs, "token_entropy": gpo.token_entropy}
STATED = [
  (name, key, stated)
  for name, function in DOCUMENTED.items()
  if callable(function) and function.__doc__
  for key, line in re.findall(r"^ +(\w+): (.*)$", function.__doc__, re.MULTILINE)
  for stated in re.findall(r"(?<!A )([≥>] [\d.]+|(?<=in )[\[(][^\])]*[\])])", line)
  if f"{name}.{key}" in _ranges.RANGES or key in _ranges.RANGES
]


def agrees(stated, limits):
  bracket = {"≥": "[", ">": "("}.get(stated[0])
  if bracket is None:
    return stated == str(limits)
  return limits.brackets[0] == bracket and limits.low == float(stated[2:])


@pytest.mark.parametrize(("name", "key", "stated"), STATED, ids=[f"{n}-{k}" for n, k, _ in STATED])
def test_a_docstring_states_the_range_that_is_checked(name, key, stated):
  limits = _ranges.RANGES.get(f"{name}.{key}") or _ranges.RANGES[key]
  assert agrees(stated, limits), (stated, str(limits))


def test_a_wrong_range_in_a_docstring_would_be_seen():
  limits = _ranges.Range("[)", 0, 1)
  assert len(STATED) > 20
  assert agrees("≥ 0", limits)
  assert agrees("[0, 1)", limits)
  assert not any(agrees(stated, limits) for stated in ("> 0", "≥ 1", "(0, 1)", "[0, 1]"))


EVERY = FUNCTIONS | {k: v for k, v in vars(divergences).items() if traits_of(v).ours}


@pytest.mark.parametrize("name", EVERY)
def test_a_docstring_has_its_equation_first(name):
  _, _, body = EVERY[name].__doc__.partition("\n\n")
  assert body.startswith(" " * 6), body
