"""Policies that are too far apart, with the numbers by hand; and distances that are healthy."""

import dataclasses

import numpy as np
import pytest

from benchmarks import synthetic
from gpo_jax.diagnosis import distances
from gpo_jax.diagnosis.evidence import UnknownError, gather

SETTING = synthetic.Setting()
HEALTHY = synthetic.make(SETTING, 0)


def evidence(batch):
  return gather(batch.log_probs, batch.prepare(), batch.rewards)


def run(check, batch):
  found = evidence(batch)
  pairs = [found.pair(name) for name in check.policies]
  return check.function(found, *pairs)


def test_stale_by_hand():
  batch = synthetic.make(dataclasses.replace(SETTING, drift=1.5, with_sampler=False), 0)
  numbers, text = run(distances.stale, batch)
  d = (batch.log_probs - batch.old_log_probs)[batch.mask].astype(float)
  ratio = np.exp(d)
  expected = {
    "KL per token": np.mean(ratio - 1 - d),
    "KL per response": -d.sum() / batch.mask.any(-1).sum(),
    "χ² of tokens": np.mean(ratio**2) - 1,
    "effective sample size of tokens": ratio.sum() ** 2 / np.sum(ratio**2) / d.size,
    "correlation": np.corrcoef(batch.log_probs[batch.mask], batch.old_log_probs[batch.mask])[0, 1],
  }
  assert numbers.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(numbers[name], value, rtol=1e-6, err_msg=name)
  assert text.startswith("log_probs have left old_log_probs: KL 0.")
  assert "another order" not in text


def test_rows_in_another_order_are_said_to_be():
  batch = dataclasses.replace(HEALTHY, sampler_log_probs=None)
  batch.old_log_probs = HEALTHY.old_log_probs[::-1].copy()
  batch.old_log_probs[batch.old_log_probs == 0] = -1
  assert "rows or tokens in another order?" in run(distances.stale, batch)[1]


def test_few_tokens_are_not_accused():
  """One token in ten that is far off, ten tokens: the mean is above the limit, by chance."""
  mask = np.zeros((1, 2, 8), bool)
  mask[..., :5] = True
  logs = np.full(mask.shape, -1.0, np.float32)
  logs[0, 0, 0] = -2.5
  batch = dataclasses.replace(
    HEALTHY, rewards=np.eye(2)[:1], mask=mask, log_probs=logs, old_log_probs=0 * logs - 1
  )
  batch.sampler_log_probs = batch.ref_log_probs = None
  numbers, text = run(distances.stale, batch)
  assert numbers["KL per token"] > 0.05
  assert not text


def test_mismatch_is_what_bfloat16_does_not_explain():
  for change, wrong in (({"bfloat16": True}, False), ({"mismatch": 0.2}, True)):
    batch = synthetic.make(dataclasses.replace(SETTING, **change), 0)
    numbers, text = run(distances.mismatch, batch)
    d = np.abs(batch.sampler_log_probs - batch.old_log_probs)[batch.mask].astype(float)
    np.testing.assert_allclose(numbers["mean(e^|Δ|) − 1"], np.mean(np.exp(d) - 1), rtol=1e-6)
    np.testing.assert_allclose(numbers["largest |Δ|"], d.max(), rtol=1e-6)
    assert bool(text) == wrong


def test_clipping_is_off_only_if_the_samples_are_of_another_policy():
  off = synthetic.SABOTAGES["old recomputed at each step"].make(SETTING, 0)
  assert run(distances.clipping_off, off)[1].startswith("old_log_probs equal log_probs, so nothing")
  # One step per batch: the sampler's log-probabilities are the policy's, old ones left out.
  for old in (HEALTHY.log_probs, None):
    assert not run(distances.clipping_off, dataclasses.replace(HEALTHY, old_log_probs=old))[1]
  moved = synthetic.make(dataclasses.replace(SETTING, drift=0.3), 0)  # old as it should be
  assert not run(distances.clipping_off, moved)[1]


def test_few_responses_by_hand():
  setting = synthetic.Setting(**synthetic._LONG, drift=0.5, with_sampler=False)
  batch = synthetic.make(setting, 0)
  numbers, text = run(distances.few_responses, batch)
  ratio = np.exp(np.sum(batch.log_probs - batch.old_log_probs, -1, where=batch.mask, dtype=float))
  effective = ratio.sum() ** 2 / np.sum(ratio**2)
  np.testing.assert_allclose(numbers["effective sample size"], effective / 64, rtol=1e-6)
  np.testing.assert_allclose(numbers["share of the largest"], ratio.max() / ratio.sum(), rtol=1e-6)
  assert f"64 responses are worth {effective:.1f}" in text
  assert not run(distances.few_responses, HEALTHY)[1]


def test_a_reference_may_equal_the_policy_before_it_moves():
  same = dataclasses.replace(HEALTHY, ref_log_probs=HEALTHY.log_probs)
  assert not run(distances.reference, same)[1]
  moving = synthetic.SABOTAGES["reference moves along"].make(SETTING, 0)
  text = run(distances.reference, moving)[1]
  assert text == "ref_log_probs equal log_probs, which have moved away from old_log_probs"
  fixed = synthetic.make(dataclasses.replace(SETTING, drift=0.3), 0)
  assert not run(distances.reference, fixed)[1]


def test_bounded_counts_tokens():
  batch = dataclasses.replace(HEALTHY, old_log_probs=HEALTHY.old_log_probs.copy())
  place = tuple(np.argwhere(batch.mask)[5])
  batch.old_log_probs[place] = -50
  numbers, text = run(distances.bounded, batch)
  assert numbers == {"old_log_probs at the bound": 1, "ref_log_probs at the bound": 0}
  assert text == "1 tokens of old_log_probs are 20 nats or more from log_probs"


def test_without_other_policies_there_is_no_distance():
  alone = dataclasses.replace(
    HEALTHY, old_log_probs=None, sampler_log_probs=None, ref_log_probs=None
  )
  for check in (distances.bounded, distances.stale, distances.clipping_off, distances.mismatch):
    with pytest.raises(UnknownError, match=r"no (old|sampler)_log_probs"):
      run(check, alone)
