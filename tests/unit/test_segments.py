"""Sums and values of packed responses, against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpo_jax import _segments

IDS = np.array([[1, 1, 2, 2, 2, 3], [1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1]])
X = np.random.default_rng(0).integers(-8, 9, IDS.shape).astype(np.float32)
ONE = pytest.mark.parametrize("ids", [None, IDS], ids=["one_response", "packed"])


def by_loop(keep, ids):
  """Sums over the tokens s of t's segment for which keep(s, t)."""
  ids = np.ones_like(IDS) if ids is None else ids
  rows, length = X.shape
  return [
    [sum(X[r, s] for s in range(length) if ids[r, s] == ids[r, t] and keep(s, t))
     for t in range(length)] for r in range(rows)
  ]  # fmt: skip


@ONE
def test_a_total_is_over_the_segment(ids):
  np.testing.assert_array_equal(_segments.total(X, ids), by_loop(lambda s, t: True, ids))


@ONE
def test_earlier_is_over_the_tokens_before(ids):
  np.testing.assert_array_equal(_segments.earlier(X, ids), by_loop(lambda s, t: s < t, ids))


@pytest.mark.parametrize("name", ["total", "earlier"])
def test_leading_axes_are_rows(name):
  function = getattr(_segments, name)
  deep = function(X.reshape(3, 1, 6), IDS.reshape(3, 1, 6))
  np.testing.assert_array_equal(deep.reshape(3, 6), function(X, IDS))


def test_ids_may_be_any_that_differ():
  np.testing.assert_array_equal(_segments.total(X, 2**30 - IDS), _segments.total(X, IDS))


LEAST, MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
MANY = {
  "fewer_than_a_window": IDS,
  "more_than_a_window": 1 + np.arange(60).reshape(2, 30) // [[1], [2]],
  "far_apart": np.array([[LEAST, LEAST, -7, 0, 1, MOST], [3, 8, 8, 2000, MOST - 1, MOST]]),
}


@pytest.mark.parametrize("ids", MANY.values(), ids=MANY)
@pytest.mark.parametrize("how", [_segments._SUM, _segments._MAX], ids=["sum", "max"])
def test_accelerators_reduce_as_cpus_do(how, ids):
  """Bit for bit, and the NaN of one response stays its own."""
  x = np.random.default_rng(2).integers(-8, 9, ids.shape).astype(np.float32)
  x[0, 1] = np.nan
  by_windows = jax.jit(_segments._by_windows, static_argnums=0)(how, x, ids.astype(np.int32))
  np.testing.assert_array_equal(by_windows, _segments._by_scatter(how, x, ids.astype(np.int32)))
  np.testing.assert_array_equal(np.isnan(by_windows)[0], ids[0] == ids[0, 1])
  assert not np.isnan(by_windows)[1].any()


def test_a_total_has_the_gradient_of_a_sum():
  slopes = np.random.default_rng(1).integers(-8, 9, IDS.shape).astype(np.float32)
  _, pull = jax.vjp(lambda x: _segments.total(x, jnp.asarray(IDS)), jnp.asarray(X))
  np.testing.assert_array_equal(pull(slopes)[0], _segments.total(slopes, IDS))


def test_masked_tokens_join_the_segment_before():
  mask = np.array([[0, 1, 0, 1, 0, 0]], bool)
  ids = jnp.array([[7, 1, 9, 2, 0, -3]])
  np.testing.assert_array_equal(_segments.fill(ids, jnp.asarray(mask)), [[1, 1, 1, 2, 2, 2]])


def test_each_token_gets_its_segments_value_and_nan_where_there_is_none():
  values, ids = jnp.array([[5.0, 6.0]]), jnp.array([[1, 2, 3, 0, -1, 1]])
  nan = np.nan
  np.testing.assert_array_equal(_segments.to_tokens(values, ids), [[5, 6, nan, nan, nan, 5]])
  assert _segments.to_tokens(values, None) is values


def test_a_segment_is_present_and_counted_if_a_token_of_it_is_active():
  mask = jnp.array([[1, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
  present = [[True, False, True], [False, True, False], [False, False, False]]
  np.testing.assert_array_equal(_segments.present(mask, jnp.asarray(IDS), 3), present)
  np.testing.assert_array_equal(_segments.present(mask, None, 1), [True, True, False])
  assert _segments.count(mask.astype(float), jnp.asarray(IDS)) == 3
  assert _segments.count(mask.astype(float), None) == 2
