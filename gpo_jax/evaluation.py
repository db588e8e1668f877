"""The equation of an objective, evaluated from clean inputs, and how it is compiled.

loss = Σ_t weight_t (−factor_t surrogate(level(log_ratio))_t + β divergence_t)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpo_jax._inputs import check_returned
from gpo_jax._numerics import bound
from gpo_jax._padding import clean
from gpo_jax._slots import check_numbers, check_scalar, describe
from gpo_jax.traits import is_ours, traits_of
from gpo_jax.types import Rollout, Terms

Slots = Any  # an `Objective`, of which this layer knows what is in the loss


def evaluate_terms(slots: Slots, log_probs: jax.Array, rollout: Rollout) -> Terms:
  """Evaluates the equation, from clean inputs."""
  fixed = jax.lax.stop_gradient(log_probs)
  old, ref = rollout.old_log_probs, rollout.ref_log_probs
  token_log_ratio = log_probs - (fixed if old is None else old)
  log_ratio = bound(slots.level(token_log_ratio, rollout))
  token_log_ratio = bound(token_log_ratio)
  surrogate, gate = jax.jvp(
    lambda x: slots.surrogate(x, rollout.advantages), (log_ratio,), (jnp.ones_like(log_ratio),)
  )
  factors = [correction(fixed, rollout) for correction in slots.corrections]
  factors += [] if rollout.factor is None else [rollout.factor]
  factor = functools.reduce(jnp.multiply, factors) if factors else None
  loss = -surrogate if factor is None else -factor * surrogate
  divergence = None
  if slots.divergence is not None and slots.beta is not None:
    ref_log_ratio = None if ref is None else bound(log_probs - ref)
    divergence = slots.divergence(ref_log_ratio, token_log_ratio, rollout)
    loss = loss + slots.beta * divergence
  return Terms(loss, surrogate, gate, log_ratio, token_log_ratio, divergence, factor)


def evaluate(slots: Slots, log_probs: jax.Array, rollout: Rollout) -> tuple[jax.Array, Terms]:
  """Evaluates the loss and its terms, from clean inputs."""
  terms = evaluate_terms(slots, log_probs, rollout)
  loss = jnp.sum(jnp.where(rollout.mask, rollout.weights * terms.loss, 0))
  return loss, jax.lax.stop_gradient(terms)


def call(slot: Any, *arguments: Any) -> Any:
  """Calls a slot's function, compiled if it is the package's."""
  return (_compiled_call if is_ours(slot) else _plain_call)(slot, *arguments)


def _plain_call(slot: Any, *arguments: Any) -> Any:
  return slot(*arguments)


_compiled_call = jax.jit(_plain_call)


def run(function: Callable, slots: Slots, log_probs: jax.Array, rollout: Rollout) -> Any:
  """Evaluates, compiled once if all functions are the package's.

  For a function that it knows, JAX uses the program of an earlier call, and with it what the
  function closed over then: a user's function is traced again in each call.
  """
  evaluation = _compiled if is_all_ours(slots) else _recomputed
  return evaluation(function, slots, log_probs, rollout)


def _recomputed(function: Callable, slots: Slots, log_probs: jax.Array, rollout: Rollout) -> Any:
  """Recomputes a token's slope in the backward pass on CPUs: cheaper than storing what it needs.

  Compilers for accelerators fuse both passes, if nothing keeps them apart.
  """
  plain = lambda log_probs, rollout: function(slots, log_probs, rollout)  # noqa: E731
  return jax.lax.platform_dependent(log_probs, rollout, cpu=jax.checkpoint(plain), default=plain)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(function: Callable, slots: Slots, *arguments: Any) -> Any:
  return _recomputed(jax.jit(function), slots, *arguments)  # both branches share one trace


def is_all_ours(slots: Slots) -> bool:
  """Tells whether all functions in the loss are the package's."""
  return all(map(is_ours, in_loss(slots)))


def in_loss(slots: Slots) -> list[Any]:
  """Lists the slots whose functions the loss is made of."""
  functions = (slots.surrogate, slots.level, slots.divergence, *slots.corrections)
  return [function for function in functions if function is not None]


def enter(slots: Slots, log_probs: Any, rollout: Rollout) -> tuple[Slots, jax.Array, Rollout]:
  """Checks and cleans what an objective is evaluated on; numbers get the log-probs' dtype."""
  log_probs, rollout = clean(log_probs, rollout)
  slots = as_slots(slots, log_probs.dtype)
  if traits_of(slots.divergence).needs_reference and rollout.ref_log_probs is None:
    raise ValueError(
      f"divergence={describe(slots.divergence)} needs rollout.ref_log_probs: pass "
      "ref_log_probs= to prepare, or use an objective with divergence=None and beta=None"
    )
  if not is_all_ours(slots):
    _check_returns(slots, log_probs, rollout)
  return slots, log_probs, rollout


def as_slots(slots: Slots, dtype: Any) -> Slots:
  """Checks an objective's numbers and converts its floats to a dtype."""
  for slot in in_loss(slots):
    check_numbers(slot)
  check_scalar("beta", slots.beta)
  is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)  # noqa: E731
  return jax.tree.map(lambda x: jnp.asarray(x, dtype) if is_float(x) else x, slots)


def _check_returns(slots: Slots, log_probs: jax.Array, rollout: Rollout) -> None:
  """Checks that each slot returns one float per token, by tracing it once more."""

  def check(name: str, slot: Any, *args: Any) -> None:
    value = jax.eval_shape(lambda *args: slot(*args), *args)
    check_returned(name, value, log_probs.shape, "token", log_probs.dtype)

  check("level", slots.level, log_probs, rollout)
  check("surrogate", slots.surrogate, log_probs, rollout.advantages)
  for correction in slots.corrections:
    check(f"corrections: {describe(correction)}", correction, log_probs, rollout)
  if slots.divergence is not None:
    ref_log_ratio = None if rollout.ref_log_probs is None else log_probs
    try:
      check("divergence", slots.divergence, ref_log_ratio, log_probs, rollout)
    except TypeError as error:
      if ref_log_ratio is not None:
        raise
      raise ValueError(
        f"divergence={describe(slots.divergence)} failed without a reference policy, when "
        f"ref_log_ratio is None: pass ref_log_probs= to prepare ({error})"
      ) from error
