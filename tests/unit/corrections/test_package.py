"""Corrections by hand, composed, and with settings that are NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import Rollout, corrections, levels
from tests.support.batches import batch, value_and_grad

BATCH = batch()


def test_corrections_multiply_the_surrogate_only():
  base = gpo.grpo(beta=0.3)
  halved = base.replace(corrections=(lambda x, r: 0.5 + 0 * x, lambda x, r: 0.5 + 0 * x))
  _, plain = base(BATCH.log_probs, BATCH.prepare(base))
  loss, terms = halved(BATCH.log_probs, BATCH.prepare(halved))
  np.testing.assert_allclose(terms.divergence, plain.divergence, rtol=1e-6)
  np.testing.assert_allclose(terms.factor[BATCH.mask], 0.25)
  expected = 0.3 * plain.divergence - 0.25 * plain.surrogate
  np.testing.assert_allclose(terms.loss, expected, rtol=1e-5, atol=1e-7)
  as_data = BATCH.prepare(base).replace(factor=jnp.full(BATCH.mask.shape, 0.25))
  np.testing.assert_allclose(base(BATCH.log_probs, as_data)[0], loss, rtol=1e-6)


@pytest.mark.parametrize(
  "correction",
  [
    corrections.truncate_importance,
    functools.partial(corrections.truncate_importance, level=levels.sequence_product),
    functools.partial(corrections.mask_importance, low=0.8, high=1.2),
    functools.partial(corrections.mask_importance, low=0.9, high=1.1, level=levels.sequence),
    functools.partial(corrections.binary_kl_mask, low=1e-3),
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
    (corrections.total_variation_mask, "low"),
    (corrections.total_variation_mask, "high"),
    (functools.partial(corrections.binary_kl_mask, low=0.1), "high"),
    (corrections.binary_kl_mask, "low"),
    (functools.partial(corrections.reject, high=0.1), "low"),
    (corrections.reject, "high"),
    (corrections.truncate_importance, "floor"),
    (corrections.covariance_mask, "fraction"),
    (corrections.entropy_mask, "quantile"),
    (corrections.vespo, "k_pos"),
  ],
)
def test_a_nan_setting_of_a_correction_is_never_hidden(correction, setting):
  rollout = BATCH.prepare(gpo.dapo())
  traced = jax.jit(lambda nan: correction(jnp.asarray(BATCH.log_probs), rollout, **{setting: nan}))
  assert jnp.isnan(traced(np.float32(np.nan))[BATCH.mask]).any()


@pytest.mark.parametrize("preset", [gpo.vespo, gpo.topr])
def test_a_ratio_of_responses_is_of_the_old_policy_and_never_of_nothing(preset):
  objective = preset()
  stale = objective(BATCH.log_probs, BATCH.prepare(objective))[1]
  assert np.ptp(stale.factor[BATCH.mask]) > 0.1
  current = BATCH.prepare(objective, old_log_probs=None, sampler_log_probs=None)
  np.testing.assert_array_equal(objective(BATCH.log_probs, current)[1].factor[BATCH.mask], 1)
  with pytest.raises(ValueError, match="got sampler_log_probs alone: pass the sampler's"):
    objective(BATCH.log_probs, BATCH.prepare(objective, old_log_probs=None))


@pytest.mark.parametrize("drift", [-200.0, 200.0])
def test_a_response_far_off_weighs_what_it_would_at_the_bound(drift):
  far = np.full((2, 3), drift / 3, np.float32)
  ones, signs = jnp.ones((2, 3)), jnp.array([[1.0], [-1.0]])
  rollout = gpo.Rollout(advantages=signs, mask=ones, weights=ones, old_log_probs=0 * far)
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
  value = corrections.truncate_importance(data.log_probs, rollout, level=levels.sequence_product)
  expected = np.broadcast_to(np.minimum(whole, 2.0), mask.shape)
  np.testing.assert_allclose(value[mask], expected[mask], rtol=1e-5)
  on_policy = rollout.replace(old_log_probs=None)
  value = corrections.truncate_importance(data.log_probs, on_policy, cap=9.0)
  weight = np.exp(data.log_probs - data.sampler_log_probs)
  np.testing.assert_allclose(value[mask], np.minimum(weight, 9)[mask], rtol=1e-5)


def test_an_advantage_of_0_is_not_a_bad_one():
  """A ≥ 0 has the settings of good responses: the factor is logged, though it multiplies 0."""
  one, old = jnp.ones((3, 2)), jnp.full((3, 2), -1.0)
  signs = jnp.array([[1.0], [0.0], [-1.0]])
  rollout = Rollout(advantages=signs, mask=one, weights=one, old_log_probs=old)
  for correction in (corrections.vespo, corrections.topr):
    good, neither, bad = correction(old - 0.5, rollout)[:, 0]
    assert good == neither != bad


def test_limits_of_importance_weights_unless_said():
  log_w = jnp.log(jnp.array([0.49, 0.51, 1.9, 2.1, 4.9, 5.1]))
  one = jnp.ones(6)
  rollout = Rollout(
    advantages=one, mask=one, weights=one, old_log_probs=log_w, sampler_log_probs=0 * log_w
  )
  masked = corrections.mask_importance(one, rollout)
  np.testing.assert_allclose(masked, [0, 0.51, 1.9, 2.1, 4.9, 0], rtol=1e-6)
  truncated = corrections.truncate_importance(one, rollout)
  np.testing.assert_allclose(truncated, [0.49, 0.51, 1.9, 2, 2, 2], rtol=1e-6)


def test_binary_kl_mask_by_hand():
  rng = np.random.default_rng(0)
  p, mu = rng.uniform(0.01, 0.99, (2, 1, 200))
  a = rng.normal(size=(1, 200))
  kl = mu * np.log(mu / p) + (1 - mu) * np.log((1 - mu) / (1 - p))
  keep = ~((kl > 0.05) & (a * (p - mu) > 0))
  ones, old = jnp.ones((1, 200)), jnp.log(mu)
  rollout = Rollout(advantages=jnp.asarray(a), mask=ones, weights=ones, old_log_probs=old)
  value = corrections.binary_kl_mask(jnp.log(p), rollout, low=0.05)
  np.testing.assert_array_equal(value, keep)
  assert 0 < keep.mean() < 1
  certain = corrections.binary_kl_mask(jnp.zeros((1, 200)), rollout, low=0.05)
  assert jnp.isfinite(certain).all()


def test_a_token_at_the_limit_of_the_covariances_is_kept():
  log_probs = jnp.array([[-0.1, -3.0], [-1.0, -1.2]])
  ones, advantages = jnp.ones((2, 2)), jnp.array([2.0, -2.0])
  rollout = gpo.Rollout(advantages=advantages, mask=ones, weights=ones)
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


def test_each_correction_is_checked():
  def halves(log_probs, rollout):
    return jnp.full((6,), 0.5)

  def kept(log_probs, rollout):
    return rollout.mask

  for function, got in ((halves, r"float32 \[6\]"), (kept, r"bool \[4, 4, 6\]")):
    objective = gpo.dapo().replace(corrections=(corrections.topr, function))
    with pytest.raises(ValueError, match=f"corrections: {function.__name__} must return .*{got}"):
      objective(BATCH.log_probs, BATCH.prepare(objective))
