"""Advantages: formulas, exact zeros, samples left out, uneven groups, and what they optimise."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import gpo_jax as gpo
from gpo_jax import advantages as adv

REWARDS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)


def optimal_baseline(rewards, where=None):
  lengths = np.broadcast_to(np.arange(1, np.shape(rewards)[-1] + 1), np.shape(rewards))
  return adv.optimal_baseline(rewards, where, lengths=lengths)


SIMPLE = [
  adv.center,
  adv.standardize,
  adv.leave_one_out,
  adv.batch_standardize,
  adv.max_rl,
  adv.pass_at_k,
  Partial(adv.standardize, ddof=0, eps=0.0),
  optimal_baseline,
]
IDS = [getattr(fn, "func", fn).__name__ for fn in SIMPLE]


def by_hand(name, rewards, lengths=None, ddof=1, eps=1e-4):
  """One group, in Python floats."""
  mean = sum(rewards) / len(rewards)
  if name == "center":
    return [r - mean for r in rewards]
  if name == "standardize":
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))
    return [(r - mean) / (std + eps) for r in rewards]
  if name == "leave_one_out":
    total = sum(rewards)
    return [r - (total - r) / (len(rewards) - 1) for r in rewards]
  if name == "max_rl":
    return [(r - mean) / mean if mean > 0 else 0.0 for r in rewards]
  if name == "pass_at_k":
    first, second = sorted(rewards)[-1], sorted(rewards)[-2]
    return [first - second if r == first else 0.0 for r in rewards]
  baseline = sum(n * r for n, r in zip(lengths, rewards)) / sum(lengths)
  return [r - baseline for r in rewards]


@pytest.mark.parametrize("name", ["center", "standardize", "leave_one_out", "max_rl", "pass_at_k"])
def test_formulas(name):
  expected = [by_hand(name, group) for group in REWARDS.tolist()]
  np.testing.assert_allclose(getattr(adv, name)(REWARDS), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("ddof", "eps"), [(0, 0.0), (1, 0.5), (0.5, 0.1)])
def test_the_settings_of_standard_deviations(ddof, eps):
  expected = [by_hand("standardize", group, None, ddof, eps) for group in REWARDS.tolist()]
  np.testing.assert_allclose(adv.standardize(REWARDS, ddof=ddof, eps=eps), expected, rtol=2e-5)
  flat = by_hand("standardize", REWARDS.ravel().tolist(), None, ddof, eps)
  value = adv.batch_standardize(REWARDS, ddof=ddof, eps=eps)
  np.testing.assert_allclose(value.ravel(), flat, rtol=2e-5)
  twice = by_hand("standardize", np.ravel(expected).tolist(), None, ddof, eps)
  value = adv.decoupled(REWARDS[None], ddof=ddof, eps=eps)
  np.testing.assert_allclose(value.ravel(), twice, rtol=2e-5)


def test_formulas_with_more_than_rewards():
  lengths = np.array([[1, 2, 3, 4, 0]] * 3)
  expected = [by_hand("opo", group, n) for group, n in zip(REWARDS.tolist(), lengths.tolist())]
  np.testing.assert_allclose(
    adv.optimal_baseline(REWARDS, lengths=lengths), expected, rtol=1e-5, atol=1e-6
  )
  flat = by_hand("standardize", REWARDS.ravel().tolist(), eps=1e-8)
  np.testing.assert_allclose(adv.batch_standardize(REWARDS).ravel(), flat, rtol=2e-5)
  kinds = np.stack([REWARDS, REWARDS[::-1] ** 2])
  each = [[by_hand("standardize", group) for group in kind] for kind in kinds.tolist()]
  mixed = 2 * np.array(each[0]) - np.array(each[1])
  expected = by_hand("standardize", mixed.ravel().tolist())
  value = adv.decoupled(kinds, weights=jnp.array([2.0, -1.0]))
  np.testing.assert_allclose(value.ravel(), expected, rtol=2e-5)
  np.testing.assert_allclose(
    adv.decoupled(REWARDS[None]), adv.decoupled(3 * REWARDS[None]), rtol=1e-3
  )


@pytest.mark.parametrize("fn", SIMPLE, ids=IDS)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.0, -7.7, 1e20])
@pytest.mark.parametrize("size", [5])
def test_equal_rewards_are_worth_exactly_nothing(fn, reward, size):
  rewards = np.full((2, size), reward, np.float32)
  np.testing.assert_array_equal(fn(rewards), np.zeros((2, size)))
  np.testing.assert_array_equal(jax.jit(fn)(rewards), np.zeros((2, size)))


def test_the_textbook_formula_makes_noise_of_equal_rewards():
  rewards = jnp.full(7, 0.1)
  noisy = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-9)
  assert jnp.max(jnp.abs(noisy)) > 0.1
  np.testing.assert_array_equal(adv.standardize(rewards, eps=1e-9), np.zeros(7))


@pytest.mark.parametrize("fn", SIMPLE, ids=IDS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_left_out_play_no_part(fn, garbage):
  where = np.array([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], bool)
  dirty = np.where(where, REWARDS, np.float32(garbage))
  value = fn(dirty, where)
  np.testing.assert_array_equal(value, fn(REWARDS, where))
  np.testing.assert_array_equal(value[~where], 0)
  for kind in (np.int32, np.float32):
    np.testing.assert_array_equal(fn(dirty, where.astype(kind)), value)
  if fn is adv.batch_standardize:
    rest = adv.batch_standardize(REWARDS[where])
    np.testing.assert_allclose(value[where], rest, rtol=1e-5)
  elif fn is not optimal_baseline:
    for row in range(3):
      rest = fn(REWARDS[row][where[row]])
      np.testing.assert_allclose(value[row][where[row]], rest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fn", SIMPLE, ids=IDS)
def test_a_group_without_samples_or_with_one_is_worth_nothing(fn):
  where = np.zeros((3, 5), bool)
  np.testing.assert_array_equal(fn(REWARDS, where), np.zeros((3, 5)))
  where[:, 2] = True
  if fn is not adv.batch_standardize:  # its group is the batch
    np.testing.assert_array_equal(fn(REWARDS, where), np.zeros((3, 5)))


def test_groups_of_one():
  for fn in (adv.center, adv.standardize):
    np.testing.assert_array_equal(fn(jnp.ones((4, 1))), np.zeros((4, 1)))
  with pytest.raises(ValueError, match=r"groups of at least 2; got rewards \[4, 1\]"):
    adv.leave_one_out(jnp.ones((4, 1)))


def by_id(rewards, where):
  return adv.by_group(adv.pass_at_k, rewards, np.arange(15).reshape(3, 5) // 5, where)


def of_kinds(rewards, where):
  return adv.decoupled(jnp.stack([jnp.asarray(REWARDS), rewards]), where)


@pytest.mark.parametrize("fn", [*SIMPLE, of_kinds, by_id], ids=[*IDS, "decoupled", "by_group"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_makes_nan_of_its_group_unless_left_out(fn, bad):
  fn = jax.jit(fn)
  one_left = np.arange(5) == np.arange(5)[:, None]
  few = np.array([[0, 1, 1, 0, 1]] * 5, bool)
  for place, alone in enumerate(one_left):
    for row in (np.ones(5, bool), few[place], alone):
      where = np.ones((3, 5), bool)
      where[1] = row
      rewards = REWARDS.copy()
      rewards[1, place] = bad
      value = fn(rewards, where)
      if row[place]:
        assert jnp.isnan(value[1][row]).all()
      else:
        assert jnp.isfinite(value).all()
        np.testing.assert_array_equal(value, fn(REWARDS, where))
      np.testing.assert_array_equal(value[~where], 0)
      if fn.__name__ not in ("batch_standardize", "of_kinds"):  # their group is the batch
        assert jnp.isfinite(value[::2]).all()


@pytest.mark.quick(
  "<lambda>-standardize1",
  "<lambda>-batch_standardize",
  "jit-center",
  "jit-leave_one_out",
  "jit-pass_at_k",
  "jit-max_rl",
)
@pytest.mark.parametrize("fn", SIMPLE, ids=IDS)
@pytest.mark.parametrize("compile", [lambda fn: fn, jax.jit])
def test_a_nan_in_a_large_batch_is_not_overlooked(fn, compile):
  if fn is optimal_baseline:
    fn = Partial(adv.optimal_baseline, lengths=jnp.ones((256, 16)))
  rewards = np.random.default_rng(0).random((256, 16)).astype(np.float32)
  rewards[100, 3] = np.nan
  bad = np.isnan(compile(fn)(rewards))
  assert bad[100].all()
  assert bad.all() == (fn is adv.batch_standardize)
  grouped = adv.by_group(adv.standardize, rewards[:8].ravel(), np.arange(128) % 3)
  assert not np.isnan(grouped).any()
  grouped = adv.by_group(adv.standardize, rewards[96:104].ravel(), np.arange(128) % 3)
  np.testing.assert_array_equal(np.isnan(grouped), np.arange(128) % 3 == (4 * 16 + 3) % 3)


@pytest.mark.parametrize("fn", SIMPLE, ids=IDS)
def test_no_gradient_and_no_nan_inside(fn):
  with jax.debug_nans(True):
    np.testing.assert_array_equal(jax.grad(lambda r: jnp.sum(fn(r) ** 2))(REWARDS), 0 * REWARDS)
    fn(np.zeros((2, 5), np.float32))
    fn(REWARDS, np.zeros((3, 5), bool))


def test_standardized_is_invariant_and_centered_follows():
  moved = 4 * REWARDS + 8
  exact = Partial(adv.standardize, eps=0.0)
  np.testing.assert_allclose(exact(moved), exact(REWARDS), rtol=1e-5)
  np.testing.assert_allclose(adv.center(moved), 4 * adv.center(REWARDS), rtol=1e-5, atol=1e-6)
  assert not np.allclose(adv.standardize(moved, eps=1.0), adv.standardize(REWARDS, eps=1.0))
  order = [3, 1, 4, 0, 2]
  np.testing.assert_allclose(exact(REWARDS[:, order]), exact(REWARDS)[:, order], rtol=1e-5)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_no_size_of_rewards_leaves_the_range(size):
  exact = Partial(adv.standardize, eps=0.0)
  rewards = jnp.array([1.0, 0.0, 0.5, 1.0])
  np.testing.assert_allclose(exact(rewards * size), exact(rewards), rtol=1e-5)


def test_a_large_offset_does_no_harm():
  rewards = jnp.array([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3])
  np.testing.assert_allclose(adv.standardize(rewards), adv.standardize(jnp.arange(4.0)), rtol=1e-6)
  one_pass = jnp.mean(rewards**2) - jnp.mean(rewards) ** 2
  assert abs(one_pass / 1.25 - 1) > 1


def plain_center(rewards):
  return rewards - jnp.mean(rewards, -1, keepdims=True)


def plain_leave_one_out(rewards):
  others = jnp.sum(rewards, -1, keepdims=True) - rewards
  return rewards - others / (rewards.shape[-1] - 1)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(
  ("ours", "plain"), [(adv.center, plain_center), (adv.leave_one_out, plain_leave_one_out)]
)
def test_a_mean_is_subtracted_as_exactly_as_by_the_plain_formula(ours, plain, offset):
  rewards = (16 * np.random.default_rng(0).normal(size=(200, 51)) + offset).astype(np.float32)
  exact = rewards - np.mean(rewards, -1, keepdims=True, dtype=np.float64)
  exact *= 51 / 50 if ours is adv.leave_one_out else 1
  error = lambda fn: np.max(np.abs(np.asarray(fn(rewards), float) - exact))
  assert error(ours) <= 1.2 * error(plain)
  assert error(ours) <= 1.2 * np.spacing(np.float32(np.abs(exact).max())) / 2  # rounded once
  # The control: relative to the group's maximum the deviations are larger, and their rounding too.
  shifted = lambda r: plain(r - r.max(-1, keepdims=True))
  assert error(shifted) > 1.4 * error(ours)
  if offset:
    assert error(plain) > 100 * error(ours)


def test_groups_with_something_to_learn():
  rewards = jnp.array([[0.1, 0.1, 0.1], [1.0, 0.0, 0.0], [0.1, 0.1, 2.0], [0.0, 0.0, jnp.nan]])
  where = jnp.array([[1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
  found = adv.informative(rewards, where)
  assert found.dtype == bool
  # Without the sample that is left out the second group is of equal rewards; NaN is not equal.
  np.testing.assert_array_equal(found, np.array([[0] * 3, [0] * 3, [1] * 3, [1] * 3], bool))
  np.testing.assert_array_equal(adv.informative(rewards)[1], True)
  np.testing.assert_array_equal(jax.jit(adv.informative)(rewards, where), found)
  ids = np.repeat(np.arange(4), 3)
  flat = adv.by_group(adv.informative, rewards.ravel(), ids, where.ravel())
  np.testing.assert_array_equal(flat, found.ravel())
  # The control: a standard deviation of equal rewards in floats need not be 0.
  assert jnp.std(jnp.full(7, 0.1)) > 0


def test_without_uninformative_groups_denominators_are_those_of_a_batch_without_them():
  rewards = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
  mask = np.arange(3) < np.array([[3, 1], [2, 2], [1, 2]])[..., None]
  without = [0, 2]
  for weighting in (gpo.weightings.token_mean, gpo.weightings.sequence_mean):
    objective = gpo.dapo().replace(weighting=weighting)
    dropped = objective.prepare(rewards, mask & adv.informative(rewards)[..., None])
    expected = objective.prepare(rewards[without], mask[without])
    np.testing.assert_allclose(dropped.weights[np.array(without)], expected.weights, rtol=1e-6)
    np.testing.assert_array_equal(dropped.weights[1], 0)
    # The other convention: their tokens count, with advantage 0.
    kept = objective.prepare(rewards, mask)
    np.testing.assert_array_equal(kept.advantages[1], 0)
    assert kept.weights[0, 0, 0] < dropped.weights[0, 0, 0]


def by_the_others(rewards, where):
  """NeMo-RL's: baseline and standard deviation are of the group's other samples."""
  others = where[:, None] & ~jnp.eye(where.shape[-1], dtype=bool)[None]
  spread = adv.center(jnp.broadcast_to(rewards[:, None], others.shape), others)
  count = jnp.sum(others.astype(rewards.dtype), axis=-1)
  std = jnp.sqrt(jnp.sum(spread**2, axis=-1) / jnp.maximum(count - 1, 1))
  return adv.leave_one_out(rewards, where) / jnp.where(std > 0, std + 1e-6, 1)


@pytest.mark.slow
def test_the_recipe_of_a_standard_deviation_of_the_others(x64):
  worked = by_the_others(jnp.array([[1.0, 2.0, 3.0]]), jnp.ones((1, 3), bool))
  np.testing.assert_allclose(worked, [[-1.5 / (0.5**0.5 + 1e-6), 0, 1.5 / (0.5**0.5 + 1e-6)]])
  np.testing.assert_allclose(worked, [[-2.1213, 0, 2.1213]], rtol=1e-4)
  found = by_the_others(jnp.asarray(REWARDS, float), jnp.ones(REWARDS.shape, bool))
  for place in np.ndindex(REWARDS.shape):
    others = np.delete(REWARDS[place[0]], place[1]).astype(float)
    expected = (REWARDS[place] - others.mean()) / (others.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(found[place], expected, rtol=1e-9)
  # The control: of the whole group it is ±1.
  np.testing.assert_allclose(adv.standardize(jnp.array([1.0, 2.0, 3.0])), [-1, 0, 1], rtol=1e-3)
  objective = gpo.dapo().replace(advantage=by_the_others)
  prepared = objective.prepare(jnp.array([[1.0, 2.0, 3.0]]), jnp.ones((1, 3, 2)))
  np.testing.assert_allclose(prepared.advantages[0, :, 0], worked[0], rtol=1e-12)


@pytest.mark.slow
def test_the_recipe_is_safe_if_the_others_are_equal():
  rewards = jnp.array([[0.1, 0.1, 0.1, 0.1, 0.1, 1.0]])
  found = by_the_others(rewards, jnp.ones((1, 6), bool))
  np.testing.assert_allclose(found[0, -1], 0.9, rtol=1e-5)  # not 0.9 over a rounding error
  std = jnp.std(rewards[0, :-1], ddof=1)
  assert std != 0 or jnp.mean(rewards[0, :-1]) == rewards[0, 0]


def test_uneven_groups_by_id():
  ids = np.array([5, 5, -1, 9, -1, 5, 9])
  rewards = np.random.default_rng(1).normal(size=7).astype(np.float32)
  for fn in (adv.center, adv.standardize, adv.leave_one_out, adv.pass_at_k):
    value = adv.by_group(fn, rewards, ids)
    for group in np.unique(ids):
      np.testing.assert_allclose(
        value[ids == group], fn(rewards[ids == group]), rtol=1e-5, atol=1e-6
      )
  where = np.array([1, 0, 1, 1, 1, 1, 1], bool)
  value = adv.by_group(adv.center, rewards, ids, where)
  assert value[1] == 0
  np.testing.assert_allclose(
    value[np.array([0, 5])], adv.center(rewards[[0, 5]]), rtol=1e-5, atol=1e-6
  )
  with pytest.raises(ValueError, match=r"rewards \[7\], group_ids \[6\]"):
    adv.by_group(adv.center, rewards, ids[:6])
  for bad in (ids.astype(float), ids.astype(str), ids.astype(object)):
    with pytest.raises(ValueError, match=r"group_ids must be integers; .*np.unique\(group_ids"):
      adv.by_group(adv.center, rewards, bad)
  for far in (2**32 + ids, 2**63 + ids.astype(np.uint64)):
    with pytest.raises(
      ValueError, match=r"group_ids must fit int32; got u?int64 beyond it: number"
    ):
      adv.by_group(adv.center, rewards, far)
  for kind in (np.int8, np.int64, list):
    same = ids.tolist() if kind is list else ids.astype(kind)
    np.testing.assert_array_equal(
      adv.by_group(adv.center, rewards, same), adv.by_group(adv.center, rewards, ids)
    )
  with pytest.raises(ValueError, match="leave group_ids out"):
    gpo.reinforce_plus_plus().prepare(rewards, jnp.ones((7, 2)), group_ids=ids)


def test_many_groups_by_id_agree_with_groups_by_axis():
  rewards = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
  ids = np.repeat(np.arange(40), 5).reshape(40, 5)
  order = np.random.default_rng(3).permutation(200)
  value = adv.by_group(adv.standardize, rewards.ravel()[order], ids.ravel()[order])
  np.testing.assert_allclose(value, adv.standardize(rewards).ravel()[order], rtol=1e-5, atol=1e-6)


def test_groups_by_id_see_what_a_function_closes_over_now():
  traces, scale = [], 1.0

  def scaled(rewards, where):
    traces.append(rewards)
    return scale * rewards

  ids = np.arange(15).reshape(3, 5)
  for scale in (1.0, 2.0):
    np.testing.assert_allclose(adv.by_group(scaled, REWARDS, ids), scale * REWARDS)
  assert len(traces) == 2
  step = jax.jit(lambda rewards: adv.by_group(scaled, rewards, ids))
  for _ in range(2):
    step(REWARDS)
  assert len(traces) == 3


def test_numbers_bound_to_an_advantage_are_data_to_groups():
  ids = np.zeros(REWARDS.shape, int)
  value = jax.vmap(lambda eps: adv.by_group(partial(adv.standardize, eps=eps), REWARDS, ids))
  assert value(jnp.array([0.1, 1.0])).shape == (2, *REWARDS.shape)


def test_bad_rewards():
  for bad, message in ((1.0, r"\[\.\.\., G\]"), (np.zeros((2, 0)), "not empty"), (["a"], "real")):
    with pytest.raises(ValueError, match=message):
      adv.center(bad)
  with pytest.raises(ValueError, match=r"\[K, \.\.\., G\]"):
    adv.decoupled(jnp.ones(3))
  for weights in (jnp.ones(3), 1.0):
    with pytest.raises(ValueError, match=r"weights \[K\].*got rewards \[2, 3\], weights"):
      adv.decoupled(jnp.ones((2, 3)), weights=weights)


@pytest.mark.parametrize("fn", SIMPLE, ids=IDS)
def test_bad_samples_left_out(fn):
  with pytest.raises(ValueError, match=r"where must .*rewards \[3, 5\], where \[3, 4\]"):
    fn(REWARDS, np.ones((3, 4)))
  with pytest.raises(ValueError, match="where must hold real numbers"):
    fn(REWARDS, REWARDS.astype(str))


def test_lengths_are_one_per_reward():
  opo = Partial(adv.optimal_baseline, lengths=jnp.arange(15).reshape(3, 5))
  with pytest.raises(ValueError, match=r"lengths must .*lengths \[3\]"):
    adv.optimal_baseline(REWARDS, lengths=jnp.arange(3))
  ids = np.arange(15).reshape(3, 5) // 5
  with pytest.raises(ValueError, match=r"rewards \[15\], lengths \[3, 5\]\. .*lengths.ravel\(\)"):
    adv.by_group(opo, REWARDS, ids)
  flat = Partial(adv.optimal_baseline, lengths=jnp.arange(15))
  np.testing.assert_allclose(adv.by_group(flat, REWARDS, ids), opo(REWARDS), rtol=1e-5, atol=1e-6)


# --- what they optimise, over all tuples of samples ------------------------------------------


def expected_gradient(fn, logits, rewards, size):
  """Gives E over groups of (1/G) Σ A_i ∇log p(x_i), by enumeration."""
  p = jax.nn.softmax(logits)
  scores = np.asarray(jax.jacobian(jax.nn.log_softmax)(logits))
  total = np.zeros(len(rewards))
  for group in itertools.product(range(len(rewards)), repeat=size):
    weight = math.prod(float(p[x]) for x in group)
    values = np.asarray(fn(jnp.asarray([rewards[x] for x in group])))
    total += weight * sum(a * scores[x] for a, x in zip(values, group)) / size
  return total


@pytest.mark.slow
def test_which_advantages_give_the_policy_gradient(x64):
  logits, rewards = jnp.array([0.3, -0.5, 0.1]), np.array([1.0, 0.2, -2.0])
  truth = np.asarray(jax.grad(lambda x: jax.nn.softmax(x) @ rewards)(logits))
  for size in (2, 3):
    loo = expected_gradient(adv.leave_one_out, logits, rewards, size)
    np.testing.assert_allclose(loo, truth, rtol=1e-12)
    mean = expected_gradient(adv.center, logits, rewards, size)
    np.testing.assert_allclose(mean, (size - 1) / size * truth, rtol=1e-12)
  standard = expected_gradient(Partial(adv.standardize, eps=0.0), logits, rewards, 3)
  cosine = standard @ truth / np.linalg.norm(standard) / np.linalg.norm(truth)
  assert cosine < 0.999


@pytest.mark.slow
def test_standardized_binary_rewards_optimise_the_arcsine(x64):
  size, success = 400, 0.3
  slope = 0.0
  for k in range(1, size):
    weight = math.comb(size, k) * success**k * (1 - success) ** (size - k)
    rewards = jnp.asarray([1.0] * k + [0.0] * (size - k))
    values = adv.standardize(rewards, ddof=0, eps=0.0)
    slope += weight * (k * values[0] / success - (size - k) * values[-1] / (1 - success)) / size
  expected = jax.grad(lambda p: 2 * jnp.arcsin(jnp.sqrt(p)))(success)
  np.testing.assert_allclose(slope, expected, rtol=0.01)


def test_prepare_leaves_empty_responses_out():
  mask = np.array([[[1, 1], [0, 0], [1, 0]]])
  rollout = gpo.grpo(beta=None).prepare([[1.0, np.nan, 0.0]], mask)
  first, second = adv.standardize(jnp.array([1.0, 0.0]))
  np.testing.assert_array_equal(rollout.advantages[0, :, 0], [first, 0, second])
