"""What every objective shares: dtypes, masks, extremes, empty rows, equal rewards, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support.batches import COVERING, PRESETS, batch, relative_error, value_and_grad

BATCH = batch()
EVERY = pytest.mark.parametrize("name", COVERING)


def run(objective, data=BATCH, **changes):
  return value_and_grad(objective, data.log_probs, data.prepare(objective, **changes))


@pytest.mark.quick("float16-deepseek_v32", "bfloat16-deepseek_v32", "float16-gspo", "float16-cispo")
@EVERY
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
  objective = PRESETS[name]
  rollout = BATCH.prepare(objective)
  half = jnp.asarray(BATCH.log_probs, dtype)
  value, gradient = value_and_grad(objective, half, rollout)
  assert value.dtype == jnp.float32
  assert gradient.dtype == dtype
  full = value_and_grad(objective, half.astype(jnp.float32), rollout)
  assert value == full[0]
  np.testing.assert_array_equal(gradient, full[1].astype(dtype))


@EVERY
def test_float64_stays_and_agrees(name, x64):
  objective = gpo.presets.__dict__[name](**({"length": 8} if name == "dr_grpo" else {}))
  data = batch(dtype=np.float64)
  value, gradient = run(objective, data)
  assert value.dtype == gradient.dtype == jnp.float64
  single = type(data)(
    **{k: v.astype(np.float32) if k != "mask" else v for k, v in vars(data).items()}
  )
  other_value, other_gradient = run(objective, single)
  assert other_gradient.dtype == jnp.float32
  # The clip of GSPO decides at 3e-4: a float32 log-probability may fall on its other side.
  if name not in ("gspo", "gspo_token", "luspo"):
    np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-6)
    assert relative_error(other_gradient, gradient) < 1e-5


@EVERY
def test_masks_may_be_bools_ints_or_floats(name):
  expected = run(PRESETS[name])
  for kind in (np.int32, np.uint8, np.float32):
    value, gradient = run(PRESETS[name], mask=BATCH.mask.astype(kind))
    assert value == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])


@EVERY
@pytest.mark.parametrize("distance", [-1e30, -1000.0, -100.0, 100.0, 1000.0, 1e30])
def test_extreme_log_ratios_stay_finite(name, distance):
  objective = PRESETS[name]
  mask = np.ones((1, 3, 2), bool)
  log_probs = np.full((1, 3, 2), -2.0 + min(distance, 0), np.float32)
  far = np.full((1, 3, 2), -2.0 - max(distance, 0), np.float32)
  rollout = objective.prepare([[1.0, 0.5, 0.0]], mask, far, ref_log_probs=far)
  with jax.debug_nans(True):
    value, gradient = value_and_grad(objective, log_probs, rollout)
  assert jnp.isfinite(value)
  assert jnp.isfinite(gradient).all()


@EVERY
def test_nothing_inside_is_nan(name):
  with jax.debug_nans(True):
    value, gradient = run(PRESETS[name])
    empty_value, empty_gradient = run(PRESETS[name], mask=np.zeros_like(BATCH.mask))
    gpo.summarize(
      PRESETS[name](BATCH.log_probs, BATCH.prepare(PRESETS[name]))[1], BATCH.prepare(PRESETS[name])
    )
  assert jnp.isfinite(value)
  assert empty_value == 0
  np.testing.assert_array_equal(empty_gradient, 0)
  assert jnp.any(gradient != 0)


@EVERY
def test_an_empty_row_contributes_nothing_and_is_not_counted(name):
  objective = PRESETS[name]
  _, gradient = run(objective)
  data = type(BATCH)(**{k: v[:, 1:] if v.ndim > 1 else v for k, v in vars(BATCH).items()})
  arrays = {k: v.copy() for k, v in vars(BATCH).items()}
  arrays["mask"][:, 0] = False
  emptied, other = run(objective, type(BATCH)(**arrays)), run(objective, data)
  np.testing.assert_allclose(emptied[0], other[0], rtol=1e-5, atol=1e-6)
  assert relative_error(emptied[1][:, 1:], other[1]) < 1e-5
  np.testing.assert_array_equal(emptied[1][:, 0], 0)
  np.testing.assert_array_equal(gradient[0, 0], 0)


@EVERY
def test_equal_rewards_give_no_gradient_but_the_divergences(name):
  objective = PRESETS[name].replace(divergence=None, beta=None)
  _, gradient = run(objective)
  if name != "reinforce_plus_plus":  # its group is the batch
    np.testing.assert_array_equal(gradient[1], 0)
  _, gradient = run(objective, rewards=np.full((4, 4), 1 / 3, np.float32))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.slow
def test_the_bound_is_reported_and_stops_no_gradient():
  objective = gpo.dapo()
  far = np.full((1, 2, 1), -50.0, np.float32)
  rollout = objective.prepare([[0.0, 1.0]], np.ones((1, 2, 1)), far)
  (_, terms), gradient = jax.value_and_grad(objective, has_aux=True)(np.zeros_like(far), rollout)
  metrics = gpo.summarize(terms, rollout)
  assert metrics["bounded_fraction"] == 1
  assert (
    metrics["clip_fraction_high"] == 0.5
  )  # A > 0 is clipped, A < 0 keeps the slope at the bound
  np.testing.assert_allclose(gradient[0, 0], 0.5 * math.exp(20) / math.sqrt(2), rtol=1e-3)
  assert gradient[0, 1] == 0


@EVERY
def test_no_gradient_to_what_the_policy_did_not_compute(name):
  objective = PRESETS[name]

  def loss(fields, rewards):
    rollout = objective.prepare(rewards, BATCH.mask, **fields)
    return objective(BATCH.log_probs, rollout)[0]

  fields = {k: v for k, v in vars(BATCH).items() if k.endswith("_log_probs")}
  jax.tree.map(
    lambda g: np.testing.assert_array_equal(g, 0), jax.grad(loss, (0, 1))(fields, BATCH.rewards)
  )
  rollout = BATCH.prepare(objective)
  direct = lambda a, w: objective(BATCH.log_probs, rollout.replace(advantages=a, weights=w))[0]
  for gradient in jax.grad(direct, (0, 1))(rollout.advantages, rollout.weights):
    np.testing.assert_array_equal(gradient, 0)
