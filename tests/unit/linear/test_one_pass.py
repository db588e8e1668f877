"""The rule that chooses one pass: every function declared, and bound to numbers only."""

import copy
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import corrections, levels, surrogates
from gpo_jax.linear.one_pass import is_enough
from tests.support import linear
from tests.support.batches import PRESETS
from tests.support.linear import (
  BIAS,
  HIDDEN,
  MASK,
  UNEMBEDDING,
  assert_same,
  from_hidden,
  from_logits,
  near,
  products,
  step,
)

RESPONSES = {"gspo", "gspo_token", "gmpo", "deepseek_v32", "r1", "vespo", "luspo", "topr"}


@pytest.mark.parametrize("name", PRESETS)
def test_one_pass_is_enough_for_presets_of_tokens(name):
  assert is_enough(PRESETS[name]) == (name not in RESPONSES)


@functools.wraps(surrogates.importance_weighted)
def by_the_batch(log_ratio, advantages):
  ratio = jnp.exp(log_ratio)
  return ratio / jnp.mean(ratio) * advantages


@functools.wraps(surrogates.clip)
def by_neighbours(log_ratio, advantages):
  return surrogates.clip(log_ratio + jnp.roll(log_ratio, 1, -1), advantages)


def forged(log_ratio, advantages):
  return jnp.exp(jnp.cumsum(log_ratio, -1)) * advantages


forged.__module__, forged.__qualname__, forged.__name__ = "gpo_jax.surrogates", "clip", "clip"
vars(forged).update(vars(surrogates.clip))  # the mark too


def copied(function):
  made = types.FunctionType(
    function.__code__, function.__globals__, "clip", None, function.__closure__
  )
  made.__kwdefaults__ = function.__kwdefaults__
  vars(made).update(vars(function))
  return made


class Callable:
  """An object with a copy of the mark."""

  def __init__(self):
    vars(self).update(vars(surrogates.importance_weighted))

  def __call__(self, log_ratio, advantages):
    return jnp.exp(log_ratio - jnp.mean(log_ratio)) * advantages


DISCOUNT = jnp.asarray(np.random.default_rng(0).random(MASK.shape), jnp.float32)
UNDECLARED = {
  "wraps_a_function_of_the_batch": {"surrogate": by_the_batch},
  "wraps_a_function_of_neighbours": {"surrogate": by_neighbours},
  "wraps_in_a_partial": {"surrogate": functools.partial(by_the_batch)},
  "forged_module": {"surrogate": forged},
  "copied": {"surrogate": copied(surrogates.clip)},
  "callable_object": {"surrogate": Callable()},
  "lambda": {"surrogate": lambda x, a: jnp.exp(x - jnp.mean(x)) * a},
  "closes_over_an_array": {"surrogate": lambda x, a: DISCOUNT * jnp.exp(x) * a},
  "bound_array": {
    "surrogate": functools.partial(gpo.tokenwise(lambda x, a, *, d: d * x * a), d=DISCOUNT)
  },
  "level": {"level": lambda x, rollout: x - jnp.mean(x, -1, keepdims=True)},
  "divergence": {"divergence": lambda r, d, rollout: jnp.cumsum(r**2, -1)},
  "divergence_without_reference": {"divergence": lambda *_: DISCOUNT},
  "correction": {
    "corrections": (lambda x, rollout: jnp.exp(jnp.mean(x, -1, keepdims=True)) * jnp.ones_like(x),)
  },
  "level_of_a_correction": {
    "corrections": (
      functools.partial(corrections.truncate_importance, cap=2.0, level=levels.sequence),
    )
  },
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_what_is_not_declared_takes_two_passes(name):
  assert is_enough(gpo.grpo())
  assert not is_enough(gpo.grpo().replace(**UNDECLARED[name]))


# Of these the gradient depends on other tokens: one pass would be wrong.
@pytest.mark.quick("wraps_a_function_of_the_batch", "callable_object", "bound_array")
@pytest.mark.parametrize("name", UNDECLARED)
def test_its_gradient_is_that_of_the_full_logits(name):
  objective = gpo.grpo().replace(**UNDECLARED[name])
  arguments = (objective, HIDDEN, UNEMBEDDING, BIAS, near("grpo"))
  how = {"argnums": (1, 2, 3)}
  found = step(from_hidden, tiling=gpo.Tiling(50, 56), **how)(*arguments)
  wanted = step(from_logits, **how)(*arguments)
  assert_same((found[0][0], found[1]), (wanted[0][0], wanted[1]), 2e-5)


@pytest.mark.parametrize("surrogate", [by_the_batch, by_neighbours])
def test_a_wrong_declaration_would_make_it_wrong(surrogate):
  """The control: what these functions would get in one pass is not their gradient."""
  lie = gpo.tokenwise(lambda log_ratio, advantages: surrogate(log_ratio, advantages))
  objective = gpo.dapo().replace(surrogate=lie)
  assert is_enough(objective)
  arguments = (objective, HIDDEN, UNEMBEDDING, BIAS, near("dapo"))
  found, wanted = (
    step(f, argnums=2)(*arguments)[1]
    for f in (functools.partial(from_hidden, tiling=gpo.Tiling(50)), from_logits)
  )
  assert linear.relative_error(found, wanted) > 0.01


@gpo.tokenwise
def soft(log_ratio, advantages, *, width=1.0, times=1):
  for _ in range(times):
    log_ratio = width * jnp.tanh(log_ratio / width)
  return log_ratio * advantages


DECLARED = {
  "declared": {"surrogate": soft},
  "numbers_bound": {"surrogate": functools.partial(soft, width=0.5)},
  "partial_of_partial": {"surrogate": functools.partial(functools.partial(soft), width=0.5)},
  "ours_with_numbers": {"surrogate": functools.partial(surrogates.clip, epsilon_low=0.1)},
  "correction_of_tokens": {
    "corrections": (functools.partial(corrections.truncate_importance, cap=2.0),)
  },
  "shallow_copy": {"surrogate": copy.copy(surrogates.clip)},  # the same object
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_declared_takes_one(name):
  assert is_enough(gpo.grpo().replace(**DECLARED[name]))


def test_a_tokenwise_function_may_read_the_segment_ids():
  """They are an entry of the rollout, of a token."""

  @gpo.tokenwise
  def of_the_first(log_probs, rollout):
    return jnp.where(rollout.segment_ids == 1, 1.0, 0.5) + 0 * log_probs

  objective = gpo.gpg().replace(corrections=(of_the_first,))
  assert is_enough(objective)
  ids = jnp.broadcast_to(jnp.where(jnp.arange(MASK.shape[-1]) < 3, 1, 2), MASK.shape)
  rewards = jnp.arange(2.0 * ids[..., 0].size).reshape(*MASK.shape[:-1], 2) % 5
  rollout = objective.prepare(rewards, MASK, segment_ids=ids)
  state = (HIDDEN, UNEMBEDDING, BIAS)
  found, wanted = (
    linear.jit(jax.grad(lambda *state, of=of: of(objective, *state, rollout)[0], (0, 1, 2)))(*state)
    for of in (from_hidden, from_logits)
  )
  assert_same(found, wanted, 2e-5)


def test_what_is_declared_has_the_gradient_of_the_full_logits():
  """Of its numbers too; an integer stays a number of Python."""
  rollout = near("grpo")

  def both(width, times):
    surrogate = functools.partial(soft, width=width, times=times)
    objective = gpo.grpo().replace(surrogate=surrogate)
    state = (HIDDEN, UNEMBEDDING, BIAS)

    def gradients(of):
      loss = lambda width, *state: of(width, *state)
      return linear.jit(jax.grad(loss, (0, 1, 2, 3)))(width, *state)

    def loss(of, width, *state):
      changed = objective.replace(surrogate=functools.partial(soft, width=width, times=times))
      return of(changed, *state, rollout)[0]

    return (gradients(functools.partial(loss, of)) for of in (from_hidden, from_logits))

  for times in (0, 2):
    found, wanted = both(0.5, times)
    assert_same(found, wanted, 2e-5)


@pytest.mark.quick("declared")
@pytest.mark.parametrize("declared", [False, True], ids=["undeclared", "declared"])
def test_integers_and_bools_stay_what_they_are(declared):
  seen = []

  def surrogate(log_ratio, advantages, *, count, flip):
    seen.append((count, flip))
    return log_ratio * advantages if flip else -log_ratio * advantages

  surrogate = gpo.tokenwise(surrogate) if declared else surrogate
  bound = functools.partial(surrogate, count=2**24 + 1, flip=True)
  objective = gpo.dapo().replace(surrogate=bound)
  assert is_enough(objective) == declared
  rollout = objective.prepare([[1.0, 0.0]], jnp.ones((1, 2, 16)))
  loss = lambda h: gpo.linear_loss(objective, h, SMALL[1], SMALL[2], rollout)[0]
  for call in (loss, jax.grad(loss)):
    seen.clear()
    assert jnp.isfinite(call(SMALL[0])).all()
    assert seen
    assert all(type(count) is int and count == 2**24 + 1 for count, _ in seen)
    assert all(flip is True for _, flip in seen)


def test_numbers_bound_to_ours_do_not_hide_arrays():
  with pytest.raises(ValueError, match="epsilon_low must be a scalar"):
    gpo.dapo().replace(surrogate=functools.partial(surrogates.clip, epsilon_low=DISCOUNT))


KINDS = {
  "one_pass": (gpo.dapo(), False),
  "declared": (gpo.dapo().replace(surrogate=soft), False),
  "two_passes": (gpo.gspo(), True),
  "wraps": (gpo.dapo().replace(surrogate=by_the_batch), True),
}
SMALL = jnp.ones((1, 2, 16, 8)), jnp.ones((64, 8)), jnp.zeros((1, 2, 16), int)


@pytest.mark.quick("one_pass", "wraps")
@pytest.mark.parametrize("kind", KINDS)
def test_matrix_products(kind):
  """Three in one pass, four in two; one less each for what is frozen, and one for no gradient."""
  objective, again = KINDS[kind]
  rollout = objective.prepare([[1.0, 0.0]], jnp.ones((1, 2, 16)))
  # With one tile the compiler would find that the logits of both passes are the same.
  how = {"tiling": gpo.Tiling(tile_size=16)}
  loss = lambda h, w: gpo.linear_loss(objective, h, w, SMALL[2], rollout, **how)[0]
  assert products(jax.grad(loss, argnums=(0, 1)), *SMALL[:2]) == 3 + again
  assert products(jax.grad(loss, argnums=0), *SMALL[:2]) == 2 + again
  if kind in ("one_pass", "two_passes"):
    assert products(jax.grad(loss, argnums=1), *SMALL[:2]) == 2 + again
    assert products(loss, *SMALL[:2]) == 1
