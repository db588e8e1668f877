"""How an objective is compiled where nothing around it is."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import corrections, evaluation, levels, surrogates
from tests.support.batches import batch

BATCH = batch()


def programs(objective, *, calls=2):
  """Counts the programs that are kept of calls outside of `jax.jit`."""
  rollout = BATCH.prepare(objective)
  before = evaluation._compiled._cache_size()
  results = [objective(BATCH.log_probs, rollout) for _ in range(calls)]
  np.testing.assert_array_equal(*(loss for loss, _ in results))
  return evaluation._compiled._cache_size() - before


@pytest.mark.parametrize("beta", [0.123, 0.456])
def test_the_packages_functions_are_compiled_once_whatever_their_numbers(beta):
  objective = gpo.cispo(high=2.5 + beta).replace(level=levels.sequence_token)
  assert programs(objective) == (1 if beta == 0.123 else 0)


def test_a_users_function_is_called_in_each_call_with_what_it_closes_over_then():
  scale, plain = [1.0], gpo.dapo()
  objective = plain.replace(surrogate=lambda x, a: scale[0] * surrogates.clip(x, a))
  rollout = BATCH.prepare(plain)
  once = objective(BATCH.log_probs, rollout)[1].surrogate
  scale[0] = 3.0
  thrice = objective(BATCH.log_probs, rollout)[1].surrogate
  np.testing.assert_allclose(3 * once, thrice, rtol=1e-6)
  assert np.any(once != 0)
  assert programs(objective) == 0


def test_a_users_function_bound_to_one_of_the_packages_is_a_users():
  level = lambda x, rollout: levels.token(x, rollout)
  bound = functools.partial(corrections.mask_importance, low=0.5, high=2.0, level=level)
  theirs = gpo.dapo().replace(corrections=(bound,))
  ours = gpo.dapo().replace(corrections=(functools.partial(bound, level=levels.token),))
  assert not evaluation.is_all_ours(theirs)
  assert evaluation.is_all_ours(ours)


def test_a_slot_is_compiled_if_it_is_the_packages():
  seen = []
  center = gpo.advantages.center
  own = gpo.dapo().replace(
    advantage=lambda rewards, where: seen.append(1) or center(rewards, where)
  )
  rewards = jnp.array([[1.0, 0.0]])
  for _ in range(2):
    own.prepare(rewards, jnp.ones((1, 2, 3)))
  assert len(seen) == 2
