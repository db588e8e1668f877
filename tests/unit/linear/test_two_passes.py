"""Log-probabilities, differentiable in any of their arguments, at the cost of those only."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax.linear.two_passes import once
from tests.support import linear
from tests.support.linear import BIAS, HIDDEN, MASK, TOKENS, UNEMBEDDING, assert_same

SMALL = jnp.ones((1, 16, 8)), jnp.ones((64, 8)), jnp.zeros((1, 16), int)


def total(hidden, unembedding, bias):
  head = gpo.Head(unembedding, bias, **linear.SETTINGS)
  outputs = gpo.linear_token_log_probs(hidden, head, TOKENS, mask=MASK, tiling=gpo.Tiling(50))
  return jnp.sum(outputs.log_probs + 0.1 * outputs.entropy)


def wanted(*state):
  outputs = linear.log_probs_of(*state)
  return jnp.sum(jnp.where(MASK, outputs.log_probs + 0.1 * outputs.entropy, 0))


@pytest.mark.slow
def test_one_jitted_function_may_be_differentiated_in_one_argument_after_another():
  state, jitted = (HIDDEN, UNEMBEDDING, BIAS), jax.jit(total)
  expected = linear.jit(jax.grad(wanted, (0, 1, 2)))(*state)
  subsets = [(1,), (0,), (0, 1, 2), (0,)]
  for argnums in subsets:
    found = jax.grad(jitted, argnums)(*state)
    assert_same(found, tuple(expected[i] for i in argnums), 2e-5)


@pytest.mark.quick("log_probs")
@pytest.mark.parametrize("entropy", [False, True], ids=["log_probs", "entropy"])
def test_matrix_products(entropy):
  """Two to differentiate each of hidden states and unembedding; the logits twice."""
  tiling = gpo.Tiling(tile_size=16)  # with one tile the compiler would find that they are the same

  def total(hidden, unembedding):
    outputs = gpo.linear_token_log_probs(hidden, unembedding, SMALL[2], tiling=tiling)
    return jnp.sum(outputs[int(entropy)])

  some = ((0, 3), (1, 3)) if entropy else ()
  for argnums, count in (*some, ((0, 1), 4)):
    step = jax.value_and_grad(total, argnums)
    assert linear.products(step, *SMALL[:2]) == count


@pytest.mark.slow
def test_a_loss_without_entropies_computes_none_of_their_derivatives():
  """Which take the logarithm of each entry of the vocabulary again, for each token."""
  hidden, unembedding, tokens = jnp.ones((1, 4, 4, 8)), SMALL[1], jnp.zeros((1, 4, 4), int)
  objective = gpo.gspo()
  rollout = objective.prepare(jnp.eye(1, 4), jnp.ones((1, 4, 4)))

  def loss(*state):
    return gpo.linear_loss(objective, *state, tokens, rollout)[0]

  def plain(*state):
    return jnp.sum(gpo.linear_token_log_probs(*state, tokens).log_probs)

  def both(*state):
    return sum(map(jnp.sum, gpo.linear_token_log_probs(*state, tokens)))

  def transcendentals(function):
    step = linear.jit(jax.value_and_grad(function, (0, 1)))
    return step.lower(hidden, unembedding).compile().cost_analysis()["transcendentals"]

  of_loss, of_plain, of_both = map(transcendentals, (loss, plain, both))
  assert of_loss - of_plain < tokens.size * len(unembedding) <= of_both - of_plain


DTYPES = {
  "-".join(jnp.dtype(x).name for x in dtypes): dtypes
  for dtypes in itertools.product([jnp.bfloat16, jnp.float32], repeat=3)
}


@pytest.mark.quick(
  "bfloat16-float32-float32", "float32-bfloat16-bfloat16", "float32-float32-bfloat16"
)
@pytest.mark.parametrize("name", DTYPES)
def test_gradients_have_the_dtypes_of_what_they_belong_to(name):
  dtypes = DTYPES[name]
  state = [x.astype(dtype) for x, dtype in zip((HIDDEN, UNEMBEDDING, BIAS), dtypes)]
  gradients = jax.eval_shape(jax.grad(total, (0, 1, 2)), *state)
  assert [x.dtype for x in gradients] == [jnp.dtype(x) for x in dtypes]
  assert jax.eval_shape(total, *state).dtype == jnp.float32


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "unembedding_float32"])
def test_bfloat16(mixed):
  """The logits are not rounded; gradients are, to what they belong to."""
  narrow = [x.astype(jnp.bfloat16) for x in (HIDDEN, UNEMBEDDING, BIAS)]
  wide = [x.astype(jnp.float32) for x in narrow]
  given = (narrow[0], wide[1], narrow[2]) if mixed else narrow
  step = linear.jit(jax.value_and_grad(total, (0, 1, 2)))
  found = step(*given)
  expected = linear.jit(jax.value_and_grad(wanted, (0, 1, 2)))(*wide)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for x, y, z in zip(found[1], expected[1], given):
    assert x.dtype == z.dtype
    eps = 1e-5 if x.dtype == jnp.float32 else float(jnp.finfo(jnp.bfloat16).eps)
    assert linear.relative_error(x.astype(jnp.float32), y) < eps


def test_once_is_the_identity_and_has_no_derivative():
  tree = {"a": jnp.ones(2), "b": None}
  jax.tree.map(np.testing.assert_array_equal, once(tree), tree)
  with pytest.raises(NotImplementedError, match="first reverse-mode derivatives only"):
    jax.grad(lambda x: jnp.sum(once(x)))(jnp.ones(2))
