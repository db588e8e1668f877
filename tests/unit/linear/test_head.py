"""What makes logits: the formula, tiles of the vocabulary, dtypes, and one clear error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax.linear import head as module
from tests.support import linear
from tests.support.linear import BIAS, HIDDEN, SETTINGS, TOKENS, UNEMBEDDING, VOCABULARY

ROWS = HIDDEN[0, 0]


def head_of(hidden=ROWS, **changes):
  return module.as_head(hidden, gpo.Head(**{"unembedding": UNEMBEDDING} | changes))


@pytest.mark.parametrize("settings", [{}, {"softcap": 3.0}, {"temperature": 0.7}, SETTINGS])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
def test_logits_are_the_formula(settings, bias):
  _, head = head_of(bias=bias, **settings)
  z = np.asarray(ROWS, np.float64) @ np.asarray(UNEMBEDDING, np.float64).T
  z = z if bias is None else z + np.asarray(bias)
  cap, temperature = settings.get("softcap"), settings.get("temperature", 1.0)
  z = (z if cap is None else cap * np.tanh(z / cap)) / temperature
  found = module.logits_of(ROWS, head, 0, VOCABULARY, True)
  np.testing.assert_allclose(found, z.T, rtol=1e-5, atol=1e-6)
  tile = module.logits_of(ROWS, head, 40, 10, True)
  np.testing.assert_allclose(tile, z.T[40:50], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 10, 28, 29, 55, 56])
def test_tiles_are_each_row_of_the_vocabulary_once(size):
  def step(start, size, seen):
    return jax.lax.dynamic_update_slice_in_dim(
      seen, jax.lax.dynamic_slice_in_dim(seen, start, size) + 1, start, 0
    )

  seen = module.over_tiles(56, size, step, jnp.zeros(56))
  np.testing.assert_array_equal(seen, np.ones(56))


WIDER = {
  ("bfloat16", "bfloat16"): ("bfloat16", "float32"),
  ("float16", "float16"): ("float16", "float32"),
  ("bfloat16", "float16"): ("float32", "float32"),
  ("bfloat16", "float8_e4m3fn"): ("float32", "float32"),
  ("float16", "float32"): ("float32", "float32"),
  ("float32", "float64"): ("float64", "float64"),
}


@pytest.mark.parametrize("pair", WIDER, ids="-".join)
def test_products_are_of_the_dtype_that_holds_both_and_sums_float32_at_least(pair):
  a, b = map(jnp.dtype, pair)
  dtype, accumulator = map(jnp.dtype, WIDER[pair])
  assert module.wider(a, b) == module.wider(b, a) == dtype
  assert module.accumulator(a, b) == accumulator


@pytest.mark.parametrize("narrow", [True, False], ids=["narrow", "wide"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_product_of_narrow_dtypes_is_not_rounded(dtype, narrow):
  hidden, unembedding = ROWS.astype(dtype), UNEMBEDDING.astype(dtype)
  found = module.dot("ch,vh->cv", hidden, unembedding, narrow)
  wide = (np.asarray(x, np.float64) for x in (hidden, unembedding.T))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, np.matmul(*wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("a", "b"), [(jnp.float16, jnp.bfloat16), (jnp.bfloat16, jnp.float8_e4m3fn)], ids=str
)
def test_dtypes_neither_of_which_holds_the_other_meet_in_float32(a, b):
  """The same bits, given as float32, have the same log-probabilities and gradients."""
  hidden, unembedding = HIDDEN.astype(a), UNEMBEDDING.astype(b)

  def loss(hidden, unembedding):
    return jnp.sum(gpo.linear_token_log_probs(hidden, unembedding, TOKENS).log_probs)

  step = linear.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  value, slopes = step(hidden, unembedding)
  expected, in_float32 = step(hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
  assert value == expected
  for found, wanted, dtype in zip(slopes, in_float32, (a, b), strict=True):
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wanted.astype(dtype))


WRONG = {
  "kernel": (lambda: head_of(unembedding=UNEMBEDDING.T), r"\[V, H\].* transpose a kernel \[H, V\]"),
  "hidden_of_one_axis": (lambda: head_of(hidden=jnp.ones(16)), r"hidden must be \[..., T, H\]"),
  "no_tokens": (lambda: head_of(hidden=jnp.ones((0, 16))), "every axis at least 1; got hidden"),
  "hidden_of_text": (lambda: head_of(hidden=[["a"]]), "hidden must hold real numbers; got text"),
  "bias_of_another_shape": (lambda: head_of(bias=BIAS[1:]), r"bias must be \[V\]; got \[55\]"),
  "softcap_per_token": (lambda: head_of(softcap=[1.0, 2.0]), "softcap must be a scalar"),
  "temperature_none": (
    lambda: head_of(temperature=None),
    "temperature must hold a number; got None",
  ),
  "temperature_of_text": (lambda: head_of(temperature="0.7"), "temperature must hold a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
  function, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    function()
