"""The semantics that every objective shares, its behaviour as a pytree, and its errors."""

import functools
import math
import pickle

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis.extra import numpy as hnp

import gpo_jax as gpo
from gpo_jax import Rollout, corrections, divergences, levels, surrogates, weightings
from tests.batches import PRESETS, batch, grpo_with, relative_error, value_and_grad

BATCH = batch()
EVERY = pytest.mark.parametrize("name", PRESETS)


def run(objective, data=BATCH, **changes):
  return value_and_grad(objective, data.log_probs, data.prepare(objective, **changes))


# --- signs, dtypes, masks
# ----------------------------------------------------------------------------


def test_signs():
  rollout = Rollout(
    jnp.array([1.0]), jnp.ones((1, 1)), jnp.ones((1, 1)), ref_log_probs=-jnp.ones((1, 1))
  )
  objective = gpo.grpo(beta=2.0)
  loss, terms = objective(jnp.zeros((1, 1)), rollout)
  np.testing.assert_allclose(terms.surrogate, [[1.0]])
  np.testing.assert_allclose(terms.divergence, [[math.exp(-1)]], rtol=1e-6)
  np.testing.assert_allclose(loss, 2 * math.exp(-1) - 1, rtol=1e-6)


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
  np.testing.assert_allclose(other_value, value, rtol=1e-6)
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


# --- extremes
# ----------------------------------------------------------------------------------------


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


# --- hypothesis
# ----------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  name=st.sampled_from(sorted(PRESETS)),
  data=st.data(),
  shape=st.tuples(st.integers(1, 3), st.integers(2, 3), st.integers(1, 4)),
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


# --- an objective is a pytree
# --------------------------------------------------------------------------


def test_a_schedule_compiles_once():
  traced = chex.assert_max_traces(n=1)(lambda objective, x, r: objective(x, r)[0])
  step = jax.jit(traced)
  schedule = optax.schedules.linear_schedule(0.1, 0.0, 5)
  values = []
  for count in range(4):
    objective = gpo.grpo(
      beta=schedule(count), epsilon=[0.2, 1, np.float64(0.3), jnp.float32(0.1)][count]
    )
    values.append(step(objective, BATCH.log_probs, BATCH.prepare(objective)))
  assert len({float(v) for v in values}) == 4


def test_vmap_over_objectives_is_a_sweep():
  betas = jnp.array([0.0, 0.1, 1.0])
  rollout = BATCH.prepare(gpo.grpo())
  sweep = jax.vmap(lambda beta: gpo.grpo(beta=beta)(BATCH.log_probs, rollout)[0])(betas)
  expected = [gpo.grpo(beta=float(b))(BATCH.log_probs, rollout)[0] for b in betas]
  np.testing.assert_allclose(sweep, expected, rtol=1e-6)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), gpo.grpo(epsilon=0.1), gpo.grpo(epsilon=0.3))
  losses = jax.vmap(lambda o: o(BATCH.log_probs, rollout)[0])(stacked)
  expected = [gpo.grpo(epsilon=e)(BATCH.log_probs, rollout)[0] for e in (0.1, 0.3)]
  np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_meta_gradients_through_an_objective(x64):
  data = batch(dtype=np.float64)
  rollout = data.prepare(gpo.grpo())

  def after_one_step(beta, epsilon):
    objective = gpo.grpo(beta=beta, epsilon=epsilon)
    gradient = jax.grad(lambda x: objective(x, rollout)[0])(data.log_probs)
    return gpo.dapo()(data.log_probs - 5.0 * gradient, rollout)[0]

  slope = jax.grad(after_one_step)(0.1, 0.2)
  numeric = (after_one_step(0.1 + 1e-5, 0.2) - after_one_step(0.1 - 1e-5, 0.2)) / 2e-5
  np.testing.assert_allclose(slope, numeric, rtol=1e-6)
  loss = lambda epsilon: gpo.grpo(epsilon=epsilon)(data.log_probs, rollout)[0]
  numeric = (loss(0.2 + 1e-6) - loss(0.2 - 1e-6)) / 2e-6
  np.testing.assert_allclose(jax.grad(loss)(0.2), numeric, rtol=1e-6)


def test_meta_gradients_of_weights_and_advantages_are_0():
  base = gpo.dr_grpo(length=8).replace(
    advantage=functools.partial(gpo.advantages.standardize, eps=0.1),
    corrections=(functools.partial(corrections.truncate_importance, cap=0.9),),
  )
  slopes = jax.grad(lambda o: o(BATCH.log_probs, BATCH.prepare(o))[0])(base)
  assert slopes.weighting.keywords["length"] == 0
  assert slopes.advantage.keywords["eps"] == 0
  assert slopes.surrogate.keywords["epsilon_low"] != 0
  assert slopes.corrections[0].keywords["cap"] != 0


def test_leaves_are_numbers_and_structure_is_functions():
  objective = gpo.grpo()
  assert len(jax.tree.leaves(objective)) == 2
  assert jax.tree.structure(objective) == jax.tree.structure(gpo.grpo(epsilon=0.5, beta=1))
  assert jax.tree.structure(objective) != jax.tree.structure(gpo.grpo(beta=None))
  assert repr(jax.tree.map(lambda x: x, objective)) == repr(objective)
  assert all(isinstance(leaf, str) for leaf in jax.tree.leaves(jax.tree.map(str, objective)))
  (path, _), *_ = jax.tree_util.tree_leaves_with_path(objective)
  assert "surrogate" in jax.tree_util.keystr(path)
  assert repr(objective) == (
    "Objective(surrogate=clip(epsilon_low=0.2), level=token, advantage=standardize, "
    "weighting=sequence_mean, divergence=k3, beta=0.04)"
  )
  assert "beta" in repr(jax.jit(lambda o: (repr(o), o)[1])(objective))


def test_replace_and_pickle():
  objective = gpo.dapo().replace(level=levels.sequence, weighting=weightings.sequence_mean)
  again = pickle.loads(pickle.dumps(objective))
  rollout = BATCH.prepare(objective)
  assert again(BATCH.log_probs, rollout)[0] == objective(BATCH.log_probs, rollout)[0]
  assert repr(again) == repr(objective)


def test_any_slot_may_be_a_lambda():
  objective = gpo.Objective(
    surrogate=lambda log_ratio, advantages: jnp.tanh(log_ratio) * advantages,
    level=lambda log_ratio, rollout: log_ratio / 2,
    advantage=lambda rewards, where: rewards - 0.5,
    weighting=lambda mask, segment_ids: mask.astype(float) / 10,
    divergence=lambda ref_log_ratio, log_ratio, rollout: ref_log_ratio**2,
    beta=0.1,
    corrections=(lambda log_probs, rollout: jnp.exp(-log_probs),),
  )
  data = type(BATCH)(**{k: v.copy() for k, v in vars(BATCH).items()})
  rollout = data.prepare(objective)
  x, old, ref = data.log_probs, data.old_log_probs, data.ref_log_probs
  surrogate = np.tanh((x - old) / 2) * (data.rewards[..., None] - 0.5) * np.exp(-x)
  expected = np.sum((0.1 * (x - ref) ** 2 - surrogate) / 10, where=data.mask)
  loss, terms = objective(x, rollout)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  gate = (1 - np.tanh((x - old) / 2) ** 2) * (data.rewards[..., None] - 0.5)
  np.testing.assert_allclose(terms.gate[data.mask], gate[data.mask], rtol=1e-4, atol=1e-6)


def test_corrections_multiply_the_surrogate_only():
  base = gpo.grpo(beta=0.3)
  halved = base.replace(corrections=(lambda x, r: 0.5 + 0 * x, lambda x, r: 0.5 + 0 * x))
  _, plain = base(BATCH.log_probs, BATCH.prepare(base))
  loss, terms = halved(BATCH.log_probs, BATCH.prepare(halved))
  np.testing.assert_array_equal(terms.divergence, plain.divergence)
  np.testing.assert_allclose(terms.factor[BATCH.mask], 0.25)
  expected = 0.3 * plain.divergence - 0.25 * plain.surrogate
  np.testing.assert_allclose(terms.loss, expected, rtol=1e-5, atol=1e-7)
  as_data = BATCH.prepare(base).replace(factor=jnp.full(BATCH.mask.shape, 0.25))
  np.testing.assert_allclose(base(BATCH.log_probs, as_data)[0], loss, rtol=1e-6)


@pytest.mark.parametrize(
  "correction",
  [
    corrections.truncate_importance,
    functools.partial(corrections.truncate_importance, level=levels.sequence_sum),
    functools.partial(corrections.mask_importance, low=0.8, high=1.2),
    functools.partial(corrections.mask_importance, low=0.9, high=1.1, level=levels.sequence),
    functools.partial(corrections.binary_kl_mask, threshold=1e-3),
    functools.partial(corrections.covariance_mask, fraction=0.1),
  ],
)
def test_every_correction_composes_and_is_constant(correction):
  objective = gpo.deepseek_v32()
  objective = objective.replace(corrections=(*objective.corrections, correction))
  rollout = BATCH.prepare(objective)
  (_, terms), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
    BATCH.log_probs, rollout
  )
  data = rollout.replace(factor=terms.factor)
  plain = objective.replace(corrections=())
  frozen = jax.grad(lambda x: plain(x, data)[0])(BATCH.log_probs)
  np.testing.assert_allclose(gradient, frozen, rtol=1e-5, atol=1e-8)
  assert jnp.std(terms.factor, where=BATCH.mask) > 0


@pytest.mark.parametrize(
  ("correction", "setting"),
  [
    (corrections.truncate_importance, "cap"),
    (corrections.mask_importance, "low"),
    (corrections.mask_importance, "high"),
    (corrections.off_policy_sequence_mask, "threshold"),
    (corrections.total_variation_mask, "threshold"),
    (corrections.binary_kl_mask, "threshold"),
    (corrections.covariance_mask, "fraction"),
    (corrections.entropy_mask, "quantile"),
    (corrections.vespo, "k_pos"),
  ],
)
def test_a_nan_setting_of_a_correction_is_never_hidden(correction, setting):
  rollout = BATCH.prepare(gpo.dapo())
  factor = correction(jnp.asarray(BATCH.log_probs), rollout, **{setting: np.float32(np.nan)})
  assert jnp.isnan(factor[BATCH.mask]).any()


@pytest.mark.parametrize("drift", [-200.0, 200.0])
def test_a_response_far_off_weighs_what_it_would_at_the_bound(drift):
  far = np.full((2, 3), drift / 3, np.float32)
  rollout = gpo.Rollout(jnp.array([1.0, -1.0]), jnp.ones((2, 3)), jnp.ones((2, 3)), 0 * far)
  weights = np.stack([corrections.vespo(far, rollout)[:, 0], corrections.topr(far, rollout)[:, 0]])
  w = np.exp(np.sign(drift) * 20)
  vespo = w ** np.array([2.0, 3.0]) * np.exp(np.array([3.0, 2.0]) * (1 - w))
  np.testing.assert_allclose(weights, [vespo, [1, min(w, 1)]], rtol=1e-4)


def test_importance_weights_by_hand():
  data, mask = BATCH, BATCH.mask
  rollout = data.prepare(gpo.dapo())
  weight = np.exp(data.old_log_probs - data.sampler_log_probs)
  value = corrections.truncate_importance(data.log_probs, rollout, cap=1.1)
  np.testing.assert_allclose(value[mask], np.minimum(weight, 1.1)[mask], rtol=1e-5)
  value = corrections.mask_importance(data.log_probs, rollout, low=0.9, high=1.2)
  kept = np.where((weight >= 0.9) & (weight <= 1.2), weight, 0)
  np.testing.assert_allclose(value[mask], kept[mask], rtol=1e-5)
  whole = np.exp(np.sum(data.old_log_probs - data.sampler_log_probs, -1, where=mask, keepdims=True))
  value = corrections.truncate_importance(data.log_probs, rollout, level=levels.sequence_sum)
  expected = np.broadcast_to(np.minimum(whole, 2.0), mask.shape)
  np.testing.assert_allclose(value[mask], expected[mask], rtol=1e-5)
  on_policy = rollout.replace(old_log_probs=None)
  value = corrections.truncate_importance(data.log_probs, on_policy, cap=9.0)
  weight = np.exp(data.log_probs - data.sampler_log_probs)
  np.testing.assert_allclose(value[mask], np.minimum(weight, 9)[mask], rtol=1e-5)


def test_binary_kl_mask_by_hand():
  rng = np.random.default_rng(0)
  p, mu = rng.uniform(0.01, 0.99, (2, 1, 200))
  a = rng.normal(size=(1, 200))
  kl = mu * np.log(mu / p) + (1 - mu) * np.log((1 - mu) / (1 - p))
  keep = ~((kl > 0.05) & (a * (p - mu) > 0))
  rollout = Rollout(jnp.asarray(a), jnp.ones((1, 200)), jnp.ones((1, 200)), jnp.log(mu))
  value = corrections.binary_kl_mask(jnp.log(p), rollout, threshold=0.05)
  np.testing.assert_array_equal(value, keep)
  assert 0 < keep.mean() < 1
  certain = corrections.binary_kl_mask(jnp.zeros((1, 200)), rollout, threshold=0.05)
  assert jnp.isfinite(certain).all()


def test_a_token_at_the_limit_of_the_covariances_is_kept():
  log_probs = jnp.array([[-0.1, -3.0], [-1.0, -1.2]])
  rollout = gpo.Rollout(jnp.array([2.0, -2.0]), jnp.ones((2, 2)), jnp.ones((2, 2)))
  kept = {x: corrections.covariance_mask(log_probs, rollout, fraction=x) for x in (0.0, 1 / 3)}
  np.testing.assert_array_equal(kept[0.0], 1)
  np.testing.assert_array_equal(kept[1 / 3], [[0, 1], [1, 1]])


def test_covariances_are_over_active_tokens():
  lengths = BATCH.mask.sum(-1, keepdims=True).astype(np.float32)  # long responses are better
  rollout = BATCH.prepare(gpo.dapo()).replace(advantages=lengths)
  kept = np.asarray(corrections.covariance_mask(BATCH.log_probs, rollout, fraction=0.2))[BATCH.mask]
  advantages = np.broadcast_to(lengths, BATCH.mask.shape)[BATCH.mask]
  log_probs = BATCH.log_probs[BATCH.mask]
  covariances = (log_probs - log_probs.mean()) * (advantages - advantages.mean())
  np.testing.assert_array_equal(kept, covariances <= np.quantile(covariances, 0.8))
  # The control: a mean over responses drops other tokens.
  wrong = (log_probs - log_probs.mean()) * (advantages - lengths.mean())
  assert np.any(kept != (wrong <= np.quantile(wrong, 0.8)))


def test_a_function_of_ones_own_may_be_undefined_in_the_padding():
  logarithm = lambda log_ratio, advantages: jnp.log(jnp.abs(log_ratio)) * advantages  # −∞ at 0
  inverse = lambda ref_log_ratio, log_ratio, rollout: 1 / ref_log_ratio
  objective = gpo.dapo().replace(surrogate=logarithm, divergence=inverse, beta=0.1)
  value, gradient = run(objective)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  "name", ["token", "sequence", "sequence_token", "sequence_sum", "geometric"]
)
def test_a_divergence_sees_token_ratios_whatever_the_level(name):
  level, weighting = getattr(gpo.levels, name), gpo.weightings.sequence_mean
  changes = {"level": level, "weighting": weighting, "divergence": gpo.divergences.unbiased}
  objective = gpo.dapo().replace(**changes, beta=0.1)
  rollout = BATCH.prepare(objective)
  _, terms = objective(BATCH.log_probs, rollout)
  delta, d = BATCH.log_probs - BATCH.ref_log_probs, BATCH.log_probs - BATCH.old_log_probs
  expected = np.exp(d) * (np.exp(-delta) + delta - 1)
  found = np.asarray(terms.divergence)[BATCH.mask]
  np.testing.assert_allclose(found, expected[BATCH.mask], rtol=1e-3, atol=1e-6)


def test_an_objective_of_abstract_leaves_can_be_printed():
  assert "clip" in str(jax.eval_shape(gpo.grpo))
  assert "clip" in str(jax.tree.map(lambda x: x.dtype, gpo.grpo()))


def test_terms_carry_no_gradient():
  rollout = BATCH.prepare(gpo.grpo())

  def norm(log_probs):
    _, terms = gpo.grpo()(log_probs, rollout)
    return sum(jnp.sum(x) for x in jax.tree.leaves(terms) if x.dtype == log_probs.dtype)

  np.testing.assert_array_equal(jax.grad(norm)(BATCH.log_probs), 0)


def test_statistics_over_the_batch_survive_cutting_as_data():
  rng = np.random.default_rng(0)
  entropy = np.where(BATCH.mask, rng.exponential(size=BATCH.mask.shape), np.nan).astype(np.float32)
  objective = gpo.dapo()
  rollout = BATCH.prepare(objective)
  for factor in (
    corrections.entropy_mask(entropy, rollout, quantile=0.75),
    corrections.covariance_mask(
      np.where(BATCH.mask, BATCH.log_probs, np.nan), rollout, fraction=0.25
    ),
  ):
    dropped = 1 - np.mean(np.asarray(factor)[BATCH.mask])
    np.testing.assert_allclose(dropped, 0.25 if dropped < 0.5 else 0.75, atol=0.05)
    fixed = rollout.replace(factor=factor)
    value, gradient = value_and_grad(objective, BATCH.log_probs, fixed)
    halves = [
      value_and_grad(objective, BATCH.log_probs[s], jax.tree.map(lambda x, s=s: x[s], fixed))
      for s in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(sum(v for v, _ in halves), value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([g for _, g in halves]), gradient, rtol=1e-5)


def test_sequence_token_takes_advantages_of_tokens():
  a = np.random.default_rng(0).normal(size=BATCH.mask.shape).astype(np.float32)
  rollout = BATCH.prepare(gpo.gspo_token()).replace(advantages=a)
  wide = {"epsilon_low": 0.9, "epsilon_high": 0.9}
  _, gradient = value_and_grad(gpo.gspo_token(**wide), BATCH.log_probs, rollout)
  d = BATCH.log_probs - BATCH.old_log_probs
  count = np.maximum(BATCH.mask.sum(-1, keepdims=True), 1)
  s = np.exp(np.sum(d, -1, where=BATCH.mask, keepdims=True) / count)
  assert ((s > 0.1) & (s < 1.9)).all()
  expected = np.where(BATCH.mask, -s * a * rollout.weights, 0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


# --- errors
# --------------------------------------------------------------------------------------------


def test_bad_objectives():
  with pytest.raises(ValueError, match=r"level=sequence .*weighting=token_mean.*sequence_mean"):
    gpo.gspo().replace(weighting=weightings.token_mean)
  for level in (levels.sequence_sum, functools.partial(levels.geometric, clip=0.1)):
    with pytest.raises(ValueError, match="allow_token_weighting=True"):
      gpo.dapo().replace(level=level)
  allowed = gpo.gspo().replace(weighting=weightings.token_mean, allow_token_weighting=True)
  assert jnp.isfinite(run(allowed)[0])
  assert allowed.replace(beta=None).allow_token_weighting
  gpo.dapo().replace(level=levels.sequence_token)
  with pytest.raises(ValueError, match=r"divergence=k3, beta=None. Give both"):
    gpo.grpo().replace(beta=None)
  with pytest.raises(ValueError, match=r"divergence=None, beta=0.1"):
    gpo.dapo().replace(beta=0.1)
  with pytest.raises(ValueError, match="surrogate must be a function; got 'clip'"):
    gpo.dapo().replace(surrogate="clip")
  with pytest.raises(ValueError, match="epsilon_low must hold real numbers"):
    gpo.dapo(epsilon_low="0.2")


WRONG_SLOTS = [
  (
    {"surrogate": levels.sequence},
    r"\(log_ratio, advantages\); sequence takes \(log_ratio, rollout",
  ),
  (
    {"surrogate": functools.partial(surrogates.clip, epsilon=0.2)},
    r"clip\(epsilon=0.2\) does not:",
  ),
  ({"surrogate": surrogates.cispo}, "surrogate must take .*; cispo does not: .*'high'"),
  ({"level": divergences.k3}, r"level must take \(log_ratio, rollout\); k3 does not"),
  (
    {"weighting": lambda mask: mask},
    r"weighting must take \(mask, segment_ids\); <lambda> does not",
  ),
  ({"advantage": gpo.advantages.by_group}, "advantage must take .*; by_group does not"),
  ({"corrections": (corrections.topr, lambda x: x)}, "corrections must take .*; <lambda> does not"),
  (
    {"corrections": (functools.partial(corrections.entropy_mask, quantile=0.5),)},
    r"entropy_mask.* takes \(entropy, rollout\): pass rollout.replace\(factor=entropy_mask\(",
  ),
  ({"divergence": divergences.sequence_exact}, r"takes \(kl, .*: bind the KL, lambda _, log_ratio"),
]


@pytest.mark.parametrize(("slot", "message"), WRONG_SLOTS)
def test_a_function_that_does_not_fit_its_slot(slot, message):
  with pytest.raises(ValueError, match=message):
    gpo.grpo().replace(**slot)


def test_a_slot_takes_whatever_can_be_called_as_it_is():
  objective = gpo.dapo().replace(surrogate=jnp.multiply, advantage=lambda *given: given[0])
  assert jnp.isfinite(run(objective)[0])
  objective.replace(surrogate=min)  # a builtin whose arguments are not known


NOT_ARRAYS = [(lambda *_: None, "None"), (lambda *_: (1.0,), "tuple"), (lambda *_: 1.0, "float")]


@pytest.mark.parametrize(("function", "got"), NOT_ARRAYS)
def test_what_a_slot_returns_is_an_array(function, got):
  rollout = BATCH.prepare(gpo.grpo())
  for slot in ("surrogate", "level", "divergence"):
    with pytest.raises(ValueError, match=rf"{slot} must return float32 \[4, 4, 6\].*got {got}"):
      gpo.grpo().replace(**{slot: function})(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match=f"corrections: <lambda> must return .*got {got}"):
    gpo.grpo().replace(corrections=(function,))(BATCH.log_probs, rollout)
  for slot, shape in (("advantage", r"\[4, 4\]"), ("weighting", r"\[4, 4, 6\]")):
    with pytest.raises(ValueError, match=f"{slot} must return {shape}.*got {got}"):
      BATCH.prepare(gpo.grpo().replace(**{slot: function}))


def test_each_correction_is_checked():
  def halves(log_probs, rollout):
    return jnp.full((6,), 0.5)

  def kept(log_probs, rollout):
    return rollout.mask

  for function, got in ((halves, r"float32 \[6\]"), (kept, r"bool \[4, 4, 6\]")):
    objective = gpo.dapo().replace(corrections=(corrections.topr, function))
    with pytest.raises(ValueError, match=f"corrections: {function.__name__} must return .*{got}"):
      objective(BATCH.log_probs, BATCH.prepare(objective))


@pytest.mark.parametrize("shape", [(4,), (4, 4, 1), ()])
def test_an_advantage_is_one_per_response(shape):
  objective = gpo.dapo().replace(advantage=lambda rewards, where: jnp.ones(shape))
  ids = np.ones(BATCH.mask[:, 0].shape, int)
  for arrays in (
    {},
    {"group_ids": np.ones((4, 4), int)},
    {"mask": BATCH.mask[:, 0], "segment_ids": ids},
    {"mask": BATCH.mask[:, 0], "segment_ids": ids, "group_ids": np.ones((4, 4), int)},
  ):
    with pytest.raises(ValueError, match="advantage must return"):
      objective.prepare(**{"rewards": BATCH.rewards, "mask": BATCH.mask} | arrays)


def test_only_decoupled_and_ones_own_take_several_kinds_of_reward():
  kinds = np.stack([BATCH.rewards, -BATCH.rewards])
  for kind in (
    functools.partial(gpo.advantages.decoupled, weights=[1.0, 2.0]),
    lambda rewards, where: gpo.advantages.center(rewards[0], where),
  ):
    rollout = gpo.dapo().replace(advantage=kind).prepare(kinds, BATCH.mask)
    assert rollout.advantages.shape == (4, 4, 1)
  for rewards, mask in ((kinds, BATCH.mask), (BATCH.rewards, BATCH.mask[0])):
    with pytest.raises(ValueError, match="rewards must have one value per response"):
      gpo.dapo().prepare(rewards, mask)
  decoupled = gpo.dapo().replace(advantage=gpo.advantages.decoupled)
  with pytest.raises(ValueError, match="leave group_ids out"):
    decoupled.prepare(kinds, BATCH.mask, group_ids=np.ones((4, 4), int))


def test_numbers_of_weighting_and_advantage_are_scalars_and_lengths_are_arrays():
  for slot, message in (
    ({"weighting": functools.partial(weightings.constant_length, length=jnp.ones(6))}, "length"),
    ({"advantage": functools.partial(gpo.advantages.standardize, eps=jnp.ones(4))}, "eps"),
  ):
    with pytest.raises(ValueError, match=rf"{message} must be a scalar; got shape .*jax.vmap"):
      BATCH.prepare(gpo.dapo().replace(**slot))
  opo = functools.partial(gpo.advantages.optimal_baseline, lengths=BATCH.mask.sum(-1))
  assert jnp.isfinite(run(gpo.dapo().replace(advantage=opo))[0])


def test_optimal_baseline_of_packed_rows():
  ids = np.array([[1, 1, 2, 2], [1, 2, 2, 0]])
  rewards = np.array([[1.0, 0.0], [0.5, 2.0]], np.float32)
  lengths = jnp.stack([jnp.sum(ids == s, -1) for s in (1, 2)], -1)
  prepare = lambda n, **kind: (
    gpo.dapo()
    .replace(advantage=functools.partial(gpo.advantages.optimal_baseline, lengths=n))
    .prepare(rewards, ids > 0, segment_ids=ids, **kind)
    .advantages
  )
  expected = [0.5, -0.5, -1.0, 0.5]
  apart = prepare(lengths.ravel(), group_ids=[[0, 0], [1, 1]])
  for value in (prepare(lengths), apart):
    np.testing.assert_allclose(value[np.arange(4) // 2, [0, 2, 0, 1]], expected, rtol=1e-6)
  with pytest.raises(ValueError, match=r"packed rows each segment's, .*lengths.ravel\(\)"):
    prepare(jnp.ones(2))


def bad_rollouts():
  good = BATCH.prepare(gpo.deepseek_v32())
  short = BATCH.old_log_probs[..., :-1]
  return [
    ({"old_log_probs": short}, r"old_log_probs must have the shape of mask.*\[4, 4, 5\]"),
    ({"ref_log_probs": short}, "ref_log_probs must have"),
    ({"ref_log_probs": None}, "needs rollout.ref_log_probs: pass ref_log_probs="),
    ({"weights": good.weights[0]}, "weights must have the shape of mask"),
    (
      {"advantages": jnp.ones((4, 3))},
      r"advantages must be .*got advantages \[4, 3\], mask \[4, 4, 6\]",
    ),
    ({"segment_ids": jnp.ones((4, 4, 6))}, "segment_ids must be integers"),
    ({"segment_ids": jnp.ones((4, 4), int)}, r"segment_ids must have .*\[4, 4\]"),
    ({"factor": jnp.ones(3)}, r"factor must have .*factor \[3\]"),
    ({"mask": jnp.ones((4, 4, 6), complex)}, "mask must hold real numbers"),
    *(
      ({name: None}, f"{name} must hold real numbers; got None")
      for name in ("advantages", "mask", "weights")
    ),
  ]


@pytest.mark.parametrize("index", range(len(bad_rollouts())))
def test_bad_rollouts(index):
  change, message = bad_rollouts()[index]
  rollout = BATCH.prepare(gpo.deepseek_v32()).replace(**change)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(gpo.deepseek_v32(), jnp.asarray(BATCH.log_probs), rollout)


def test_bad_calls():
  rollout = BATCH.prepare(gpo.grpo())
  with pytest.raises(ValueError, match=r"log_probs must have the shape of mask.*\[4, 4, 5\]"):
    gpo.grpo()(BATCH.log_probs[..., :-1], rollout)
  with pytest.raises(ValueError, match="log_probs must hold real numbers"):
    gpo.grpo()(BATCH.log_probs.astype(complex), rollout)
  for given in (BATCH.log_probs, None, vars(rollout)):
    with pytest.raises(ValueError, match=r"must be a Rollout.*objective\(log_probs, rollout\)"):
      gpo.grpo()(rollout, given)
  for given, name in (((None, BATCH.mask), "rewards"), ((BATCH.rewards, None), "mask")):
    with pytest.raises(ValueError, match=f"{name} must hold real numbers; got None"):
      gpo.grpo().prepare(*given)
  with pytest.raises(ValueError, match="log_probs must hold real numbers; got None"):
    gpo.grpo()(None, rollout)
  with pytest.raises(ValueError, match=r"one value per response, \[4, 4\].*got rewards \[4\]"):
    gpo.grpo().prepare(BATCH.rewards[0], BATCH.mask)
  with pytest.raises(ValueError, match=r"mask must be .*\[4, 0\]"):
    gpo.grpo().prepare(jnp.ones(4), jnp.ones((4, 0)))
  with pytest.raises(ValueError, match="needs rollout.sampler_log_probs"):
    objective = gpo.dapo().replace(corrections=(corrections.truncate_importance,))
    objective(BATCH.log_probs, BATCH.prepare(objective, sampler_log_probs=None))
  with pytest.raises(ValueError, match=r"surrogate must return float32 \[4, 4, 6\]"):
    gpo.dapo().replace(surrogate=lambda d, a: jnp.sum(d))(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match="divergence must return"):
    gpo.grpo().replace(divergence=lambda r, d, _: 1.0)(BATCH.log_probs, rollout)
  with pytest.raises(ValueError, match="groups of at least 2"):
    gpo.rloo().prepare(jnp.ones((4, 1)), jnp.ones((4, 1, 2)))


def test_bad_settings_say_what_to_do():
  with pytest.raises(ValueError, match=r"beta=schedule\(step\)"):
    gpo.grpo(beta=optax.schedules.linear_schedule(0.1, 0.0, 5))
  for bad in (corrections.topr, None, (1.0,)):
    with pytest.raises(ValueError, match="corrections must be a tuple of functions"):
      gpo.dapo().replace(corrections=bad)
  with pytest.raises(ValueError, match=r"mode must hold real numbers.*close over anything else"):
    gpo.dapo().replace(surrogate=functools.partial(surrogates.clip, mode="x"))
  with pytest.raises(ValueError, match=r"beta must be a scalar; got shape \[2\]"):
    gpo.grpo(beta=jnp.ones(2))(BATCH.log_probs, BATCH.prepare(gpo.grpo()))
  for name, make in (("epsilon_low", gpo.grpo), ("epsilon_high", gpo.dapo), ("high", gpo.cispo)):
    setting = "epsilon" if make is gpo.grpo else name
    with pytest.raises(ValueError, match=f"{name} must be a scalar.*jax.vmap"):
      make(**{setting: jnp.ones(6)})(BATCH.log_probs, BATCH.prepare(make()))
    if name != "epsilon_high":  # there None means epsilon_low
      with pytest.raises(ValueError, match=f"{name} of .* must be a number; got None: bind"):
        make(**{setting: None})
  importance = functools.partial(
    corrections.truncate_importance,
    level=functools.partial(levels.geometric, clip=jnp.ones(6)),
  )
  for slot in ({"corrections": (importance,)}, {"level": importance.keywords["level"]}):
    objective = gpo.gmpo().replace(**slot)
    with pytest.raises(ValueError, match=r"clip must be a scalar; got shape \[6\]"):
      objective(BATCH.log_probs, BATCH.prepare(objective))
  with pytest.raises(ValueError, match="level must return"):
    gpo.dapo().replace(level=lambda d, r: d[..., :1])(BATCH.log_probs, BATCH.prepare(gpo.dapo()))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint32, ">i4", list])
def test_ids_may_be_any_integers(kind):
  ids = np.array([[1, 1, 2, 2, 3, 0], [1, 2, 2, 0, 0, 0]])
  same = ids.tolist() if kind is list else ids.astype(kind)
  rewards = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]], np.float32)
  objective = gpo.gspo()
  expected = objective.prepare(rewards, ids > 0, segment_ids=ids)
  rollout = objective.prepare(rewards, ids > 0, segment_ids=same)
  jax.tree.map(np.testing.assert_array_equal, rollout, expected)
  log_probs = -np.ones((2, 6), np.float32)
  value = objective(log_probs, expected.replace(segment_ids=np.asarray(same)))[0]
  assert value == objective(log_probs, expected)[0]


def test_ids_of_32_bits_in_float64(x64):
  ids = jnp.array([[1, 1, 2, 0]], jnp.int32)
  rollout = gpo.gspo().prepare([[1.0, 0.0]], ids > 0, segment_ids=ids)
  assert jnp.isfinite(gpo.gspo()(jnp.zeros((1, 4)), rollout)[0])


@EVERY
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 7.0])
def test_a_packed_row_is_one_group_and_a_place_without_a_segment_holds_anything(name, garbage):
  objective = PRESETS[name].replace(divergence=None, beta=None)
  ids = np.array([[1, 1, 2, 2, 3, 0], [1, 2, 2, 0, 0, 0]])
  rewards = np.array([[1.0, 0.0, 0.5], [0.25, 1.0, garbage]], np.float32)
  packed = objective.prepare(rewards, ids > 0, segment_ids=ids)
  assert jnp.isfinite(packed.advantages[ids > 0]).all()
  shape = np.arange(1, 4) <= ids.max(-1, keepdims=True)
  unpacked = objective.prepare(rewards, np.repeat(shape[..., None], 2, -1)).advantages[..., 0]
  np.testing.assert_array_equal(packed.advantages[0, :5], unpacked[0, [0, 0, 1, 1, 2]])
  np.testing.assert_array_equal(packed.advantages[1, :3], unpacked[1, [0, 1, 1]])
  groups = np.array([[1, 2, 1], [2, 1, 1]])
  if name != "reinforce_plus_plus":  # its group is the batch
    apart = objective.prepare(rewards, ids > 0, segment_ids=ids, group_ids=groups)
    assert jnp.isfinite(apart.advantages[ids > 0]).all()
    assert jnp.any(apart.advantages[ids > 0] != packed.advantages[ids > 0])


@EVERY
@pytest.mark.parametrize("junk", [0, [4, 0, 7, -3, 99, 2, 1, 0]])
def test_ids_of_masked_tokens_do_not_matter(name, junk):
  objective = PRESETS[name]
  ids = np.array([[1, 1, 1, 2, 2, 2, 3, 3], [0, 1, 1, 2, 2, 2, 0, 0]])
  mask = np.array([[1, 0, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 0, 0]], bool)
  rewards = np.array([[1.0, 0.0, 0.5], [0.25, 1.0, 0.0]], np.float32)
  log_probs, old, ref = -np.random.default_rng(0).exponential(size=(3, 2, 8)).astype(np.float32)

  def evaluate(ids):
    rollout = objective.prepare(rewards, mask, old, ref_log_probs=ref, segment_ids=ids)
    return rollout.weights, value_and_grad(objective, log_probs, rollout)

  results = evaluate(ids), evaluate(np.where(mask, ids, junk))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_function_of_ones_own_may_have_arrays_and_none():
  def tabled(log_ratio, advantages, *, table, kind=None, **others):
    return log_ratio * advantages * jnp.mean(table)

  bound = functools.partial(tabled, table=jnp.ones(3), kind=None, other=None)
  objective = gpo.dapo().replace(surrogate=bound)
  assert jnp.isfinite(run(objective)[0])


def test_bad_segments_are_loud():
  with pytest.raises(
    ValueError, match=r"segment_ids must be integers; got dtype float32: give 1, 2"
  ):
    gpo.grpo().prepare([[1.0]], jnp.ones((1, 2)), segment_ids=jnp.ones((1, 2)))
  with pytest.raises(ValueError, match=r"one value per response, .*got rewards \[\]"):
    gpo.grpo().prepare(1.0, jnp.ones((1, 2)), segment_ids=jnp.ones((1, 2), int))
  from_zero = jnp.array([[0, 0, 1, 1, 2, 2]])
  rollout = gpo.grpo(beta=None).prepare([[1.0, 0.0, 0.5]], jnp.ones((1, 6)), segment_ids=from_zero)
  assert jnp.isnan(gpo.grpo(beta=None)(jnp.zeros((1, 6)), rollout)[0])
  ids = jnp.array([[1, 1, 2, 2, 3, 3]])  # three responses, two rewards
  rollout = gpo.grpo(beta=None).prepare([[1.0, 0.0]], jnp.ones((1, 6)), segment_ids=ids)
  assert jnp.isnan(gpo.grpo(beta=None)(jnp.zeros((1, 6)), rollout)[0])


# --- metrics
# -------------------------------------------------------------------------------------------


def test_metrics_by_hand():
  objective = gpo.deepseek_v32(beta=0.2)
  rollout = BATCH.prepare(objective)
  loss, terms = objective(BATCH.log_probs, rollout)
  metrics = gpo.summarize(terms, rollout)
  m = BATCH.mask
  d = (BATCH.log_probs - BATCH.old_log_probs)[m].astype(np.float64)
  rho = np.exp(d)
  a = np.broadcast_to(np.asarray(rollout.advantages), m.shape)[m]
  high, low = (rho > 1.2) & (a > 0), (rho < 0.8) & (a < 0)
  weight = (BATCH.old_log_probs - BATCH.sampler_log_probs)[m].astype(np.float64)
  expected = {
    "loss": loss,
    "clip_fraction": np.mean(high | low),
    "clip_fraction_low": np.mean(low),
    "clip_fraction_high": np.mean(high),
    "ratio_mean": rho.mean(),
    "ratio_max": rho.max(),
    "ratio_min": rho.min(),
    "old_kl": np.mean(rho - 1 - d),
    "effective_sample_size": rho.sum() ** 2 / rho.size / np.sum(rho**2),
    "bounded_fraction": 0.0,
    "zero_advantage_fraction": np.mean(a == 0),
    "factor_mean": np.mean(np.asarray(terms.factor)[m]),
    "dropped_fraction": np.mean(np.asarray(terms.factor)[m] == 0),
    "sampler_kl": np.mean(np.exp(weight) - 1 - weight),
    "surrogate": np.sum(np.asarray(rollout.weights * terms.surrogate)[m]),
    "divergence": np.sum(np.asarray(rollout.weights * terms.divergence)[m]),
  }
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
  assert high.any()
  assert low.any()


@EVERY
def test_metrics_of_a_cut_batch(name):
  objective = PRESETS[name]
  rollout = BATCH.prepare(objective)
  _, terms = objective(BATCH.log_probs, rollout)
  expected = gpo.summarize(terms, rollout)
  cuts = [slice(0, 1), slice(1, 4)]
  parts = [
    objective(BATCH.log_probs[c], jax.tree.map(lambda x, c=c: x[c], rollout))[1] for c in cuts
  ]
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  metrics = jax.jit(gpo.summarize)(joined, rollout)
  assert metrics.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def test_no_metric_of_a_ratio_overlooks_a_nan():
  old = np.zeros((1, 8, 1024), np.float32)
  rollout = gpo.dapo().prepare(np.arange(8.0)[None], np.ones_like(old), old)
  _, terms = gpo.dapo()(jnp.asarray(old).at[0, 3, 17].set(jnp.nan), rollout)
  metrics = jax.jit(gpo.summarize)(terms, rollout)
  names = ("ratio_mean", "ratio_max", "ratio_min", "effective_sample_size", "old_kl", "loss")
  assert all(jnp.isnan(metrics[name]) for name in names)


def test_bad_terms():
  objective = gpo.grpo()
  rollout = BATCH.prepare(objective)
  both = objective(BATCH.log_probs, rollout)
  for given in (both, None, rollout):
    with pytest.raises(ValueError, match=r"terms must be Terms; got .*summarize\(terms, rollout\)"):
      gpo.summarize(given, both[1])
  with pytest.raises(ValueError, match="rollout must be a Rollout.*got NoneType"):
    gpo.summarize(both[1], None)
  half = jax.tree.map(lambda x: x[:2], rollout)
  with pytest.raises(
    ValueError, match=r"terms must have .*got mask \[2, 4, 6\], terms \[4, 4, 6\]"
  ):
    gpo.summarize(both[1], half)


def test_metrics_of_an_empty_batch_are_0():
  objective = gpo.grpo()
  rollout = BATCH.prepare(objective, mask=np.zeros_like(BATCH.mask))
  metrics = gpo.summarize(objective(BATCH.log_probs, rollout)[1], rollout)
  assert {float(v) for v in metrics.values()} == {0.0}


def test_metrics_cost_nothing_when_unused():
  rollout = BATCH.prepare(gpo.grpo())

  def compiled(keep):
    both = jax.jit(lambda x: keep(*gpo.grpo()(x, rollout)))
    return both.lower(BATCH.log_probs).compile().cost_analysis()["flops"]

  alone = compiled(lambda loss, terms: loss)
  assert compiled(lambda loss, terms: (loss, gpo.summarize(terms, rollout))) > 1.2 * alone
  plain = jax.jit(lambda x: grpo_with(weightings.sequence_mean)(x, rollout)[0])
  assert plain.lower(BATCH.log_probs).compile().cost_analysis()["flops"] == alone


def test_dual_clip_and_dro_in_an_objective():
  for surrogate in (surrogates.dual_clip, functools.partial(surrogates.dro, beta=0.05)):
    value, gradient = run(gpo.grpo().replace(surrogate=surrogate))
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_kl_in_the_reward_is_one_line():
  kl = jnp.sum(BATCH.log_probs - BATCH.ref_log_probs, -1, where=BATCH.mask)
  rollout = BATCH.prepare(gpo.rloo(), rewards=BATCH.rewards - 0.1 * kl)
  assert jnp.isfinite(gpo.rloo()(BATCH.log_probs, rollout)[0])
  assert divergences.k1(1.0, None, None) == 1.0
