"""`reject` beside what other trainers reject, and what a dropped token does to denominators."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from gpo_jax import Rollout, corrections, divergences, levels, weightings
from gpo_jax.linear import one_pass
from tests.support.batches import batch

BATCH = batch(seed=3)
MASK = BATCH.mask
LOG_W = np.asarray(BATCH.old_log_probs, float) - BATCH.sampler_log_probs  # log π_old/μ
ROLLOUT = BATCH.prepare(gpo.dapo())
LOG = math.log
k1, k2, k3 = divergences.k1, divergences.k2, divergences.k3

# --- every option of others, from their definitions, in float64 ----------------------------------

KINDS = {"k1": lambda x: -x, "k2": lambda x: x**2 / 2, "k3": lambda x: np.exp(x) - 1 - x}
REDUCTIONS = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}


def kept(of_token, reduction, low, high):
  """Keeps tokens, or responses by a statistic of their tokens, a response at a time."""
  result = np.ones(MASK.shape, bool)
  for place in np.ndindex(MASK.shape[:2]):
    at = MASK[place]
    if at.any():
      value = of_token(LOG_W[place][at])
      value = value if reduction is None else REDUCTIONS[reduction](value)
      result[place][at] = (value >= low) & (value <= high)
  return result


def verl(option, low, high):
  """`rollout_rs`: bounds of k1 are of μ/π_old, those of k2 and k3 of the statistic."""
  *level, kind = option.split("_")
  bounds = (LOG(low), LOG(high)) if kind == "k1" else (low, high)
  return kept(KINDS[kind], None if level == ["token"] else level[-1], *bounds)


def ratio(level, low, high):
  """slime, Miles, NeMo-RL, OpenRLHF: bounds are of π_old/μ, of its product or geometric mean."""
  return kept(np.asarray, level, LOG(low), LOG(high))


NO = -math.inf
by_k1 = {"statistic": k1}
# What it is called there: how we write it, and what is kept there.
OPTIONS = {
  "verl token_k1 0.8_1.3": (
    {"low": LOG(0.8), "high": LOG(1.3), **by_k1},
    verl("token_k1", 0.8, 1.3),
  ),
  "verl token_k2 0.05": ({"high": 0.05, "statistic": k2}, verl("token_k2", NO, 0.05)),
  "verl token_k3 0.05": ({"high": 0.05, "statistic": k3}, verl("token_k3", NO, 0.05)),
  "verl seq_sum_k1 0.5_1.2": (
    {"low": LOG(0.5), "high": LOG(1.2), **by_k1, "level": levels.sequence_product},
    verl("seq_sum_k1", 0.5, 1.2),
  ),
  "verl seq_sum_k2 0.1": (
    {"high": 0.1, "statistic": k2, "level": levels.sequence_product},
    verl("seq_sum_k2", NO, 0.1),
  ),
  "verl seq_sum_k3 0.1": (
    {"high": 0.1, "statistic": k3, "level": levels.sequence_product},
    verl("seq_sum_k3", NO, 0.1),
  ),
  "verl seq_mean_k1 0.9_1.2": (
    {"low": LOG(0.9), "high": LOG(1.2), **by_k1, "level": levels.sequence},
    verl("seq_mean_k1", 0.9, 1.2),
  ),
  "verl seq_mean_k2 0.05": (
    {"high": 0.05, "statistic": k2, "level": levels.sequence},
    verl("seq_mean_k2", NO, 0.05),
  ),
  "verl seq_mean_k3 0.05": (
    {"high": 0.05, "statistic": k3, "level": levels.sequence},
    verl("seq_mean_k3", NO, 0.05),
  ),
  "verl seq_max_k2 0.1": (
    {"high": 0.1, "statistic": k2, "level": levels.sequence_max},
    verl("seq_max_k2", NO, 0.1),
  ),
  "verl seq_max_k3 0.1": (
    {"high": 0.1, "statistic": k3, "level": levels.sequence_max},
    verl("seq_max_k3", NO, 0.1),
  ),
  "veto 0.7": (
    {"high": -LOG(0.7), **by_k1, "level": levels.sequence_max},
    kept(np.asarray, "min", LOG(0.7), math.inf),
  ),
  "slime rs_level=token": ({"low": -LOG(1.3), "high": -LOG(0.8), **by_k1}, ratio(None, 0.8, 1.3)),
  "slime rs_level=sequence": (
    {"low": -LOG(1.5), "high": -LOG(0.6), **by_k1, "level": levels.sequence_product},
    ratio("sum", 0.6, 1.5),
  ),
  "slime rs_level=geometric": (
    {"low": -LOG(1.1), "high": -LOG(0.8), **by_k1, "level": levels.sequence},
    ratio("mean", 0.8, 1.1),
  ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_another_trainer(option):
  numbers, expected = OPTIONS[option]
  found = np.asarray(corrections.reject(BATCH.log_probs, ROLLOUT, **numbers))
  np.testing.assert_array_equal(found[MASK], expected[MASK])
  assert 0 < expected[MASK].mean() < 1


@pytest.mark.parametrize("option", [name for name in OPTIONS if "low" in OPTIONS[name][0]])
def test_bounds_of_a_ratio_copied_for_its_inverse_reject_others(option):
  numbers, expected = OPTIONS[option]
  copied = {**numbers, "low": -numbers["high"], "high": -numbers["low"]}
  found = np.asarray(corrections.reject(BATCH.log_probs, ROLLOUT, **copied))
  assert np.any(found[MASK] != expected[MASK])


WRONG = {
  "k3 reversed": ("verl token_k3 0.05", {"statistic": lambda d, *_: jnp.exp(d) - d - 1}),
  "k2 not halved": ("verl token_k2 0.05", {"statistic": lambda d, *_: d**2}),
  "sum for mean": ("verl seq_mean_k3 0.05", {"level": levels.sequence_product}),
  "mean for sum": ("verl seq_sum_k3 0.1", {"level": levels.sequence}),
  "mean for max": ("verl seq_max_k2 0.1", {"level": levels.sequence}),
  "token for response": ("verl seq_max_k3 0.1", {"level": levels.token}),
  "best for worst token": ("veto 0.7", {"statistic": lambda d, *_: -d}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_statistic_or_level_rejects_others(wrong):
  option, change = WRONG[wrong]
  numbers, expected = OPTIONS[option]
  found = np.asarray(corrections.reject(BATCH.log_probs, ROLLOUT, **(numbers | change)))
  assert np.any(found[MASK] != expected[MASK])


def test_a_limit_itself_is_kept_and_the_current_policy_stands_for_the_old_one():
  one, sampler = jnp.ones((1, 3)), jnp.array([[-1.0, -1.5, -2.0]])
  rollout = Rollout(advantages=one, mask=one, weights=one, sampler_log_probs=sampler)
  found = corrections.reject(-jnp.ones((1, 3)), rollout, low=-0.5, high=0.0, **by_k1)
  np.testing.assert_array_equal(found, [[1, 1, 0]])
  with pytest.raises(ValueError, match=r"reject needs rollout.sampler_log_probs"):
    corrections.reject(one, rollout.replace(sampler_log_probs=None), high=1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("level", [levels.token, levels.sequence, levels.sequence_max])
def test_what_the_sampler_reports_is_hidden_only_if_it_is_masked(bad, level):
  one = jnp.ones((2, 3))
  mask = jnp.array([[1, 1, 0], [1, 1, 1]])
  for place, loud in (((0, 2), False), ((1, 1), True)):
    sampler = jnp.full((2, 3), -1.0).at[place].set(bad)
    rollout = Rollout(
      advantages=one, mask=mask, weights=one, old_log_probs=-one, sampler_log_probs=sampler
    )
    found = corrections.reject(-one, rollout, high=0.1, level=level)
    assert bool(jnp.isnan(jnp.where(mask == 1, found, 0)).any()) == loud


def test_packed_responses_are_rejected_one_by_one():
  ids = jnp.array([[1, 1, 1, 2, 2, 3]])
  log_w = jnp.array([[0.1, 0.9, 0.0, 0.2, -0.1, 1.5]])
  one, mask = jnp.ones((1, 6)), jnp.array([[1, 0, 1, 1, 1, 1]])
  rollout = Rollout(
    advantages=one, mask=mask, weights=one, segment_ids=ids, sampler_log_probs=-log_w
  )
  found = corrections.reject(
    0 * one, rollout, low=-0.3, high=0.05, **by_k1, level=levels.sequence_max
  )
  np.testing.assert_array_equal(found, [[1, 1, 1, 0, 0, 0]])


@pytest.mark.quick("AxisType.Explicit")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_rows_on_eight_devices(axis_type):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  objective = gpo.dapo().replace(
    corrections=tuple(
      partial(corrections.reject, high=0.06, level=level)
      for level in (levels.token, levels.sequence, levels.sequence_max)
    )
  )
  wide = batch(prompts=8, seed=3)
  loss = jax.jit(lambda x, rollout: objective(x, rollout)[0])
  expected = loss(wide.log_probs, wide.prepare(objective))
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    data = jax.tree.map(place, (wide.log_probs, wide.prepare(objective)))
    np.testing.assert_allclose(loss(*data), expected, rtol=1e-6)


def test_reject_of_tokens_needs_one_pass():
  objective = lambda **numbers: gpo.dapo().replace(
    corrections=(partial(corrections.reject, high=0.1, **numbers),)
  )
  assert one_pass.is_enough(objective())
  assert one_pass.is_enough(objective(statistic=k2, level=levels.token))
  assert not one_pass.is_enough(objective(level=levels.sequence_max))
  assert not one_pass.is_enough(objective(statistic=lambda d, *_: d))


# --- denominators --------------------------------------------------------------------------------


def losses_of(objective, rollout, x):
  """The unreduced losses, from the objective's own definition."""
  return np.asarray(objective.losses(x, rollout), float)


def test_dropped_tokens_keep_their_share_or_leave_the_denominator():
  objective, x = gpo.dapo(), BATCH.log_probs
  rollout = BATCH.prepare(objective)
  keep = corrections.reject(x, rollout, high=0.03)
  left = np.asarray(MASK & (keep != 0))
  assert 0 < left.sum() < MASK.sum()
  plain = losses_of(objective, rollout, x)
  loss = jax.jit(lambda x, rollout: objective(x, rollout)[0])

  by_default = objective.replace(corrections=(partial(corrections.reject, high=0.03),))
  as_data = rollout.replace(factor=keep)
  for value in (jax.jit(lambda: by_default(x, rollout)[0])(), loss(x, as_data)):
    np.testing.assert_allclose(value, plain[left].sum() / MASK.sum(), rtol=1e-5)

  # The one line of the other convention.
  other = rollout.replace(
    factor=keep, weights=objective.weighting(rollout.mask & (keep != 0), rollout.segment_ids)
  )
  np.testing.assert_allclose(loss(x, other), plain[left].mean(), rtol=1e-5)
  gradient = jax.grad(loss)(x, other)
  frozen = jax.grad(loss)(x, rollout) * float(MASK.sum() / left.sum())
  np.testing.assert_allclose(gradient, np.where(left, frozen, 0), rtol=1e-5, atol=1e-9)
  # A factor that is NaN is not hidden by it.
  loud = other.replace(factor=keep.at[0, 1, 0].set(jnp.nan))
  assert MASK[0, 1, 0]
  assert jnp.isnan(loss(x, loud))


def test_a_rejected_response_stays_in_its_groups_statistics_or_leaves_them():
  objective, rewards = gpo.dapo(), np.array([[1.0, 0.0, 0.0, 1.0]])
  mask = np.ones((1, 4, 2), bool)
  keep = jnp.ones(mask.shape).at[0, 3].set(0)
  # As in verl: advantages of all four, weights of what is left.
  stays = objective.prepare(rewards, mask)
  stays = stays.replace(weights=objective.weighting(stays.mask & (keep != 0)), factor=keep)
  np.testing.assert_allclose(stays.advantages[0, :, 0], [0.866, -0.866, -0.866, 0.866], atol=3e-4)
  # As part of the mask: the group has three.
  leaves = objective.prepare(rewards, mask & (keep != 0))
  np.testing.assert_allclose(leaves.advantages[0, :, 0], [1.155, -0.577, -0.577, 0], atol=5e-4)
  np.testing.assert_array_equal(stays.weights, leaves.weights)


def test_weights_normalised_to_a_mean_of_1():
  objective = gpo.dapo()
  rollout = BATCH.prepare(objective)
  w = corrections.truncate_importance(BATCH.old_log_probs, rollout, cap=1.2)
  raw = np.minimum(np.exp(LOG_W), 1.2)
  factor = w / jnp.mean(w, where=rollout.mask)
  np.testing.assert_allclose(factor[MASK], (raw / raw[MASK].mean())[MASK], rtol=1e-5)
  # Of responses: one weight each, whatever their lengths.
  product = partial(corrections.truncate_importance, level=levels.sequence_product, cap=1.2)
  w = product(BATCH.old_log_probs, rollout)
  factor = w / jnp.sum(w * weightings.sequence_mean(rollout.mask), where=rollout.mask)
  there = MASK.any(-1)
  each = np.minimum(np.exp(np.sum(LOG_W, -1, where=MASK)), 1.2)
  expected = np.broadcast_to((each / each[there].mean())[..., None], MASK.shape)
  np.testing.assert_allclose(factor[MASK], expected[MASK], rtol=1e-5)
  assert abs(each[there].mean() / np.asarray(w)[MASK].mean() - 1) > 1e-3  # the control: over tokens


def test_a_rejection_and_a_weight_compose():
  objective = gpo.dapo().replace(
    corrections=(
      partial(corrections.truncate_importance, cap=1.2, floor=0.9),
      partial(corrections.reject, high=0.03, level=levels.sequence),
    )
  )
  _, terms = objective(BATCH.log_probs, ROLLOUT)
  expected = np.clip(np.exp(LOG_W), 0.9, 1.2) * kept(KINDS["k3"], "mean", NO, 0.03)
  np.testing.assert_allclose(terms.factor[MASK], expected[MASK], rtol=1e-5)


# --- floors, and limits with two sides -----------------------------------------------------------


@pytest.mark.parametrize("level", [levels.token, levels.sequence_product])
def test_truncation_with_a_floor(level):
  log_w = (
    LOG_W if level is levels.token else np.sum(LOG_W, -1, where=MASK, keepdims=True) + 0 * LOG_W
  )
  found = corrections.truncate_importance(BATCH.log_probs, ROLLOUT, cap=1.3, floor=0.8, level=level)
  np.testing.assert_allclose(found[MASK], np.clip(np.exp(log_w), 0.8, 1.3)[MASK], rtol=1e-5)
  without = corrections.truncate_importance(BATCH.log_probs, ROLLOUT, cap=1.3, level=level)
  assert np.asarray(without)[MASK].min() < 0.8


def test_verls_seq_mask_tis_is_a_rejection_and_an_untruncated_weight():
  """NeMo-RL's and OpenRLHF's "seq-mask-tis": geometric means reject, tokens' own weights remain."""
  objective = gpo.dapo().replace(
    corrections=(
      partial(corrections.truncate_importance, cap=jnp.inf),
      partial(corrections.reject, low=-LOG(1.1), high=-LOG(0.8), **by_k1, level=levels.sequence),
    )
  )
  _, terms = objective(BATCH.log_probs, ROLLOUT)
  expected = np.exp(LOG_W) * ratio("mean", 0.8, 1.1)
  np.testing.assert_allclose(terms.factor[MASK], expected[MASK], rtol=1e-5)


# --- from hidden states --------------------------------------------------------------------------


@pytest.mark.quick("sequence_max")
@pytest.mark.parametrize("level", [levels.token, levels.sequence_max])
def test_from_hidden_states_the_same_tokens_are_rejected(level, x64):
  """In one pass and in two; without old log-probabilities the policy itself is compared."""
  rng = np.random.default_rng(0)
  hidden, unembedding = rng.normal(size=(1, 2, 5, 4)), rng.normal(size=(7, 4))
  tokens, mask = rng.integers(0, 7, (1, 2, 5)), np.array([[[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]], bool)
  log_probs_of = lambda h, w: gpo.token_log_probs(jnp.einsum("...h,vh->...v", h, w), tokens)
  sampler = log_probs_of(hidden, unembedding) + 0.4 * rng.normal(size=mask.shape)
  objective = gpo.dapo().replace(corrections=(partial(corrections.reject, high=0.05, level=level),))
  assert one_pass.is_enough(objective) == (level is levels.token)
  ids = np.array([[[1, 1, 1, 2, 2], [1, 2, 2, 2, 2]]])
  rollout = objective.prepare(
    advantages=rng.normal(size=mask.shape), mask=mask, sampler_log_probs=sampler, segment_ids=ids
  )
  plain = lambda h, w: objective(log_probs_of(h, w), rollout)[0]
  linear = lambda h, w: gpo.linear_loss(objective, h, w, tokens, rollout)[0]
  expected, found = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, unembedding) for f in (plain, linear)
  )
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-14), found, expected)
  factor = objective(log_probs_of(hidden, unembedding), rollout)[1].factor
  assert 0 < np.asarray(factor)[mask].mean() < 1
