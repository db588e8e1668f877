"""`decoupled` with groups told apart by ids, and statistics over tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import advantages

RNG = np.random.default_rng(0)
KINDS = RNG.normal(size=(2, 7)) * np.array([[1.0], [30.0]])
IDS = np.array([5, 5, -1, 9, -1, 5, 9])
WHERE = np.array([1, 1, 1, 1, 1, 0, 1], bool)
decoupled = partial(advantages.decoupled, weights=np.array([2.0, -1.0]), eps=1e-6)
by_ids = jax.jit(lambda kinds, where, ids: advantages.by_group(decoupled, kinds, ids, where))


def standardized(rewards, eps=1e-6):
  return (rewards - rewards.mean()) / (rewards.std(ddof=1) + eps)


def by_hand(kinds, ids, where):
  """GDPO: each kind in its group, then their weighted sum over the batch."""
  mixed = np.zeros(ids.shape)
  for weight, rewards in zip((2.0, -1.0), kinds):
    for group in set(ids):
      at = where & (ids == group)
      mixed[at] += weight * standardized(rewards[at])
  return np.where(where, np.where(where, mixed - mixed[where].mean(), 0), 0) / (
    mixed[where].std(ddof=1) + 1e-6
  )


def test_decoupled_by_ids(x64):
  expected = by_hand(KINDS, IDS, WHERE)
  np.testing.assert_allclose(by_ids(KINDS, WHERE, IDS), expected, rtol=1e-12)
  # The controls: one group, and the kinds summed before they are standardised.
  one_group = by_ids(KINDS, WHERE, 0 * IDS)
  assert np.abs(one_group - expected).max() > 0.1
  np.testing.assert_allclose(one_group, jax.jit(decoupled)(KINDS, WHERE), rtol=1e-12)
  summed = by_hand(np.stack([KINDS[0] - KINDS[1] / 2, 0 * IDS]), IDS, WHERE)
  assert np.abs(summed - expected).max() > 0.1


def test_decoupled_of_packed_rows(x64):
  objective = gpo.dapo().replace(advantage=decoupled)
  segment_ids = np.array([[1, 1, 2, 2, 3], [1, 2, 2, 3, 3]])
  group_ids = np.array([[7, 7, 8], [8, 7, 8]])
  ids = {"segment_ids": segment_ids, "group_ids": group_ids}
  kinds = RNG.normal(size=(2, 2, 3))
  prepare = jax.jit(lambda kinds: objective.prepare(kinds, jnp.ones((2, 5), bool), **ids))
  rollout = prepare(kinds)
  per_response = by_hand(kinds.reshape(2, 6), group_ids.ravel(), np.ones(6, bool)).reshape(2, 3)
  expected = np.take_along_axis(per_response, segment_ids - 1, axis=-1)
  np.testing.assert_allclose(rollout.advantages, expected, rtol=1e-12)


def test_bad_ids():
  for call in (decoupled, partial(advantages.by_group, decoupled)):
    with pytest.raises(
      ValueError, match=r"group_ids must have the shape of rewards; .*\[7\].*\[6\]"
    ):
      call(KINDS, group_ids=IDS[:6])
    with pytest.raises(ValueError, match="group_ids must be integers"):
      call(KINDS, group_ids=IDS + 0.5)


def test_statistics_over_tokens_are_of_rewards_broadcast_to_the_mask(x64):
  """As in verl's and OpenRLHF's REINFORCE++: a long response counts for more."""
  rewards = RNG.normal(size=(3, 2))
  mask = np.arange(4) < np.array([[4, 1], [2, 3], [1, 0]])[..., None]
  tokens = np.broadcast_to(rewards[..., None], mask.shape)
  found = advantages.batch_standardize(tokens, mask)
  active = tokens[mask]
  expected = np.where(mask, (tokens - active.mean()) / (active.std(ddof=1) + 1e-8), 0)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  of_responses = advantages.batch_standardize(rewards, mask.any(-1))[..., None]
  assert np.abs(np.where(mask, found - of_responses, 0)).max() > 0.1
