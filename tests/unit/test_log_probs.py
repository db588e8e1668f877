"""Log-probabilities, entropies and exact KLs from logits: the formulas, and invisible padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support import linear

SHAPE, VOCABULARY = (4, 6), 53
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(0, VOCABULARY, SHAPE)
SUPPORT = RNG.random((*SHAPE, VOCABULARY)) < 0.6
LOGITS, REFERENCE = (RNG.normal(size=(2, *SHAPE, VOCABULARY)) * 3).astype(np.float32)
SETTINGS = {
  "plain": {},
  "temperature": {"temperature": 0.3},
  "softcap": {"softcap": 2.0},
  "support": {"support": SUPPORT},
  "all": {"temperature": 0.7, "softcap": 3.0, "support": SUPPORT},
}


def log_softmax(logits, temperature=1.0, support=None, softcap=None):
  z = np.asarray(logits, np.float64)
  z = z if softcap is None else softcap * np.tanh(z / softcap)
  z = z / temperature
  z = z if support is None else np.where(support, z, -np.inf)
  shifted = z - z.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_under(p, x):
  return np.sum(np.where(p > 0, p * np.where(p > 0, x, 0), 0), -1)


def pick(x, tokens):
  return np.take_along_axis(np.asarray(x), np.asarray(tokens)[..., None], -1)[..., 0]


def pick_all(x, ids):
  return np.take_along_axis(np.asarray(x), np.asarray(ids), -1)


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probs_entropy_and_kl_are_the_formulas(name):
  log_p, log_q = (log_softmax(x, **SETTINGS[name]) for x in (LOGITS, REFERENCE))
  found = gpo.token_log_probs(LOGITS, TOKENS, **SETTINGS[name])
  np.testing.assert_allclose(found, pick(log_p, TOKENS), rtol=1e-5, atol=1e-6)
  entropy = gpo.token_entropy(LOGITS, **SETTINGS[name])
  np.testing.assert_allclose(entropy, -mean_under(np.exp(log_p), log_p), rtol=1e-5, atol=1e-6)
  kl = gpo.exact_kl(LOGITS, REFERENCE, **SETTINGS[name])
  expected = mean_under(np.exp(log_p), log_p - np.where(np.isinf(log_q), 0, log_q))
  np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_several_ids_per_position_are_each_as_if_alone(name):
  ids = np.random.default_rng(4).integers(0, VOCABULARY, (*SHAPE, 3))
  ids[..., 2] = ids[..., 0]  # the same twice
  slopes = np.random.default_rng(5).normal(size=ids.shape).astype(np.float32)
  slopes = np.where(np.isfinite(pick_all(log_softmax(LOGITS, **SETTINGS[name]), ids)), slopes, 0)

  def total(logits, tokens, weights):
    log_probs = gpo.token_log_probs(logits, tokens, **SETTINGS[name])
    return jnp.sum(weights * jnp.where(weights == 0, 0, log_probs)), log_probs

  step = linear.jit(jax.grad(total, has_aux=True))
  alone = [step(LOGITS, ids[..., k], slopes[..., k]) for k in range(3)]
  gradient, found = step(LOGITS, ids, slopes)
  np.testing.assert_array_equal(found, np.stack([x for _, x in alone], -1))
  np.testing.assert_allclose(gradient, sum(x for x, _ in alone), atol=2e-6)
  outside = ids.copy()
  outside[..., 1], outside[..., 0] = VOCABULARY, -1
  found = gpo.token_log_probs(LOGITS, outside, **SETTINGS[name])
  assert jnp.isnan(found[..., :2]).all()
  assert not jnp.isnan(found[..., 2]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_logits_of_any_dtype_are_computed_in_float32(dtype):
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(4, 500)) * 5, dtype)
  found = gpo.token_log_probs(logits, jnp.arange(4))
  assert found.dtype == gpo.token_entropy(logits).dtype == jnp.float32
  assert gpo.exact_kl(logits, logits).dtype == jnp.float32
  expected = pick(log_softmax(logits.astype(jnp.float32)), np.arange(4))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(gpo.token_log_probs(x, jnp.arange(4))))(logits)
  assert gradient.dtype == dtype


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_sure_tokens_are_added_up_before_they_are_rounded(dtype, several):
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(64, 8)).astype(np.float32)
  logits[:, 2] += np.linspace(2, 9, 64)  # probabilities up to 0.999
  logits = jnp.asarray(logits, dtype)
  exact = np.asarray(logits, np.float64)
  p = np.exp(log_softmax(exact))
  ids = np.array([2, 5, 7] if several else [2])
  slopes = p[:, ids] if several else np.ones((64, 1))  # of a student at its teacher's
  expected = -slopes.sum(-1, keepdims=True) * p
  expected[:, ids] += slopes
  slopes, ids = jnp.asarray(slopes, jnp.float32), jnp.broadcast_to(ids, slopes.shape)

  def plain(x):  # rounds both ways to a logit, then adds
    own = jnp.take_along_axis(x, ids, axis=-1).astype(jnp.float32)
    return own - jax.nn.logsumexp(x.astype(jnp.float32), axis=-1, keepdims=True)

  def largest_error(function):
    found = jax.grad(lambda x: jnp.sum(slopes * function(x)))(logits)
    allowed = float(jnp.finfo(dtype).eps) * np.abs(expected) + 1e-6
    return np.max(np.abs(np.asarray(found, np.float64) - expected) / allowed)

  assert largest_error(lambda x: gpo.token_log_probs(x, ids)) < 1
  assert largest_error(plain) > 5


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
  logits = LOGITS.astype(np.float64)
  found = gpo.token_log_probs(logits, TOKENS)
  np.testing.assert_allclose(found, pick(log_softmax(logits), TOKENS), rtol=1e-13)


@pytest.mark.parametrize("offset", [0, 300, 10_000])
def test_log_probs_keep_their_digits_however_large_logits_are(offset):
  logits = (np.random.default_rng(0).normal(size=(64, 32)) + offset).astype(np.float32)
  tokens = np.arange(64) % 32
  expected = log_softmax(logits)
  np.testing.assert_allclose(gpo.token_log_probs(logits, tokens), pick(expected, tokens), atol=2e-6)
  found = jax.grad(lambda x: jnp.sum(gpo.token_log_probs(x, tokens)))(jnp.asarray(logits))
  np.testing.assert_allclose(found, np.eye(32)[tokens] - np.exp(expected), atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_log_probabilities_are_at_most_0(scale):
  assert (gpo.token_log_probs(np.float32(scale) * LOGITS, TOKENS) <= 0).all()


def test_a_token_outside_the_support_is_minus_infinity_and_one_outside_the_vocabulary_nan():
  support = jnp.array([True, True, False])
  found = gpo.token_log_probs(jnp.zeros((4, 3)), jnp.array([2, 0, 3, -1]), support=support)
  np.testing.assert_array_equal(found, [-np.inf, np.float32(-np.log(2)), np.nan, np.nan])


def test_gradients_are_finite_at_banned_tokens():
  logits = jnp.array([[0.0, 1.0, -jnp.inf], [2.0, -jnp.inf, -jnp.inf]])
  with jax.debug_nans(True):
    for function in (gpo.token_entropy, lambda x: gpo.token_log_probs(x, jnp.array([1, 0]))):
      gradient = jax.grad(lambda x: jnp.sum(function(x)))(logits)
      assert np.isfinite(gradient).all()
      assert (np.asarray(gradient)[np.isinf(logits)] == 0).all()


def test_padded_logits_are_invisible_outside_the_support():
  mask = jnp.array([True, False])
  logits = jnp.array([[0.0, 1.0, 2.0], [jnp.nan, jnp.inf, 0.0]])

  def loss(logits):
    kept = {"support": mask[:, None]}
    terms = gpo.token_log_probs(logits, jnp.array([0, 7]), **kept)
    terms += gpo.token_entropy(logits, **kept) + gpo.exact_kl(logits, jnp.ones((2, 3)), **kept)
    return jnp.sum(jnp.where(mask, terms, 0))

  gradient = jax.grad(loss)(logits)
  assert np.isfinite(gradient).all()
  assert (np.asarray(gradient)[1] == 0).all()


def test_exact_kl_is_0_at_the_reference_and_has_no_gradient_to_it():
  logits = LOGITS[0, :3, :7]
  loss = lambda x, y: jnp.sum(gpo.exact_kl(x, y))
  value, gradient = jax.value_and_grad(loss)(logits, logits)
  assert value == 0
  np.testing.assert_allclose(gradient, 0, atol=1e-7)
  assert not np.any(jax.grad(loss, argnums=1)(logits + np.arange(7, dtype=np.float32), logits))


def test_nothing_of_the_logits_size_is_made():
  shape = (4, 64, 4096)
  loss = lambda logits: jnp.sum(gpo.token_log_probs(logits, jnp.zeros(shape[:-1], int)))
  assert linear.temporaries(jax.value_and_grad(loss), shape) < 4 * np.prod(shape) / 20


ZEROS = np.zeros((1, 5), np.float32)
WRONG = {
  "logits_without_an_axis": (lambda: gpo.token_log_probs(1.0, 0), "logits must be"),
  "tokens_of_another_shape": (
    lambda: gpo.token_log_probs(ZEROS, [1, 1]),
    "tokens must have one id",
  ),
  "tokens_of_floats": (lambda: gpo.token_log_probs(ZEROS, [1.0]), "tokens must be integers"),
  "support_of_another_shape": (
    lambda: gpo.token_log_probs(ZEROS, [1], support=np.ones(4)),
    r"support must broadcast .* got support \[4\], logits \[1, 5\]",
  ),
  "support_that_is_a_mask_of_tokens": (
    lambda: gpo.token_log_probs(np.zeros((2, 5)), [1, 1], support=[True, False]),
    r"mask\[..., None\]",
  ),
  "temperature_per_token": (
    lambda: gpo.token_log_probs(ZEROS, [1], temperature=[1.0]),
    "temperature must be a scalar",
  ),
  "two_shapes_of_logits": (
    lambda: gpo.exact_kl(ZEROS, np.zeros((1, 6))),
    "ref_logits must have the shape of logits",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
  function, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    function()
