"""The entry: 0 where the mask is 0, one dtype, a token axis, no gradient but the log-probs'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import _padding

MASK = np.array([[[1, 1, 0], [0, 0, 0]]], bool)
TOKENS = ("weights", "old_log_probs", "ref_log_probs", "sampler_log_probs", "factor")
LOG_PROBS = np.where(MASK, -1.0, np.nan).astype(np.float32)


def rollout(advantages=None, dtype=np.float32, **changes):
  fields = {name: np.where(MASK, 2.0, np.nan).astype(dtype) for name in TOKENS}
  given = np.array([[3.0, np.nan]], np.float32) if advantages is None else advantages
  return gpo.Rollout(advantages=given, mask=MASK, **fields | changes)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 7.0])
def test_what_is_masked_is_0_inside(garbage):
  dirty = {name: np.where(MASK, 2.0, garbage).astype(np.float32) for name in TOKENS}
  log_probs = np.where(MASK, -1.0, garbage).astype(np.float32)
  log_probs, clean = _padding.clean(log_probs, rollout(**dirty))
  np.testing.assert_array_equal(log_probs, np.where(MASK, -1.0, 0.0))
  for name in TOKENS:
    np.testing.assert_array_equal(getattr(clean, name), np.where(MASK, 2.0, 0.0), err_msg=name)


def test_an_advantage_of_an_empty_response_is_0_and_of_responses_stays_one_per_row():
  _, clean = _padding.clean(LOG_PROBS, rollout())
  np.testing.assert_array_equal(clean.advantages, [[[3.0], [0.0]]])
  of_tokens = np.where(MASK, 3.0, np.nan).astype(np.float32)
  _, clean = _padding.clean(LOG_PROBS, rollout(of_tokens))
  np.testing.assert_array_equal(clean.advantages, np.where(MASK, 3.0, 0.0))


def test_the_widest_dtype_is_everyones(x64):
  log_probs, clean = _padding.clean(LOG_PROBS, rollout(dtype=np.float16))
  assert {x.dtype for x in (log_probs, clean.advantages, clean.factor)} == {jnp.dtype("float32")}
  log_probs, clean = _padding.clean(LOG_PROBS, rollout(factor=np.ones(MASK.shape)))
  assert {x.dtype for x in (log_probs, clean.advantages, clean.weights)} == {jnp.dtype("float64")}


def test_only_the_log_probs_have_a_gradient():
  floats = {name: jnp.full(MASK.shape, 2.0) for name in (*TOKENS, "advantages")}

  def everything(log_probs, fields):
    log_probs, clean = _padding.clean(log_probs, gpo.Rollout(mask=MASK, **fields))
    return jnp.sum(log_probs) + sum(jnp.sum(getattr(clean, name)) for name in fields)

  slopes, others = jax.grad(everything, (0, 1))(jnp.asarray(LOG_PROBS), floats)
  np.testing.assert_array_equal(slopes, MASK.astype(np.float32))
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), others)


def test_the_log_probs_are_called_as_the_caller_calls_them():
  with pytest.raises(ValueError, match=r"hidden must have the shape of mask.*hidden \[1, 2, 4\]"):
    _padding.clean(np.zeros((1, 2, 4)), rollout(), name="hidden")
