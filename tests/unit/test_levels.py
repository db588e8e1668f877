"""Levels inside an objective."""

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
