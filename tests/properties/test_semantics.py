"""What holds for every objective, whatever its slots: shapes, padding, gradients, metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import advantages, corrections, divergences, weightings
from tests.support.batches import PRESETS, batch, relative_error, value_and_grad
from tests.support.calls import functions_of
from tests.support.quick import fused

BATCH = batch()
LOG_PROBS = jnp.asarray(BATCH.log_probs)
GRPO = gpo.grpo(beta=0.3)


@functools.cache
def expected():
  return value_and_grad(GRPO, LOG_PROBS, BATCH.prepare(GRPO))


def response(advantage, *values):
  """One response's log-probabilities, and its rollout, in which all others are 0."""
  x = jnp.array(values)
  ones, zeros = jnp.ones_like(x), jnp.zeros_like(x)
  rollout = gpo.Rollout(
    advantages=jnp.array([advantage]), mask=ones, weights=ones, old_log_probs=zeros
  )
  return x, rollout


# --- shapes and padding --------------------------------------------------------------------------


def test_advantages_may_be_of_responses_or_of_tokens():
  rollout = BATCH.prepare(GRPO)
  of_tokens = jnp.broadcast_to(rollout.advantages, BATCH.mask.shape)
  for same in (of_tokens[..., 0], of_tokens[..., :1], of_tokens):
    gradient = value_and_grad(GRPO, LOG_PROBS, rollout.replace(advantages=same))[1]
    assert relative_error(gradient, expected()[1]) < 1e-6


def test_any_number_of_axes_may_come_before_the_samples():
  split = lambda x: x.reshape(2, 2, *x.shape[1:])
  rollout = jax.tree.map(split, BATCH.prepare(GRPO))
  gradient = value_and_grad(GRPO, split(LOG_PROBS), rollout)[1]
  assert relative_error(gradient.reshape(LOG_PROBS.shape), expected()[1]) < 1e-6


def test_a_slot_sees_bools_for_a_mask_and_zeros_in_the_padding():
  def of_everything(ref_log_ratio, log_ratio, rollout):
    assert rollout.mask.dtype == bool
    fields = [x for x in vars(rollout).values() if x is not None and x is not rollout.mask]
    return sum(jnp.abs(x) for x in (ref_log_ratio, log_ratio, *fields))

  dirty = jnp.where(BATCH.mask, LOG_PROBS, jnp.nan)
  names = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
  objective = gpo.grpo().replace(divergence=of_everything)
  arrays = dict.fromkeys(names, dirty) | {"mask": BATCH.mask.astype(int)}
  rollout = BATCH.prepare(objective, **arrays)
  rollout = rollout.replace(advantages=dirty, factor=dirty, weights=dirty)
  _, terms = objective(dirty, rollout)
  np.testing.assert_array_equal(terms.divergence[~BATCH.mask], 0)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean"])
def test_weights_of_a_mean_sum_to_1_and_of_an_empty_batch_to_0(name):
  weighting = getattr(weightings, name)
  np.testing.assert_allclose(jnp.sum(weighting(BATCH.mask)), 1, rtol=1e-6)
  np.testing.assert_array_equal(weighting(np.zeros_like(BATCH.mask)), 0)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["stale", "on_policy"])
@pytest.mark.parametrize("name", functions_of(corrections))
def test_a_correction_has_no_gradient(name, old):
  rollout = BATCH.prepare(gpo.dapo())
  if old == "on_policy":
    rollout = rollout.replace(old_log_probs=None)
    if name in ("vespo", "topr"):  # which refuse a sampler alone
      rollout = rollout.replace(sampler_log_probs=None)
  total = lambda x: jnp.sum(functions_of(corrections)[name](x, rollout))
  np.testing.assert_array_equal(jax.grad(total)(LOG_PROBS), 0)


def test_a_factor_in_the_rollout_has_no_gradient():
  rollout = BATCH.prepare(gpo.dapo())
  loss = lambda factor: gpo.dapo()(LOG_PROBS, rollout.replace(factor=factor))[0]
  np.testing.assert_array_equal(jax.grad(loss)(LOG_PROBS), 0)


def test_a_levels_number_has_a_gradient(x64):
  data = batch(dtype=np.float64)
  rollout = data.prepare(gpo.gmpo())
  loss = lambda limit: gpo.gmpo(epsilon_low=limit)(data.log_probs, rollout)[0]
  slope = jax.grad(loss)(0.25)
  numeric = (loss(0.25 + 1e-6) - loss(0.25 - 1e-6)) / 2e-6
  np.testing.assert_allclose(slope, numeric, rtol=1e-6)
  assert slope != 0


def test_a_term_of_ones_own_by_the_weights_is_weighted_as_the_loss_is():
  rollout = BATCH.prepare(GRPO)

  def own_term(log_probs):
    k3 = divergences.k3(log_probs - BATCH.ref_log_probs, None, None)
    return 0.3 * jnp.sum(rollout.weights * k3, where=rollout.mask)

  plain = value_and_grad(gpo.grpo(beta=None), LOG_PROBS, rollout)[1]
  assert relative_error(plain + jax.grad(own_term)(LOG_PROBS), expected()[1]) < 1e-5


def test_with_x64_weights_and_loss_are_float64_and_the_gradient_is_of_its_inputs_dtype(x64):
  rollout = BATCH.prepare(GRPO)
  value, gradient = value_and_grad(GRPO, LOG_PROBS, rollout)
  assert rollout.weights.dtype == value.dtype == jnp.float64
  assert gradient.dtype == jnp.float32


# --- limits and metrics --------------------------------------------------------------------------


def test_a_level_averages_first_and_is_bounded_afterwards():
  _, terms = gpo.gspo()(*response(1.0, 40.0, -20.0))
  np.testing.assert_allclose(terms.log_ratio, 10, rtol=1e-6)
  np.testing.assert_allclose(terms.token_log_ratio, [20, -20], rtol=1e-6)


def test_the_weights_of_the_sampler_are_bounded():
  x, rollout = response(1.0, 0.0)
  rollout = rollout.replace(sampler_log_probs=jnp.array([-900.0]))
  weight = corrections.mask_importance(x, rollout, high=np.inf)
  np.testing.assert_allclose(weight, np.exp(20), rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "cispo", "gmpo", "dppo", "topr"])
@pytest.mark.parametrize("distance", [-3.0, 3.0])
def test_what_a_level_a_correction_or_cispo_cuts_off_is_not_counted_as_clipped(name, distance):
  objective, stale = PRESETS[name], LOG_PROBS - distance
  rollout = BATCH.prepare(objective, old_log_probs=stale, sampler_log_probs=stale)
  metrics = gpo.summarize(objective(LOG_PROBS, rollout)[1], rollout)
  if name == "grpo":  # the control, whose surrogate clips
    assert metrics["clip_fraction"] > 0.2
  else:
    assert metrics["clip_fraction"] == 0
  if name == "dppo":
    assert metrics["dropped_fraction"] > 0.2


def test_groups_by_id_hold_64_values_per_sample_at_a_time():
  samples = 4096
  of_ids = functools.partial(advantages.by_group, advantages.standardize)
  run = fused(lambda rewards: of_ids(rewards, jnp.arange(samples) // 8))
  memory = run.lower(jnp.zeros(samples)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 8 * 4 * 64 * samples
