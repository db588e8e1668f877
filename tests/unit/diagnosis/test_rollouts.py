"""Masks, weights and advantages that are wrong, and those that only look unusual."""

import dataclasses
import inspect

import numpy as np
import pytest

import gpo_jax as gpo
from benchmarks import synthetic
from gpo_jax import advantages, weightings
from gpo_jax.diagnosis import rollouts
from gpo_jax.diagnosis.evidence import UnknownError, gather

SETTING = synthetic.Setting()
HEALTHY = synthetic.make(SETTING, 0)
PREPARED = HEALTHY.prepare()


def run(check, rewards=None, batch=HEALTHY, **fields):
  rollout = batch.prepare().replace(**fields)
  return check.function(gather(batch.log_probs, rollout, rewards))


# --- mask ---------------------------------------------------------------------------------------


def test_zeros_at_the_ends():
  for name, end in (("prompt counts", "start"), ("padding counts", "end")):
    text = run(rollouts.mask, batch=synthetic.SABOTAGES[name].make(SETTING, 0))[1]
    assert f"responses {end} with active tokens whose log-probability is exactly 0" in text


def test_certain_tokens_are_not_a_prompt():
  """Half of all tokens have log-probability 0, wherever they are."""
  zero = np.random.default_rng(0).random(HEALTHY.mask.shape) < 0.5
  logs = {name: np.where(zero, 0, getattr(HEALTHY, name)) for name in synthetic.LOGS}
  assert not run(rollouts.mask, batch=dataclasses.replace(HEALTHY, **logs))[1]


def test_empty_rows_and_small_holes():
  rng = np.random.default_rng(0)
  empty = HEALTHY.mask & (rng.random((8, 8, 1)) > 0.4)
  numbers, text = run(rollouts.mask, batch=dataclasses.replace(HEALTHY, mask=empty))
  count = np.sum(~empty.any(-1))
  assert numbers["empty rows"] == count / 64
  assert text == f"{count} of 64 rows have no active token"
  holes = HEALTHY.mask & (rng.random(HEALTHY.mask.shape) > 0.1)
  text = run(rollouts.mask, batch=dataclasses.replace(HEALTHY, mask=holes))[1]
  assert "have holes of one or two tokens" in text
  tool = HEALTHY.mask & (np.abs(np.arange(64) - 10) > 3)  # seven tokens of a tool
  assert not run(rollouts.mask, batch=dataclasses.replace(HEALTHY, mask=tool))[1]


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "weighting", ["token_mean", "sequence_mean", "sequence_sum", "constant_length", "token_sum"]
)
def test_every_weighting_is_known_whole_and_in_slices(weighting):
  function = getattr(weightings, weighting)
  length = {"length": 64} if "length" in inspect.signature(function).parameters else {}
  w = np.asarray(function(HEALTHY.mask, **length))
  assert not run(rollouts.weights, weights=w)[1]
  half = dataclasses.replace(HEALTHY)
  for name in ("rewards", "mask", *synthetic.LOGS):
    setattr(half, name, getattr(HEALTHY, name)[:4])
  assert not run(rollouts.weights, batch=half, weights=w[:4])[1]


def test_means_of_means():
  parts = [np.asarray(weightings.token_mean(HEALTHY.mask[i : i + 2])) for i in range(0, 8, 2)]
  text = run(rollouts.weights, weights=np.concatenate(parts) / 4)[1]
  assert text.endswith("as in a mean of means")
  parts = [np.asarray(weightings.sequence_mean(HEALTHY.mask[i : i + 2])) for i in range(0, 8, 2)]
  text = run(rollouts.weights, weights=np.concatenate(parts))[1]
  assert text == "weights sum to 4, not 1: parts were normalised on their own"


def test_one_prompt_one_share_is_a_weighting():
  w = HEALTHY.mask / HEALTHY.mask.sum((1, 2), keepdims=True) / 8
  assert not run(rollouts.weights, weights=w)[1]


def test_other_weights():
  shorter = HEALTHY.mask & (np.arange(64) < 10)
  text = run(rollouts.weights, weights=weightings.token_mean(shorter))[1]
  assert "the weights belong to another mask" in text
  assert "not finite" in run(rollouts.weights, weights=np.where(HEALTHY.mask, np.nan, 0))[1]
  assert "negative" in run(rollouts.weights, weights=-np.asarray(PREPARED.weights))[1]
  assert "all weights are 0" in run(rollouts.weights, weights=np.zeros(HEALTHY.mask.shape))[1]
  with pytest.raises(UnknownError, match="a weighting of your own"):
    run(rollouts.weights, weights=HEALTHY.mask / np.arange(1, 65))


# --- advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name",
  ["center", "standardize", "leave_one_out", "batch_standardize", "max_rl", "optimal_baseline"],
)
def test_advantages_of_the_package_are_known(name):
  function = getattr(advantages, name)
  lengths = {"lengths": HEALTHY.mask.sum(-1)} if name == "optimal_baseline" else {}
  values = np.asarray(function(HEALTHY.rewards, **lengths))
  assert not run(rollouts.advantages, HEALTHY.rewards, advantages=values)[1]


def test_advantages_that_are_something_else():
  rng, r = np.random.default_rng(0), HEALTHY.rewards
  centered = np.asarray(advantages.center(r))
  for values, message in (
    (r, "all advantages are ≥ 0, so nothing is pushed the other way"),
    (r - 2, "all advantages are ≤ 0"),
    (rng.normal(1.0, 1.0, r.shape), "advantages have mean"),
    (1e3 * centered, "the largest |A| is"),
    (np.asarray(advantages.center(r.T)).T[::-1], "advantages do not follow the rewards"),
    (-centered, "advantages do not follow the rewards: correlation -1.00"),
    (0 * r, "all advantages are 0, though rewards differ within groups"),
    (np.where(centered > 0, np.inf, centered), "advantages are not finite"),
  ):
    assert message in run(rollouts.advantages, r, advantages=values)[1]


def test_token_advantages_are_averaged_over_the_response():
  values = np.asarray(advantages.center(HEALTHY.rewards))[..., None] + np.zeros(HEALTHY.mask.shape)
  numbers = [
    run(rollouts.advantages, HEALTHY.rewards, advantages=a)[0] for a in (values, values[..., 0])
  ]
  assert numbers[0].keys() == numbers[1].keys()
  np.testing.assert_allclose(*(list(x.values()) for x in numbers), atol=1e-7)


# --- groups -------------------------------------------------------------------------------------


def groups(dead, of):
  """Advantages of groups of four, some of them dead, and equal log-probabilities."""
  a = np.tile([1.0, -1, 0, 0], (of, 1))
  a[:dead] = 0
  mask = np.ones((of, 4, 2))
  rollout = gpo.dapo().prepare(advantages=a, mask=mask)
  return gather(np.full(mask.shape, -1.0), rollout, np.where(a == 0, 0.5, a))


def test_dead_groups_are_judged_by_how_many_there_are():
  numbers, text = rollouts.dead_groups.function(groups(30, 40))
  assert numbers == {"groups": 40, "dead": 0.75, "their weight": 0.75}
  assert text.startswith("30 of 40 groups have no spread, and hold 75% of the weight")
  assert not rollouts.dead_groups.function(groups(3, 4))[1]
  assert not rollouts.dead_groups.function(groups(20, 40))[1]


def test_distillation_is_not_a_dead_batch():
  rollout = PREPARED.replace(advantages=np.zeros((8, 8)))
  with pytest.raises(UnknownError, match="distillation"):
    rollouts.dead_groups.function(gather(HEALTHY.log_probs, rollout))


def test_length_bias_is_the_permutation_test():
  lengths = HEALTHY.mask.sum(-1)
  numbers, _ = run(rollouts.length_bias)
  a = np.asarray(PREPARED.advantages)[..., 0].astype(float)
  rng = np.random.default_rng(0)
  product = np.sum(a * lengths)
  shuffled = [np.sum(rng.permuted(a, axis=1) * lengths) for _ in range(4000)]
  np.testing.assert_allclose(np.std(shuffled), abs(product / numbers["standard errors"]), rtol=0.05)
  longer = run(rollouts.length_bias, advantages=lengths - lengths.mean(1, keepdims=True))[1]
  assert longer.startswith("longer responses have the better advantages: correlation 1.00")
  shorter = run(rollouts.length_bias, advantages=lengths.mean(1, keepdims=True) - lengths)[1]
  assert shorter.startswith("shorter responses")
  with pytest.raises(UnknownError, match="no group in which both"):
    run(rollouts.length_bias, advantages=np.zeros((8, 8)))
