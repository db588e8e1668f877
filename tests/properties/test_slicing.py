"""A batch may be sliced, shuffled or packed: the loss and the gradient stay.

Weights are data, computed once, so every slice adds up. The controls: a mean of means does not, nor
does a function of the user's that couples rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import advantages, surrogates, weightings
from tests.support.batches import (
  COVERING,
  PRESETS,
  batch,
  grpo_with,
  relative_error,
  value_and_grad,
)
from tests.support.packing import FIELDS, pack, unpack
from tests.support.quick import jit

WEIGHTINGS = {
  "token_mean": weightings.token_mean,
  "sequence_mean": weightings.sequence_mean,
  "sequence_sum": weightings.sequence_sum,
  "constant_length": functools.partial(weightings.constant_length, length=7.0),
  "token_sum": weightings.token_sum,
}
BATCH = batch(prompts=8)
GRPO = gpo.grpo()


def presets(*more):
  """Presets, of which these and the covering ones are quick."""
  slow = lambda name: () if name in (*COVERING, *more) else pytest.mark.slow
  return pytest.mark.parametrize("name", [pytest.param(n, marks=slow(n)) for n in PRESETS])


def whole(objective, data=BATCH):
  rollout = data.prepare(objective)
  return rollout, *value_and_grad(objective, data.log_probs, rollout)


def assert_same(value, gradient, expected_value, expected_gradient):
  np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-6)
  assert relative_error(gradient, expected_gradient) < 1e-5


def part(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


# --- microbatches --------------------------------------------------------------------------------
# Weights are data: an objective of another weighting is the same program.


@pytest.mark.parametrize("pieces", [2, 8])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_microbatches(name, pieces):
  rollout = BATCH.prepare(grpo_with(WEIGHTINGS[name]))
  slices = [slice(i, i + 8 // pieces) for i in range(0, 8, 8 // pieces)]
  results = [value_and_grad(GRPO, BATCH.log_probs[s], part(rollout, s)) for s in slices]
  joined = np.concatenate([g for _, g in results])
  expected = value_and_grad(GRPO, BATCH.log_probs, rollout)
  assert_same(sum(v for v, _ in results), joined, *expected)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_mean_of_means_is_something_else(name):
  objective = grpo_with(WEIGHTINGS[name])
  value, gradient = value_and_grad(GRPO, BATCH.log_probs, BATCH.prepare(objective))
  results = []
  for i in range(8):
    piece = type(BATCH)(**{k: v[i : i + 1] for k, v in vars(BATCH).items()})
    results.append(value_and_grad(GRPO, piece.log_probs, piece.prepare(objective)))
  mean = np.concatenate([g for _, g in results]) / 8
  assert relative_error(mean, gradient) > 0.05
  assert relative_error(np.mean([v for v, _ in results]), value) > 1e-3


@jit
def in_two(objective, log_probs, rollout):
  """Shares of one sample of each group, and of the three others."""
  shares = [(slice(None), slice(0, 1)), (slice(None), slice(1, 4))]
  one = jax.value_and_grad(lambda x, rollout: objective(x, rollout)[0])
  values, gradients = zip(*(one(*part((log_probs, rollout), share)) for share in shares))
  return values[0] + values[1], jnp.concatenate(gradients, axis=1)


@presets()
def test_samples_of_a_group_may_be_in_different_slices(name):
  rollout, *expected = whole(PRESETS[name])
  assert_same(*in_two(PRESETS[name], BATCH.log_probs, rollout), *expected)


@presets()
def test_order_of_prompts_and_samples(name):
  _, value, gradient = whole(PRESETS[name])
  rng = np.random.default_rng(0)
  rows = rng.permutation(8)[:, None], rng.permuted(np.tile(np.arange(4), (8, 1)), axis=1)
  shuffled = type(BATCH)(**{k: v[rows] for k, v in vars(BATCH).items()})
  _, other_value, other_gradient = whole(PRESETS[name], shuffled)
  assert_same(other_value, other_gradient, value, np.asarray(gradient)[rows])


@jit
def in_other_ways(log_probs, rollout):
  one = jax.value_and_grad(lambda x, rollout: GRPO(x, rollout)[0])
  step = lambda carry, xs: (carry + one(*xs)[0], one(*xs)[1])
  recomputed = jax.checkpoint(lambda x: GRPO(x, rollout)[0])
  return {
    "vmap": jax.vmap(one)(log_probs, rollout),
    "scan": jax.lax.scan(step, jnp.zeros(()), (log_probs, rollout)),
    "recomputed": jax.value_and_grad(recomputed)(log_probs),
  }


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_vmap_over_groups_and_scan_over_them(name):
  rollout = BATCH.prepare(grpo_with(WEIGHTINGS[name]))
  expected = value_and_grad(GRPO, BATCH.log_probs, rollout)
  for value, gradient in in_other_ways(BATCH.log_probs, rollout).values():
    assert_same(jnp.sum(value), gradient, *expected)


# --- functions that couple rows ------------------------------------------------------------------


def over_the_batch(log_ratio, advantages):
  """The ratio, divided by its mean over whatever it is shown."""
  ratio = jnp.exp(log_ratio)
  return ratio / jax.lax.stop_gradient(jnp.mean(ratio)) * advantages


def shares_of(objective, rollout):
  slices = [slice(0, 2), slice(2, 8)]
  results = [value_and_grad(objective, BATCH.log_probs[s], part(rollout, s)) for s in slices]
  return sum(v for v, _ in results), np.concatenate([g for _, g in results])


def test_a_function_of_the_batch_does_not_add_up_and_as_a_factor_computed_once_it_does():
  ratio = gpo.dapo().replace(surrogate=surrogates.importance_weighted)
  coupled = ratio.replace(surrogate=over_the_batch)
  rollout, *expected = whole(coupled)
  value, gradient = shares_of(coupled, rollout)
  assert relative_error(value, expected[0]) > 5e-3
  assert relative_error(gradient, expected[1]) > 5e-3

  log_ratio = jnp.where(rollout.mask, BATCH.log_probs - rollout.old_log_probs, 0)
  factor = jnp.full(rollout.mask.shape, 1 / jnp.mean(jnp.exp(log_ratio)))
  assert_same(*shares_of(ratio, rollout.replace(factor=factor)), *expected)


# --- packing -------------------------------------------------------------------------------------


def packed_rollout(objective, packed):
  packed = dict(packed)
  log_probs = packed.pop("log_probs")
  first = [packed.pop(name) for name in ("rewards", "mask", "old_log_probs")]
  return log_probs, objective.prepare(*first, **packed)


@pytest.mark.quick("deepseek_v32", "gmpo")
@presets("r1", "gmpo", "gspo_token", "reinforce_plus_plus")
def test_packed_rows(name):
  objective = PRESETS[name]
  if name == "cispo":
    objective = objective.replace(corrections=(gpo.corrections.truncate_importance,))
  data = batch(prompts=4, length=5, seed=3)
  _, value, gradient = whole(objective, data)
  packed, place = pack(data, rows=4)
  if name == "reinforce_plus_plus":  # its group is the batch
    packed.pop("group_ids")
  packed_value, packed_gradient = value_and_grad(objective, *packed_rollout(objective, packed))
  assert_same(packed_value, unpack(packed_gradient, place, 5), value, gradient)
  assert np.count_nonzero(packed_gradient) == np.count_nonzero(gradient)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_packed_weights(name):
  data = batch(prompts=4, length=5, seed=4)
  packed, place = pack(data, rows=4)
  expected = WEIGHTINGS[name](data.mask)
  weights = WEIGHTINGS[name](packed["mask"], packed["segment_ids"])
  np.testing.assert_allclose(unpack(weights, place, 5), expected, rtol=1e-6)
  np.testing.assert_allclose(jnp.sum(weights), jnp.sum(expected), rtol=1e-6)


def with_tools(data, after=2, length=3):
  """Inserts what a tool said, masked and garbage, after the second token of every response."""

  def insert(x, garbage):
    said = np.full((*x.shape[:-1], length), garbage, x.dtype)
    return np.concatenate([x[..., :after], said, x[..., after:]], axis=-1)

  fields = {name: insert(getattr(data, name), np.nan) for name in FIELDS}
  return dataclasses.replace(data, mask=insert(data.mask, False), **fields)


@pytest.mark.parametrize("ids", ["of_the_response", "zero", "garbage"])
@pytest.mark.parametrize("name", ["gspo", "deepseek_v32", "r1"])
def test_tool_tokens_in_packed_rows_are_as_if_they_were_not_there(name, ids):
  data = batch(prompts=2, length=5, seed=6)
  _, value, gradient = whole(PRESETS[name], data)
  packed, place = pack(with_tools(data), rows=4)
  if ids != "of_the_response":
    given = packed["segment_ids"]
    garbage = np.random.default_rng(0).integers(-9, 9, given.shape)
    packed["segment_ids"] = np.where(packed["mask"], given, 0 if ids == "zero" else garbage)
  packed_value, found = value_and_grad(PRESETS[name], *packed_rollout(PRESETS[name], packed))
  found = unpack(found, place, 8)
  assert not np.any(found[..., 2:5])
  assert_same(packed_value, np.delete(found, slice(2, 5), axis=-1), value, gradient)


ADVANTAGES = {
  "center": advantages.center,
  "standardize": advantages.standardize,
  "leave_one_out": advantages.leave_one_out,
  "batch_standardize": advantages.batch_standardize,
  "max_rl": advantages.max_rl,
  "pass_at_k": advantages.pass_at_k,
}


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_masked_response_may_have_a_nan_for_a_reward(name, layout):
  objective = gpo.grpo().replace(advantage=ADVANTAGES[name])
  data = batch(prompts=4, length=5, seed=3)
  mask = data.mask.copy()
  mask[2, 1] = False

  def run(reward):
    rewards = data.rewards.copy()
    rewards[0, 0] = rewards[2, 1] = reward  # the first response is empty as it is
    changed = dataclasses.replace(data, mask=mask, rewards=rewards)
    if layout == "rows":
      return changed.log_probs, changed.prepare(objective)
    packed, _ = pack(changed, rows=4)
    if name == "batch_standardize":
      packed.pop("group_ids")
    return packed_rollout(objective, packed)

  expected = value_and_grad(GRPO, *run(0.5))
  assert np.isfinite(expected[0])
  jax.tree.map(np.testing.assert_array_equal, value_and_grad(GRPO, *run(np.nan)), expected)
