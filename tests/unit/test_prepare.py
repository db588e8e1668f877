"""`Objective.prepare`: packed rows, ids, several kinds of reward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import divergences
from tests.support.batches import COVERING, PRESETS, batch, value_and_grad

BATCH = batch()
EVERY = pytest.mark.parametrize("name", COVERING)


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
  batch_wide = gpo.dapo().replace(advantage=gpo.advantages.batch_standardize)
  with pytest.raises(ValueError, match="leave group_ids out"):
    batch_wide.prepare(BATCH.rewards, BATCH.mask, group_ids=np.ones((4, 4), int))


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


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint32, list])
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


@pytest.mark.slow
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


def test_bad_segments_are_loud():
  with pytest.raises(
    ValueError, match=r"segment_ids must be integers; got dtype float32: pass 1, 2"
  ):
    gpo.grpo().prepare([[1.0, 0.0]], jnp.ones((1, 2)), segment_ids=jnp.ones((1, 2)))
  with pytest.raises(ValueError, match=r"one value per response, .*got rewards \[\]"):
    gpo.grpo().prepare(1.0, jnp.ones((1, 2)), segment_ids=jnp.ones((1, 2), int))
  objective, from_zero = gpo.grpo(beta=None), jnp.array([[0, 0, 1, 1, 2, 2]])
  prepare = lambda ids: objective.prepare([[1.0, 0.0, 0.5]], jnp.ones((1, 6)), segment_ids=ids)
  with pytest.raises(ValueError, match="segment_ids must be 1, 2, ..."):
    prepare(from_zero)
  assert jnp.isnan(jax.jit(lambda ids: objective(jnp.zeros((1, 6)), prepare(ids))[0])(from_zero))
  ids = jnp.array([[1, 1, 2, 2, 3, 3]])  # three responses, two rewards
  rollout = objective.prepare([[1.0, 0.0]], jnp.ones((1, 6)), segment_ids=ids)
  assert jnp.isnan(objective(jnp.zeros((1, 6)), rollout)[0])


def test_kl_in_the_reward_is_one_line():
  kl = jnp.sum(BATCH.log_probs - BATCH.ref_log_probs, -1, where=BATCH.mask)
  rollout = BATCH.prepare(gpo.rloo(), rewards=BATCH.rewards - 0.1 * kl)
  assert jnp.isfinite(gpo.rloo()(BATCH.log_probs, rollout)[0])
  assert divergences.k1(1.0, None, None) == 1.0


FLAT = (np.array([1.0, 0.0, 1.0, 0.0], np.float32), np.ones((4, 3), bool))


def test_padding_before_the_first_response_makes_no_nan():
  ids = jnp.array([[0, 1, 1, 2]])
  with jax.debug_nans(True):
    rollout = gpo.gpg().prepare(jnp.array([[1.0, 0.0]]), ids > 0, segment_ids=ids)
  np.testing.assert_array_equal(rollout.weights[0] > 0, ids[0] > 0)
  np.testing.assert_allclose(rollout.advantages[0, 1:], [0.5, 0.5, -0.5])


def test_a_flat_batch_is_not_one_group():
  rewards, mask = FLAT
  with pytest.raises(ValueError, match=r"got \[4\], .*rewards.reshape\(P, G\).*rewards\[None\]"):
    gpo.grpo().prepare(rewards, mask)
  for objective in (gpo.reinforce_plus_plus(), gpo.dapo().replace(advantage=lambda r, w: r)):
    with pytest.raises(ValueError, match="would be one group of 4"):
      objective.prepare(rewards, mask)
  with pytest.raises(ValueError, match=r"got \[\], which would be one group of 1"):
    gpo.grpo().prepare(1.0, mask[0])
  one = gpo.grpo(beta=None).prepare(rewards[None], mask[None])
  by_id = gpo.grpo(beta=None).prepare(rewards, mask, group_ids=np.zeros(4, int))
  np.testing.assert_allclose(one.advantages[0], by_id.advantages, rtol=1e-6)


def test_groups_of_one_train_nothing():
  rewards, mask = np.ones((4, 1), np.float32), np.ones((4, 1, 3), bool)
  names = ("grpo", "dr_grpo", "rloo", "max_rl", "gspo")
  for name in names:
    objective = PRESETS[name]
    with pytest.raises(ValueError, match=r"groups of at least 2; got \[4, 1\], groups of one"):
      objective.prepare(rewards, mask)
  gpo.reinforce_plus_plus().prepare(rewards, mask)
  gpo.dapo().replace(advantage=lambda r, where: r).prepare(rewards, mask)


def test_advantages_in_place_of_rewards():
  rng = np.random.default_rng(0)
  of_responses = rng.normal(size=(4, 4)).astype(np.float32)
  of_tokens = np.broadcast_to(of_responses[..., None], BATCH.mask.shape).copy()
  objective, same = gpo.dapo(), []
  for given in (of_responses, of_responses[..., None], of_tokens):
    rollout = objective.prepare(
      mask=BATCH.mask, old_log_probs=BATCH.old_log_probs, advantages=given
    )
    same.append(objective(BATCH.log_probs, rollout)[0])
  np.testing.assert_allclose(same, same[0], rtol=1e-6)


def test_advantages_of_packed_rows():
  ids = np.array([[1, 1, 2, 0], [1, 2, 2, 2]])
  given = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
  rollout = gpo.dapo().prepare(mask=ids > 0, advantages=given, segment_ids=ids)
  np.testing.assert_array_equal(rollout.advantages[ids > 0], [1, 1, 2, 3, 4, 4, 4])


def test_as_many_rewards_as_tokens_are_rewards_of_segments():
  ids = np.array([[1, 1, 1, 2], [1, 2, 2, 2]])
  rewards = np.array([[1.0, 0.0, 9.0, 9.0], [0.0, 1.0, 9.0, 9.0]], np.float32)
  prepare = lambda r: gpo.dr_grpo(length=4).prepare(r, ids > 0, segment_ids=ids).advantages
  expected = [[0.5, 0.5, 0.5, -0.5], [-0.5, 0.5, 0.5, 0.5]]
  for segments in (2, 3, 4):
    np.testing.assert_array_equal(prepare(rewards[:, :segments]), expected)


def test_advantages_of_the_tokens_of_packed_rows():
  ids = np.array([[1, 1, 2, 0], [1, 2, 2, 2]])
  given = np.arange(8, dtype=np.float32).reshape(2, 4)
  rollout = gpo.dapo().prepare(mask=ids > 0, advantages=given, segment_ids=ids)
  np.testing.assert_array_equal(rollout.advantages, given)


def test_rewards_or_advantages():
  given = np.ones((4, 4), np.float32)
  with pytest.raises(ValueError, match="one of the two; got both"):
    gpo.dapo().prepare(given, BATCH.mask, advantages=given)
  with pytest.raises(ValueError, match="group_ids go with rewards"):
    gpo.dapo().prepare(mask=BATCH.mask, advantages=given, group_ids=np.ones((4, 4), int))


def test_an_advantage_sees_what_it_closes_over_now():
  base, groups = [0.0], {"with": np.zeros((1, 2), int), "without": None}
  objective = gpo.dapo().replace(advantage=lambda rewards, where: rewards - base[0])
  for kind, ids in groups.items():
    seen = []
    for base[0] in (0.0, 0.5):
      rollout = objective.prepare([[1.0, 0.0]], np.ones((1, 2, 1), bool), group_ids=ids)
      seen.append(np.ravel(rollout.advantages))
    np.testing.assert_array_equal(seen, [[1, 0], [0.5, -0.5]], err_msg=kind)


class Running:
  """An advantage with a state: a baseline that moves with each batch."""

  baseline = 0.0

  def __call__(self, rewards, where):
    advantages = rewards - self.baseline
    self.baseline = 0.5 * self.baseline + 0.5 * float(jnp.mean(rewards, where=where))
    return advantages


def test_a_running_baseline_runs():
  objective, mask = gpo.dapo().replace(advantage=Running()), np.ones((1, 2, 1), bool)
  batches = ([[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]])
  seen = [np.ravel(objective.prepare(rewards, mask).advantages) for rewards in batches]
  np.testing.assert_array_equal(seen, [[1, 0], [0.75, -0.25], [0.625, 0.625]])


@pytest.mark.parametrize("name", ["grpo", "reinforce_plus_plus"])
def test_a_response_without_a_reward_is_left_out_by_its_mask(name):
  """A NaN reward of a masked response is as if the response had not been sampled."""
  objective = gpo.preset(name)
  rewards, mask = np.array([[1.0, np.nan, 0.0, 2.0]]), np.ones((1, 4, 3), bool)
  mask[0, 1] = False
  old = np.linspace(-2.0, -1.0, 12).reshape(1, 4, 3)
  fields = {"old_log_probs": old, "ref_log_probs": old - 0.1}

  def run(keep):
    rollout = objective.prepare(
      rewards[:, keep], mask[:, keep], **{k: x[:, keep] for k, x in fields.items()}
    )
    return value_and_grad(objective, jnp.asarray(old[:, keep], jnp.float32) + 0.1, rollout)

  loss, gradient = run([0, 1, 2, 3])
  wanted, wanted_gradient = run([0, 2, 3])
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  np.testing.assert_allclose(gradient[:, [0, 2, 3]], wanted_gradient, rtol=1e-6)
  assert not np.any(gradient[:, 1])
