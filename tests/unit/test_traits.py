"""Traits belong to a function object: no copy, wrapper or forged name inherits them."""

import ast
import copy
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

import gpo_jax as gpo
from gpo_jax import corrections, divergences, levels, surrogates
from gpo_jax.linear import one_pass
from gpo_jax.traits import traits_of

PACKAGE = pathlib.Path(gpo.__file__).parent


def wrapper():
  return functools.wraps(surrogates.clip)(
    lambda *args, **numbers: surrogates.clip(*args, **numbers)
  )


def forged():
  def clip(log_ratio, advantages):
    return log_ratio * advantages

  clip.__module__, clip.__qualname__ = surrogates.clip.__module__, surrogates.clip.__qualname__
  return clip


def duplicate():
  f = surrogates.clip
  other = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
  other.__dict__.update(f.__dict__)
  return other


class Callable:
  """Stands for a function, with its attributes."""

  def __init__(self):
    self.__dict__.update(surrogates.clip.__dict__)

  def __call__(self, log_ratio, advantages):
    return log_ratio * advantages


OTHERS = {
  "wraps": wrapper,
  "forged": forged,
  "duplicate": duplicate,
  "lambda": lambda: lambda log_ratio, advantages: log_ratio,
  "callable": Callable,
  "copied callable": lambda: copy.copy(gpo.tokenwise(Callable())),
  "jitted": lambda: jax.jit(surrogates.reinforce),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_was_not_declared_is_unknown(make):
  assert not traits_of(make()).tokenwise
  assert not traits_of(make()).ours


@pytest.mark.parametrize("kind", [functools.partial, Partial])
def test_a_partial_keeps_what_was_declared(kind):
  assert traits_of(kind(surrogates.clip, epsilon_low=0.1)).tokenwise
  assert traits_of(kind(kind(surrogates.clip, epsilon_low=0.1), epsilon_high=0.2)).tokenwise
  assert not traits_of(kind(levels.sequence)).tokenwise
  assert traits_of(kind(levels.sequence)).of_response


def test_tokenwise_returns_the_function_it_is_given():
  def surrogate(log_ratio, advantages):
    return log_ratio * advantages

  assert gpo.tokenwise(surrogate) is surrogate
  assert traits_of(surrogate).tokenwise
  assert not traits_of(surrogate).ours
  assert surrogate(2.0, 3.0) == 6.0


@pytest.mark.parametrize("thing", [3, "clip", functools.partial(surrogates.clip), min])
def test_what_cannot_carry_a_declaration_is_refused(thing):
  with pytest.raises(ValueError, match="function"):
    gpo.tokenwise(thing)


def test_no_decision_rests_on_a_name_or_a_module():
  """Names are for messages: in `describe`, in errors, and to key the tables at definition."""
  allowed = {"__name__": {"_slots.py", "traits.py", "presets.py", "objective.py", "metrics.py"}}
  allowed["__name__"] |= {"_inputs.py", "_padding.py", "configuration.py", "_tunix_loss.py"}
  allowed["__name__"] |= {"checks.py"}
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and node.attr in ("__module__", "__qualname__"):
        pytest.fail(f"{path.name} reads {node.attr}")
      if isinstance(node, ast.Attribute) and node.attr == "__name__":
        assert path.name in allowed["__name__"], path.name
      if isinstance(node, ast.Compare):
        names = [x for x in ast.walk(node) if isinstance(x, ast.Attribute) and x.attr == "__name__"]
        assert not names, f"{path.name} compares a name"


def test_numbers_and_arrays_of_a_partial_in_a_partial_are_seen():
  inner = Partial(surrogates.clip, epsilon_low=0.1)
  objective = gpo.dapo().replace(surrogate=Partial(inner, epsilon_high=0.2))
  assert objective.surrogate.keywords == {"epsilon_low": 0.1, "epsilon_high": 0.2}
  assert one_pass.is_enough(objective)

  @gpo.tokenwise
  def table(log_ratio, advantages, *, scale, shift=0.0):
    return log_ratio * advantages * scale + shift

  hidden = Partial(Partial(table, scale=jnp.ones(3)), shift=1.0)
  assert not one_pass.is_enough(gpo.dapo().replace(surrogate=hidden))


def test_all_functions_of_tokens_are_declared_so():
  coupled = {
    levels: {"clipped_sequence", "sequence", "sequence_max", "sequence_product", "sequence_token"},
    divergences: {"sequence_exact", "sequence_k3", "sequence_unbiased"},
    corrections: {
      "covariance_mask",
      "entropy_mask",
      "off_policy_sequence_mask",
      "topr",
      "vespo",
    },
    surrogates: set(),
  }
  for module, names in coupled.items():
    ours = {name: traits_of(value) for name, value in vars(module).items()}
    ours = {name: traits.tokenwise for name, traits in ours.items() if traits.ours}
    assert {name for name, tokenwise in ours.items() if not tokenwise} == names
    assert len(ours) > len(names)


def test_the_divergences_that_read_the_reference_say_so():
  ours = {name: traits_of(value) for name, value in vars(divergences).items()}
  ours = {name: traits.needs_reference for name, traits in ours.items() if traits.ours}
  assert {name for name, needed in ours.items() if not needed} == {"sequence_exact"}
