"""What a function is like, declared for that function object: the only ground for a fast path.

Unknown means the general path: slower, right. A wrapper is another object, so it is undeclared,
also one made by `functools.wraps`; `functools.partial` and `jax.tree_util.Partial` keep what was
declared for the function inside.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from gpo_jax._ranges import Range, check_range, ranges_of

F = TypeVar("F", bound=Callable)
_ATTRIBUTE = "__gpo_traits__"


class Traits(NamedTuple):
  """What the package knows of a function.

  Attributes:
    tokenwise: its value at a token depends on that token alone.
    ours: a slot function of this package, whose numbers are real and scalar.
    ranges: of its numbers.
    arrays: its parameters that take arrays, not scalars.
    how: how to use it in an objective, for a function that no slot can call as it is.
    needs_reference: a divergence that reads `ref_log_ratio`.
    of_response: a level that gives every token its response's ratio.
    by_length: a weighting under which a longer response weighs more.
    denominator: what a weighting divides by, "tokens" or "responses"; None for a constant.
    of_group: an advantage that is 0 for a group of one.
    of_batch: an advantage whose statistics are over the batch.
    of_kinds: an advantage of several kinds of reward, `[K, ..., G]`.
  """

  tokenwise: bool = False
  ours: bool = False
  ranges: Mapping[str, Range] = {}
  arrays: tuple[str, ...] = ()
  how: str = ""
  needs_reference: bool = False
  of_response: bool = False
  by_length: bool = False
  denominator: str | None = None
  of_group: bool = False
  of_batch: bool = False
  of_kinds: bool = False


def traits_of(function: Any) -> Traits:
  """Looks up what was declared for a function, or for the one inside a partial."""
  while isinstance(function, functools.partial):
    function = getattr(function.func, "fun", function.func)  # what a Partial wraps a partial in
  # The owner is part of the mark: a wrapper that copied the attribute does not own it.
  owner, traits = getattr(function, _ATTRIBUTE, (None, Traits()))
  return traits if owner is function else Traits()


def is_ours(slot: Any) -> bool:
  """Tells whether a slot's function is the package's, and all functions that are bound to it.

  Then nothing that it closes over changes, so one compilation serves all calls.
  """
  bound = (*slot.args, *slot.keywords.values())
  return traits_of(slot).ours and all(is_ours(value) for value in bound if callable(value))


def declare(**traits: Any) -> Callable[[F], F]:
  """Decorates a function with what it is like."""

  def mark(function: F) -> F:
    setattr(function, _ATTRIBUTE, (function, traits_of(function)._replace(**traits)))
    return function

  return mark


def slot_function(**traits: Any) -> Callable[[F], F]:
  """Decorates a slot function of this package, whose numbers, by keyword, have ranges."""

  def mark(function: Callable) -> Any:
    parameters = inspect.signature(function).parameters.values()
    functions = {p.name for p in parameters if inspect.isfunction(p.default)}
    numbers = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in functions]
    ranges = ranges_of(function.__name__, numbers)

    @functools.wraps(function)
    def checked(*args: Any, **numbers: Any) -> Any:
      for name in ranges.keys() & numbers.keys():
        check_range(name, numbers[name], ranges[name])
      return function(*args, **numbers)

    return declare(ours=True, ranges=ranges, **traits)(checked)

  return mark


def tokenwise(function: F) -> F:
  """Declares that a function's value at a token depends on that token alone.

  That is: on the token's own log-ratio, advantage and rollout entries, and on numbers. Not on
  neighbouring tokens, other responses, statistics of the batch, or arrays and traced numbers that
  the function closes over: bind numbers with `functools.partial`. `linear_loss` computes loss and
  gradients in one pass if every function in the objective's loss is declared; a wrong declaration
  makes its gradient wrong.

  Args:
    function: a surrogate, level, divergence or correction; usable as a decorator.

  Returns:
    The same function.

  Raises:
    ValueError: if it is not a function, or an object that cannot carry the declaration.

  Example:
    >>> import jax.numpy as jnp
    >>> import gpo_jax as gpo
    >>> @gpo.tokenwise
    ... def soft_clip(log_ratio, advantages):
    ...   return jnp.tanh(log_ratio) * advantages
    >>> print(gpo.dapo().replace(surrogate=soft_clip))
    Objective(surrogate=soft_clip, level=token, advantage=standardize, weighting=token_mean)
  """
  if isinstance(function, functools.partial) or not callable(function):
    raise ValueError(
      f"function must be a function, declared before numbers are bound to it; got {function!r:.60}"
    )
  try:
    return declare(tokenwise=True)(function)
  except (AttributeError, TypeError) as error:
    raise ValueError(
      f"function cannot carry a declaration; got {function!r:.60}: wrap it in a def"
    ) from error
