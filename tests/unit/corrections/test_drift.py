"""Limits with two sides, beside verl's definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import corrections, levels, surrogates
from tests.support.batches import batch

BATCH = batch(seed=5, drift=0.6, dtype=np.float64)
NEW, OLD = (np.minimum(x, -1e-3) for x in (BATCH.log_probs, BATCH.old_log_probs))
LOW, HIGH = 0.05, 0.15


def of_batch():
  mask = BATCH.mask
  advantages = np.random.default_rng(0).normal(size=(*mask.shape[:2], 1))
  rollout = gpo.Rollout(
    advantages=advantages, mask=mask, weights=mask / mask.sum(), old_log_probs=OLD
  )
  return rollout, np.broadcast_to(advantages, mask.shape)


def binary_kl(p, mu):
  return mu * np.log(mu / p) + (1 - mu) * np.log((1 - mu) / (1 - p))


def verl_keeps(distance, p, mu, a, low, high):
  """`dppo_tv` and `dppo_kl`: the high limit for A > 0, the low one for others."""
  good = (distance <= high) | (p <= mu)
  bad = (distance <= low) | (p >= mu)
  return np.where(a > 0, good, bad)


@pytest.mark.parametrize(
  ("mask_of", "distance"),
  [
    (corrections.total_variation_mask, lambda p, mu: np.abs(p - mu)),
    (corrections.binary_kl_mask, binary_kl),
  ],
)
def test_a_mask_with_a_limit_for_each_side(mask_of, distance, x64):
  rollout, a = of_batch()
  p, mu = np.exp(NEW), np.exp(OLD)
  at, d = BATCH.mask, distance(p, mu)
  assert np.min(np.abs(np.stack([d[at] - LOW, d[at] - HIGH]))) > 1e-9  # no token at a limit
  expected = verl_keeps(d, p, mu, a, LOW, HIGH)
  found = mask_of(NEW, rollout, low=LOW, high=HIGH)
  np.testing.assert_array_equal(found[at], expected[at])
  for sign in (a > 0, a < 0):
    assert 0 < expected[at & sign].mean() < 1
  # The controls: one limit for both, and the two exchanged.
  for low, high in ((LOW, LOW), (HIGH, HIGH), (HIGH, LOW)):
    other = verl_keeps(d, p, mu, a, low, high)
    assert np.any(other[at] != expected[at])
    np.testing.assert_array_equal(mask_of(NEW, rollout, low=low, high=high)[at], other[at])
  alone = mask_of(NEW, rollout, low=LOW)
  np.testing.assert_array_equal(alone[at], verl_keeps(d, p, mu, a, LOW, LOW)[at])


def test_one_threshold_is_another_gradient(x64):
  rollout, a = of_batch()
  ratio = np.exp(NEW - OLD)
  gradients = []
  for low, high in ((LOW, HIGH), (LOW, LOW)):
    objective = gpo.dppo(low=low, high=high).replace(surrogate=partial(surrogates.cispo, high=3.0))
    gradients.append(jax.grad(lambda x: objective(x, rollout)[0])(NEW))
    p, mu = np.exp(NEW), np.exp(OLD)
    keep = verl_keeps(np.abs(p - mu), p, mu, a, low, high)
    expected = -np.where(BATCH.mask, keep * np.minimum(ratio, 3.0) * a, 0) / BATCH.mask.sum()
    np.testing.assert_allclose(gradients[-1], expected, rtol=1e-12, atol=1e-15)
  difference = np.linalg.norm(gradients[0] - gradients[1]) / np.linalg.norm(gradients[0])
  assert difference > 0.1


def test_clipped_sequence_with_a_limit_for_each_side(x64):
  """verl's `geo_mean`: sgn(A) min(sgn(A) d, sgn(A) clip(d, −low, high)), averaged."""
  rollout, a = of_batch()
  mask = BATCH.mask
  log_ratio = NEW - OLD

  def verl(low, high):
    sign = np.sign(a)
    clipped = sign * np.minimum(sign * log_ratio, sign * np.clip(log_ratio, -low, high))
    return np.sum(clipped, -1, where=mask, keepdims=True) / np.maximum(
      mask.sum(-1, keepdims=True), 1
    )

  found = levels.clipped_sequence(jnp.asarray(log_ratio), rollout, low=0.1, high=0.4)
  expected = np.broadcast_to(verl(0.1, 0.4), mask.shape)
  np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-12)
  assert np.abs(expected - verl(0.1, 0.1))[mask].max() > 0.01
  gradient = jax.grad(
    lambda x: jnp.sum(levels.clipped_sequence(x, rollout, low=0.1, high=0.4), where=mask)
  )(log_ratio)
  free = np.where(a > 0, log_ratio < 0.4, log_ratio > -0.1) & mask
  np.testing.assert_allclose(gradient, free * 1.0, rtol=1e-12)


def test_a_drift_at_the_limit_is_kept():
  one, bad = jnp.ones((1, 4)), -jnp.ones((1, 1))
  for drift, kept in ((0.5, 1), (0.5625, 0)):
    rollout = gpo.Rollout(advantages=bad, mask=one, weights=one, old_log_probs=-one)
    found = corrections.off_policy_sequence_mask(-one - drift, rollout, threshold=0.5)
    np.testing.assert_array_equal(found, kept * one)
