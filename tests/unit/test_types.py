"""`Rollout.total` and `Rollout.mean`: the primitives of levels, one's own among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support.batches import batch

BATCH = batch()
IDS = np.array([[1, 1, 2, 2, 2, 3], [1, 2, 2, 2, 3, 3]])


def packed():
  mask = np.array([[1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]], bool)
  return gpo.Rollout(advantages=0.0, mask=mask, weights=mask, segment_ids=IDS)


def by_loop(x, mask, ids, reduce):
  out = np.zeros(x.shape)
  for row in range(x.shape[0]):
    for t in range(x.shape[1]):
      own = mask[row] & (ids[row] == ids[row, t])
      out[row, t] = reduce(x[row, own]) if own.any() else 0
  return out


@pytest.mark.parametrize(("name", "reduce"), [("total", np.sum), ("mean", np.mean)])
def test_sums_and_means_over_each_response(name, reduce):
  x = np.random.default_rng(0).normal(size=IDS.shape).astype(np.float32)
  rollout = packed()
  nan = np.where(rollout.mask, x, np.nan)  # what is masked does not count
  expected = by_loop(x, rollout.mask, IDS, reduce)
  np.testing.assert_allclose(getattr(rollout, name)(jnp.asarray(nan)), expected, rtol=1e-5)
  whole = rollout.replace(segment_ids=None)
  expected = by_loop(x, rollout.mask, np.ones_like(IDS), reduce)
  np.testing.assert_allclose(getattr(whole, name)(jnp.asarray(nan)), expected, rtol=1e-5)


def test_a_level_of_ones_own_is_three_lines():
  def level(log_ratio, rollout):
    length = rollout.total(jnp.ones_like(log_ratio))
    return rollout.total(log_ratio) / jnp.maximum(length, 1)

  own = gpo.gspo().replace(level=level)
  rollout = BATCH.prepare(own)
  value, expected = (
    jax.value_and_grad(lambda x, o=o: o(x, rollout)[0])(BATCH.log_probs) for o in (own, gpo.gspo())
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-9), value, expected)


def test_a_rollout_takes_keywords_only():
  with pytest.raises(TypeError, match="positional"):
    gpo.Rollout(1.0, jnp.ones(2), jnp.ones(2))


def test_a_rollout_is_made_by_keywords_and_not_changed():
  with pytest.raises(TypeError, match="positional"):
    gpo.Rollout(0.0, np.ones((1, 2)), np.ones((1, 2)))
  with pytest.raises(AttributeError):
    packed().advantages = 1.0
