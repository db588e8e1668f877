"""Levels inside an objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support.batches import batch, value_and_grad

BATCH = batch()


@pytest.mark.parametrize(
  "name", ["token", "sequence", "sequence_token", "sequence_product", "clipped_sequence"]
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


def test_the_largest_log_ratio_of_a_response(x64):
  mask = np.array([[[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]], bool)
  x = np.array([[[0.1, -0.2, 9.0, 0.3], [0.5, 0.5, -1.0, 0.0], [1.0, 2.0, 3.0, 4.0]]])
  rollout = gpo.Rollout(advantages=np.ones((1, 3)), mask=mask, weights=1.0 * mask)
  found = gpo.levels.sequence_max(x, rollout)
  np.testing.assert_array_equal(found[0, :, 0], [0.3, 0.5, 0])
  shares = np.arange(1.0, 13).reshape(mask.shape)
  loss = lambda x: jnp.sum(shares * gpo.levels.sequence_max(x, rollout), where=mask)
  expected = np.zeros(mask.shape)
  expected[0, 0, 3], expected[0, 1, :2] = 1 + 2 + 4, (5 + 6 + 7 + 8) / 2  # a tie shares
  np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-12)
  # Packed, each response has its own.
  ids = np.array([[1, 1, 2, 2, 2]])
  row = gpo.Rollout(
    advantages=1.0, mask=np.ones((1, 5), bool), weights=np.ones((1, 5)), segment_ids=ids
  )
  packed = gpo.levels.sequence_max(jnp.array([[-3.0, -1.0, -2.0, 5.0, 4.0]]), row)
  np.testing.assert_array_equal(packed, [[-1, -1, 5, 5, 5]])
  # A NaN, or what is not finite, is not overlooked.
  for bad in (np.nan, -np.inf, np.inf):
    y = jnp.asarray(x).at[0, 1, 2].set(bad)
    values = np.where(mask, gpo.levels.sequence_max(y, rollout), 0)
    np.testing.assert_array_equal(np.isnan(values).any(-1), [[False, True, False]])
