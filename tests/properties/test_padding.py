"""What a masked position holds is invisible, bit for bit; what an active one holds is not."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

import gpo_jax as gpo
from gpo_jax import surrogates
from tests.support.batches import COVERING, PRESETS, batch, value_and_grad

BATCH = batch()
EVERY = pytest.mark.parametrize("name", PRESETS)


def run(objective, data=BATCH, **changes):
  return value_and_grad(objective, data.log_probs, data.prepare(objective, **changes))


@EVERY
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
def test_padding_is_bitwise_invisible(name, garbage):
  objective = PRESETS[name]
  value, _ = run(objective)
  shape = (*BATCH.mask.shape[:-1], 3)
  padded = {}
  for field, array in vars(BATCH).items():
    if array.ndim == 3:
      fill = np.zeros(shape, bool) if field == "mask" else np.full(shape, garbage, np.float32)
      keep = array if field == "mask" else np.where(BATCH.mask, array, np.float32(garbage))
      padded[field] = np.concatenate([keep, fill], axis=-1)
  padded["rewards"] = np.where(BATCH.mask.any(-1), BATCH.rewards, np.float32(garbage))
  data = type(BATCH)(**padded)
  rollout = data.prepare(objective)
  other_value, other_gradient = value_and_grad(objective, data.log_probs, rollout)
  np.testing.assert_allclose(other_value, value, rtol=1e-5)
  np.testing.assert_array_equal(other_gradient[..., -3:], 0)
  np.testing.assert_array_equal(other_gradient[~data.mask], 0)
  # The same width, clean: not a bit of difference, whatever the rollout's other fields hold.
  finite = {k: np.where(np.isfinite(v), v, 0).astype(v.dtype) for k, v in padded.items()}
  clean = type(data)(**finite)
  fixed = clean.prepare(objective)
  clean_value, clean_gradient = value_and_grad(objective, clean.log_probs, fixed)
  assert other_value == clean_value
  np.testing.assert_array_equal(other_gradient, clean_gradient)
  wide = [jnp.where(data.mask, rollout.advantages, fill) for fill in (0, garbage)]
  heavy = [jnp.where(data.mask, rollout.weights, fill) for fill in (0, garbage)]
  results = [
    value_and_grad(objective, data.log_probs, rollout.replace(advantages=a, weights=w))
    for a, w in zip(wide, heavy)
  ]
  jax.tree.map(np.testing.assert_array_equal, *results)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_nothing_bad_on_an_active_token_is_hidden(name, bad):
  objective = PRESETS[name]
  p, g, t = np.argwhere(BATCH.mask & (np.arange(4)[:, None, None] == 2))[0]
  for field in ("log_probs", "old_log_probs", "ref_log_probs", "sampler_log_probs"):
    needed = {
      "ref_log_probs": objective.divergence is not None,
      "sampler_log_probs": name in ("deepseek_v32", "dppo"),
    }
    if not needed.get(field, True):
      continue
    arrays = {k: v.copy() for k, v in vars(BATCH).items()}
    arrays[field][p, g, t] = bad
    value, gradient = run(objective, type(BATCH)(**arrays))
    assert not jnp.isfinite(value), field
    if field == "log_probs" and objective.surrogate.func is not surrogates.reinforce:
      assert jnp.isnan(gradient[p, g, t])


def test_a_nan_reward_or_weight_on_an_active_token_is_not_hidden():
  rewards = BATCH.rewards.copy()
  rewards[2, 1] = np.nan
  assert jnp.isnan(run(gpo.grpo(), rewards=rewards)[0])
  rollout = BATCH.prepare(gpo.grpo())
  broken = rollout.replace(weights=jnp.where(BATCH.mask, jnp.nan, 0))
  assert jnp.isnan(gpo.grpo()(BATCH.log_probs, broken)[0])


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
  name=st.sampled_from(COVERING),
  data=st.data(),
  shape=st.sampled_from([(1, 2, 1), (3, 3, 4)]),  # each one compiles
  kind=st.sampled_from([bool, np.int32, np.float32]),
  dtype=st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
  seed=st.integers(0, 2**16),
  spread=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
)
def test_any_rollout_is_finite_and_blind_to_padding(name, data, shape, kind, dtype, seed, spread):
  mask = data.draw(hnp.arrays(bool, shape))
  rewards = data.draw(hnp.arrays(np.float32, shape[:-1], elements=st.sampled_from([0, 1, 0.5, -3])))
  rng = np.random.default_rng(seed)
  objective = PRESETS[name]
  log_probs = -rng.exponential(1.0, shape)
  others = [log_probs + spread * rng.normal(size=shape) for _ in range(3)]
  results = []
  for garbage in (0.0, np.nan):
    put = lambda x: np.where(mask, x, garbage).astype(dtype)
    old, ref, sampler = map(put, others)
    rollout = objective.prepare(
      rewards, mask.astype(kind), old, ref_log_probs=ref, sampler_log_probs=sampler
    )
    results.append(value_and_grad(objective, put(log_probs), rollout))
  (value, gradient), (other_value, other_gradient) = results
  assert jnp.isfinite(value)
  assert gradient.dtype == dtype
  assert value == other_value
  np.testing.assert_array_equal(gradient, other_gradient)
  np.testing.assert_array_equal(np.asarray(gradient, np.float32)[~mask], 0)


def test_a_function_of_ones_own_may_be_undefined_in_the_padding():
  logarithm = lambda log_ratio, advantages: jnp.log(jnp.abs(log_ratio)) * advantages  # −∞ at 0
  inverse = lambda ref_log_ratio, log_ratio, rollout: 1 / ref_log_ratio
  objective = gpo.dapo().replace(surrogate=logarithm, divergence=inverse, beta=0.1)
  value, gradient = run(objective)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()
