"""Log-probabilities of another place, temperature or support; and what only looks like it."""

import dataclasses

import numpy as np
import pytest

from benchmarks import synthetic
from gpo_jax.diagnosis import readings
from gpo_jax.diagnosis.evidence import gather
from gpo_jax.diagnosis.readings import _temperature

SETTING = synthetic.Setting(with_old=False)
HEALTHY = synthetic.make(SETTING, 0)


def evidence(batch):
  return gather(batch.log_probs, batch.prepare(), batch.rewards)


def sampler(batch):
  return evidence(batch).pair("sampler_log_probs")


def run(check, batch, name="sampler_log_probs"):
  found = evidence(batch)
  return check.function(found, found.pair(name)) if check.policies else check.function(found)


def changed(change, **fields):
  """The healthy batch with another sampler."""
  return dataclasses.replace(HEALTHY, sampler_log_probs=change(HEALTHY.sampler_log_probs), **fields)


@pytest.mark.parametrize(("by", "side"), [(1, "late"), (-1, "early")])
def test_shifted_says_which_way(by, side):
  batch = changed(lambda x: np.roll(x, by, axis=-1))
  numbers, text = run(readings.shifted, batch)
  assert text.startswith(f"sampler_log_probs are one position {side}: ")
  assert numbers[f"mean |Δ| at lag {-by:+d}"] == 0
  assert numbers["mean |Δ| at lag +0"] > 1


def test_a_shift_by_two_and_noise_are_not_shifts_by_one():
  rng = np.random.default_rng(0)
  for change in (
    lambda x: np.roll(x, 2, axis=-1),
    lambda x: x + rng.normal(0, 0.5, x.shape),
  ):
    assert not run(readings.shifted, changed(change))[1]


def test_too_few_neighbours_are_no_evidence():
  """Two responses of three tokens, one position late: four pairs."""
  mask = np.zeros((1, 2, 4), bool)
  mask[..., :3] = True
  logs = np.array([[[-1.0, -2, -7, 0], [-3.0, -9, -4, 0]]], np.float32)
  batch = dataclasses.replace(
    HEALTHY, rewards=np.eye(2)[:1], mask=mask, log_probs=logs, ref_log_probs=None
  )
  batch.sampler_log_probs = logs[..., [2, 0, 1, 3]]
  numbers, text = run(readings.shifted, batch)
  assert numbers["mean |Δ| at lag -1"] == 0
  assert not text


@pytest.mark.parametrize("policy", synthetic.POLICIES)
@pytest.mark.parametrize("temperature", [0.6, 0.8, 1.25])
def test_temperature_is_estimated(policy, temperature):
  setting = dataclasses.replace(SETTING, policy=policy, temperature=temperature, length=128)
  batch = synthetic.make(setting, 1)
  numbers, text = run(readings.temperature, batch)
  np.testing.assert_allclose(numbers["temperature"], temperature, rtol=0.1)
  assert f"temperature {numbers['temperature']:.2f}" in text
  # The ratio of spreads is no estimate of it: states of low entropy do not spread.
  if policy != "flat":
    assert abs(1 / numbers["spread"] - temperature) > 0.4 * abs(1 - temperature)


def test_temperature_is_exact_in_expectation_from_either_sampler():
  """All tokens of three states, weighed by the policy that they are sampled from."""
  logits = np.random.default_rng(0).normal(0, 2, (3, 6))
  p = synthetic._log_softmax(logits).astype(float)
  q = synthetic._log_softmax(logits / 0.7).astype(float)
  for sampled in (p, q):
    counts = np.round(1e5 * np.exp(sampled)).astype(int).ravel()
    values, base = np.repeat(q.ravel(), counts), np.repeat(p.ravel(), counts)
    pair = dataclasses.replace(sampler(HEALTHY), values=values, base_values=base)
    np.testing.assert_allclose(_temperature(pair), 0.7, rtol=2e-3)


def test_training_is_not_a_temperature():
  """The control: the variances alone would accuse a policy that has moved."""
  batch = synthetic.make(dataclasses.replace(SETTING, drift=1.0), 0)
  numbers, text = run(readings.temperature, batch)
  assert abs(np.log(numbers["spread"])) > 0.04
  assert abs(numbers["standard errors"]) > 5
  assert not text


def test_support_estimates_the_mass_that_was_kept():
  setting = dataclasses.replace(SETTING, policy="flat", top_p=0.9)
  numbers, text = run(readings.support, synthetic.make(setting, 0))
  assert 0.9 < numbers["mass kept"] < 0.92
  assert f"holds {numbers['mass kept']:.1%} of the probability" in text


@pytest.mark.parametrize(
  "change", [{"temperature": 0.7}, {"temperature": 1.3}, {"drift": 0.5}, {"bfloat16": True}]
)
def test_other_faults_are_not_a_support(change):
  batch = synthetic.make(dataclasses.replace(SETTING, **change), 0)
  assert not run(readings.support, batch)[1]


@pytest.mark.parametrize(
  ("value", "share", "kind"),
  [
    (0.0, 0.05, "exactly 0 at"),
    (-1.0, 1.0, "exactly -1 at"),
    (-1.0, 0.2, "exactly -1 at"),
    (np.nan, 0.001, "NaN at"),
    (-np.inf, 0.001, "infinite at"),
    (0.4, 0.001, "positive at"),
  ],
)
def test_placeholders(value, share, kind):
  batch = synthetic._fill(value, share)(SETTING, 1)
  numbers, text = run(readings.placeholder, batch)
  assert text.startswith(f"sampler_log_probs is {kind} ")
  count = numbers[f"sampler_log_probs {kind.removesuffix(' at')}"]
  assert f"at {count:,.0f} of {batch.mask.sum():,} tokens" in text
  if share < 1:  # the others are examined without these tokens
    assert {finding.name for finding in batch.diagnose().findings} == {"placeholder"}


def test_what_is_not_a_placeholder():
  certain = HEALTHY.mask & (HEALTHY.log_probs > -0.1)
  for change in (
    lambda x: np.where(certain, 0, x),  # an engine that rounds near-certain tokens
    lambda x: np.round(x, 1),  # few digits: constants everywhere, all of them close
    lambda x: np.where(HEALTHY.mask, x, np.nan),
    lambda x: x + 5e-4,  # rounding
  ):
    assert not run(readings.placeholder, changed(change))[1]


def test_the_neutral_replacement_of_missing_log_probs():
  """As the documentation says: the trainer's number, and with it a weight of exactly 1."""
  missing = HEALTHY.mask & (np.random.default_rng(0).random(HEALTHY.mask.shape) < 0.05)
  holes = changed(lambda x: np.where(missing, np.nan, x))
  assert run(readings.placeholder, holes)[1]
  filled = changed(lambda x: np.where(np.isnan(holes.sampler_log_probs), HEALTHY.log_probs, x))
  assert not filled.diagnose().findings
  weight = np.exp(filled.log_probs - filled.sampler_log_probs)
  np.testing.assert_array_equal(weight[missing], 1)
