"""The written objective: examples, exactness, compilation, errors, what its penalty estimates."""

import functools
import itertools
import logging
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import gpo_jax as gpo

NAMES = ("ratios", "advantages", "pi_current", "pi_ref", "epsilon", "beta")
EXAMPLES = [
  (([1.2, 0.8, 1.1], [1, 1, 1], [0.9, 1.1, 1.0], [1.0, 0.5, 1.5], 0.2, 0.01), 1.03195),
  (([1, 1, 1], [1, 1, 1], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 0.2, 0.01), 1.0),
  (([1.1, 0.9, 1.0], [2.0, -1.5, 0.5], [0.4, 0.6, 0.5], [0.5, 0.5, 0.5], 0.2, 0.05), 0.449311),
]
KINDS = [list, np.asarray, lambda x: jnp.asarray(x)]


def written_loss(ratio, advantage, pi_current, pi_ref, epsilon=0.2, beta=0.01):
  """The formula of one sample, as written, in Python floats."""
  clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
  r = pi_current / pi_ref
  penalty = ratio * (r - math.log(r) - 1)
  return beta * penalty - min(ratio * advantage, clipped * advantage)


def random_inputs(shape, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  ratios, pi_current, pi_ref = np.exp(rng.normal(size=(3, *shape)) * 0.5)
  return [x.astype(dtype) for x in (ratios, rng.normal(size=shape), pi_current, pi_ref)]


@pytest.mark.parametrize("kind", KINDS, ids=["list", "numpy", "jax"])
@pytest.mark.parametrize(("inputs", "expected"), EXAMPLES)
def test_worked_examples(inputs, expected, kind):
  inputs = [kind(x) for x in inputs[:4]] + list(inputs[4:])
  for value in (gpo.gpo_objective(*inputs), gpo.gpo_objective(**dict(zip(NAMES, inputs)))):
    assert value.shape == ()
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gpo.gpo_value_and_grad(*inputs)[0], expected, rtol=1e-5)
  np.testing.assert_allclose(-gpo.gpo_loss(*inputs).mean(), expected, rtol=1e-5)


@pytest.mark.parametrize(("inputs", "expected"), EXAMPLES)
def test_worked_examples_in_float64(inputs, expected, x64):
  value = gpo.gpo_objective(*inputs)
  assert value.dtype == jnp.float64
  np.testing.assert_allclose(
    value, -np.mean([written_loss(*x, *inputs[4:]) for x in zip(*inputs[:4])]), rtol=1e-14
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_defaults_are_the_specifications():
  inputs, expected = EXAMPLES[0]
  np.testing.assert_allclose(gpo.gpo_objective(*inputs[:4]), expected, rtol=1e-5)


def test_value_and_gradient_against_the_formula(x64):
  inputs = random_inputs((200,), dtype=np.float64)
  expected = np.array([written_loss(*x) for x in zip(*inputs)])
  np.testing.assert_allclose(gpo.gpo_loss(*inputs), expected, rtol=1e-12)
  value, gradients = gpo.gpo_value_and_grad(*inputs)
  np.testing.assert_allclose(value, -expected.mean(), rtol=1e-12)
  for gradient, argument in ((gradients.ratios, 0), (gradients.pi_current, 2)):
    step = 1e-6
    moved = [[x + sign * step * (k == argument) for k, x in enumerate(inputs)] for sign in (1, -1)]
    up, down = (np.array([written_loss(*x) for x in zip(*m)]) for m in moved)
    np.testing.assert_allclose(gradient, -(up - down) / (2 * step) / 200, rtol=1e-6, atol=1e-10)


def test_per_group_is_a_vmap_of_the_objective():
  inputs = random_inputs((5, 7))
  value = gpo.gpo_objective_per_group(*inputs, 0.1, 0.3)
  assert value.shape == (5,)
  expected = [gpo.gpo_objective(*group, 0.1, 0.3) for group in zip(*inputs)]
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_loss_mean_is_minus_the_objective_to_the_last_bit():
  inputs = random_inputs((100,))
  assert jnp.mean(gpo.gpo_loss(*inputs)) == -gpo.gpo_objective(*inputs)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 0.0, -1.0])
@pytest.mark.parametrize("kind", [bool, int, np.float32])
def test_masked_samples_may_hold_anything(garbage, kind):
  inputs = random_inputs((6,))
  where = np.array([1, 0, 1, 1, 0, 1]).astype(kind)
  dirty = [np.where(where != 0, x, np.float32(garbage)) for x in inputs]

  def loss(inputs):
    return jnp.sum(gpo.gpo_loss(*inputs, where=where))

  value, gradients = jax.value_and_grad(loss)(dirty)
  expected, expected_gradients = jax.value_and_grad(loss)(inputs)
  assert value == expected
  np.testing.assert_array_equal(gradients, expected_gradients)
  np.testing.assert_array_equal(np.asarray(gradients)[:, where == 0], 0)
  clean = gpo.gpo_loss(*[x[where != 0] for x in inputs])
  np.testing.assert_array_equal(gpo.gpo_loss(*dirty, where=where)[where != 0], clean)


@pytest.mark.parametrize("argument", range(4))
def test_nan_in_a_sample_that_counts_is_never_hidden(argument):
  inputs = random_inputs((4,))
  inputs[argument][1] = np.nan
  assert jnp.isnan(gpo.gpo_objective(*inputs))
  for name in ("epsilon", "beta"):
    assert jnp.isnan(gpo.gpo_objective(*random_inputs((4,)), **{name: np.nan}))


@pytest.mark.parametrize("epsilon", [0.2, 0.1, 0.5, 0.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_gradient_at_a_tie_is_the_unclipped_branchs(epsilon, advantage, side):
  ratio = np.float32(1) + np.float32(side) * np.float32(epsilon)
  _, gradients = gpo.gpo_value_and_grad([ratio], [advantage], [0.5], [0.5], epsilon, 0.0)
  assert gradients.ratios == advantage
  # The control: two nested jnp.minimum share the gradient between the tied branches.
  if side:
    naive = lambda x: jnp.minimum(x, jnp.clip(x, 1 - epsilon, 1 + epsilon))
    assert jax.grad(naive)(ratio) < 1


def test_clipped_samples_have_no_gradient_and_the_others_the_advantage():
  ratios = jnp.array([1.3, 0.7, 1.3, 0.7])
  advantages = jnp.array([1.0, -1.0, -1.0, 1.0])
  _, gradients = gpo.gpo_value_and_grad(ratios, advantages, ratios, ratios, 0.2, 0.0)
  np.testing.assert_array_equal(gradients.ratios * 4, [0.0, 0.0, -1.0, 1.0])


def near_one(dtype):
  offsets = np.concatenate([s * np.logspace(-5, np.log10(0.9), 200) for s in (1, -1)])
  pi_ref = np.random.default_rng(0).uniform(0.01, 1.5, offsets.size).astype(dtype)
  return (pi_ref * (1 + offsets)).astype(dtype), pi_ref


def exact_bracket(pi_current, pi_ref):
  """The bracket and its derivative in pi_current, in longdouble, where the plain form is exact."""
  pi_current, pi_ref = pi_current.astype(np.longdouble), pi_ref.astype(np.longdouble)
  excess = (pi_current - pi_ref) / pi_ref
  return excess - np.log1p(excess), excess / pi_current


def test_no_cancellation_near_one():
  pi_current, pi_ref = near_one(np.float32)
  ones = np.ones_like(pi_ref)
  bracket, slope = exact_bracket(pi_current, pi_ref)
  losses = gpo.gpo_loss(ones, 0 * ones, pi_current, pi_ref, beta=1.0)
  np.testing.assert_allclose(losses, bracket.astype(float), rtol=1e-6)
  gradients = gpo.gpo_value_and_grad(ones, 0 * ones, pi_current, pi_ref, beta=1.0)[1]
  size = np.float32(ones.size)
  np.testing.assert_allclose(-size * gradients.pi_current, slope.astype(float), rtol=1e-6)
  np.testing.assert_allclose(-size * gradients.ratios, bracket.astype(float), rtol=1e-6)
  # The control: the formula as written is wrong in the first digit.
  r = pi_current / pi_ref
  assert np.max(np.abs((r - np.log(r) - 1) / bracket - 1)) > 0.1


def test_every_order_of_magnitude_in_float32():
  pi_current = np.logspace(-30, 8, 400).astype(np.float32)
  ones = np.ones_like(pi_current)
  expected = [written_loss(1.0, 0.0, float(p), 1.0, beta=1.0) for p in pi_current]
  np.testing.assert_allclose(
    gpo.gpo_loss(ones, 0 * ones, pi_current, ones, beta=1.0), expected, rtol=1e-6
  )


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
def test_likelihoods_of_any_size_have_a_gradient_in_either_place(scale):
  def penalty(p, q):
    likelihoods = (jnp.full(1, x * np.float32(scale)) for x in (p, q))
    return gpo.gpo_loss([1.0], [0.0], *likelihoods, beta=1.0)[0]

  value, slopes = jax.value_and_grad(penalty, (0, 1))(1.1, 1.0)
  np.testing.assert_allclose(value, 0.1 - math.log(1.1), rtol=1e-4)
  np.testing.assert_allclose(slopes, [1 - 1 / 1.1, -1.1 + 1], rtol=1e-5)


def test_a_quotient_beyond_the_floats_range():
  far = gpo.gpo_loss([1.0], [0.0], [1e-30], [1e10], beta=1.0)[0]
  np.testing.assert_allclose(far, 40 * math.log(10) - 1, rtol=1e-6)


def test_second_derivatives(x64):
  ratio, pi_current, pi_ref = 1.1, 0.45, 0.5
  objective = lambda *x: gpo.gpo_objective(*map(jnp.atleast_1d, x), 0.2, 1.0)
  point = (ratio, 1.0, pi_current, pi_ref)
  hessian = jax.hessian(objective, argnums=(0, 2))(*point)
  mixed = -(1 / pi_ref - 1 / pi_current)
  expected = [[0, mixed], [mixed, -ratio / pi_current**2]]
  np.testing.assert_allclose(hessian, expected, rtol=1e-12)


def test_gradient_through_epsilon_and_beta():
  inputs = ([1.5, 0.5], [2.0, -3.0], [0.5, 0.5], [0.4, 0.4])
  slopes = jax.grad(lambda e, b: gpo.gpo_objective(*inputs, e, b), argnums=(0, 1))(0.2, 0.01)
  penalty = gpo.gpo_objective(*inputs, 0.2, 0.0) - gpo.gpo_objective(*inputs, 0.2, 1.0)
  np.testing.assert_allclose(slopes, [(2.0 + 3.0) / 2, -penalty], rtol=1e-5)


def test_a_new_value_of_epsilon_or_beta_never_compiles(caplog):
  inputs = [jnp.asarray(x) for x in random_inputs((9,))]
  functions = [gpo.gpo_objective, gpo.gpo_value_and_grad, gpo.gpo_loss]
  scalars = [0.3, 1, np.float32(0.3), np.float64(0.3), np.int32(1), np.array(0.3), True]
  scalars += [jnp.float32(0.1), jnp.array(1), jnp.bfloat16(0.5)]
  for fn in functions:
    fn(*inputs, 0.2, 0.01)
  grouped = [x.reshape(3, 3) for x in inputs]
  gpo.gpo_objective_per_group(*grouped)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    for scalar in scalars:
      for fn in functions:
        fn(*inputs, scalar, scalar)
      gpo.gpo_objective_per_group(*grouped, scalar, scalar)
  ours = [r.message for r in caplog.records if "_objective" in r.message or "_loss" in r.message]
  assert not ours


def test_under_transformations():
  inputs = random_inputs((4, 6))
  expected = [gpo.gpo_objective(*row) for row in zip(*inputs)]
  vmapped = jax.jit(jax.vmap(gpo.gpo_objective))(*inputs)
  np.testing.assert_allclose(vmapped, expected, rtol=1e-6)
  _, scanned = jax.lax.scan(lambda c, row: (c, gpo.gpo_objective(*row)), 0, tuple(inputs))
  np.testing.assert_allclose(scanned, expected, rtol=1e-6)
  first = [x[0] for x in inputs]
  sweep = jax.vmap(lambda b: gpo.gpo_objective(*first, 0.2, b))(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(sweep[0], gpo.gpo_objective(*first, 0.2, 0.0), rtol=1e-6)
  np.testing.assert_allclose(jax.checkpoint(gpo.gpo_objective)(*first), expected[0], rtol=1e-6)
  with jax.disable_jit():
    np.testing.assert_allclose(gpo.gpo_objective(*first), expected[0], rtol=1e-6)
  _, tangent = jax.jvp(lambda r: gpo.gpo_objective(r, *first[1:]), (first[0],), (first[0],))
  gradients = gpo.gpo_value_and_grad(*first)[1]
  np.testing.assert_allclose(tangent, np.sum(gradients.ratios * first[0]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
  inputs = [jnp.asarray(x, dtype) for x in random_inputs((50,))]
  value, gradients = gpo.gpo_value_and_grad(*inputs)
  assert value.dtype == jnp.float32
  assert gradients.ratios.dtype == gradients.pi_current.dtype == dtype
  assert value == gpo.gpo_objective(*[jnp.asarray(x, jnp.float32) for x in inputs])


def test_mixed_dtypes_take_the_widest(x64):
  inputs = random_inputs((5,))
  inputs[2] = inputs[2].astype(np.float64)
  value, gradients = gpo.gpo_value_and_grad(*inputs)
  assert value.dtype == jnp.float64
  assert gradients.ratios.dtype == jnp.float32
  assert gradients.pi_current.dtype == jnp.float64


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
  data=st.data(), size=st.integers(1, 5), epsilon=st.floats(0.01, 0.9), beta=st.floats(0, 2)
)
def test_any_valid_input_agrees_with_the_formula(data, size, epsilon, beta):
  positive = st.lists(st.floats(2**-6, 10, width=32), min_size=size, max_size=size)
  signed = st.lists(st.floats(-10, 10, width=32), min_size=size, max_size=size)
  inputs = [data.draw(s) for s in (positive, signed, positive, positive)]
  expected = [written_loss(*x, epsilon, beta) for x in zip(*inputs)]
  np.testing.assert_allclose(gpo.gpo_loss(*inputs, epsilon, beta), expected, rtol=1e-5, atol=1e-5)


# --- errors ------------------------------------------------------------------------------------

GOOD = [[1.0, 1.0]] * 4
BAD_INPUTS = [
  ([[1.0, 1.0, 1.0], *GOOD[1:]], {}, r"ratios \[3\], advantages \[2\], pi_current \[2\]"),
  ([[]] * 4, {}, r"every axis at least 1; got ratios \[0\]"),
  ([[[1.0, 1.0]]] * 4, {}, r"one shape \[N\].*ratios \[1, 2\]"),
  ([1.0] * 4, {}, r"one shape \[N\].*ratios \[\]"),
  ([GOOD[0], ["a", "b"], *GOOD[2:]], {}, "advantages must hold real numbers; got text"),
  ([*GOOD[:2], [1j, 1], GOOD[3]], {}, "pi_current must hold real numbers; got dtype complex128"),
  ([*GOOD[:3], None], {}, "pi_ref must hold real numbers; got None"),
  ([[[1.0], [1.0, 2.0]], *GOOD[1:]], {}, "ratios must be a rectangular array"),
  (GOOD, {"epsilon": [0.1, 0.2]}, r"epsilon must be a scalar; got shape \[2\]"),
  (GOOD, {"epsilon": "0.2"}, "epsilon must hold a number; got text"),
  (GOOD, {"beta": None}, "beta must hold a number; got None"),
]


@pytest.mark.parametrize(("inputs", "settings", "message"), BAD_INPUTS)
@pytest.mark.parametrize("fn", [gpo.gpo_objective, gpo.gpo_value_and_grad, gpo.gpo_loss])
def test_bad_input_is_refused_by_name(fn, inputs, settings, message):
  with pytest.raises(ValueError, match=message):
    fn(*inputs, **settings)


def test_bad_shapes_are_refused_while_tracing():
  with pytest.raises(ValueError, match=r"ratios \[3\]"):
    jax.eval_shape(gpo.gpo_objective, jnp.ones(3), *[jnp.ones(2)] * 3)
  with pytest.raises(ValueError, match=r"one shape \[P, N\].*ratios \[2\]"):
    gpo.gpo_objective_per_group(*GOOD)
  with pytest.raises(ValueError, match=r"ratios \[2\], where \[3\]"):
    gpo.gpo_loss(*GOOD, where=[True, True, False])


def test_integers_and_bools_are_promoted_and_inputs_untouched():
  read_only = np.arange(1, 7, dtype=np.int32)[::2]
  read_only.flags.writeable = False
  value = gpo.gpo_objective(read_only, np.array([True, False, True]), [1, 2, 3], [1, 1, 1])
  expected = gpo.gpo_objective([1.0, 3.0, 5.0], [1.0, 0.0, 1.0], [1.0, 2.0, 3.0], [1.0] * 3)
  assert value == expected
  np.testing.assert_array_equal(read_only, [1, 3, 5])


@pytest.mark.parametrize("fn", [gpo.gpo_objective, gpo.gpo_loss])
def test_without_beta_a_divergence_beyond_the_floats_is_no_penalty(fn):
  extreme = np.float32([[1e30], [1], [0.5], [1e-20]])  # the divergence is 5e49
  assert np.isinf(fn(*extreme, beta=1.0)).all()
  np.testing.assert_allclose(np.abs(fn(*extreme, beta=0.0)), 1.2, rtol=1e-6)
  slopes = jax.grad(lambda *x: jnp.sum(fn(*x, beta=0.0)), argnums=(0, 1, 2, 3))(*extreme)
  np.testing.assert_allclose(np.abs(slopes), [[0], [1.2], [0], [0]], rtol=1e-6)


# --- check -------------------------------------------------------------------------------------

POSITIVE = "must be positive, finite and not subnormal; got"
BAD_VALUES = [
  ("ratios", [1.0, -1.0], rf"ratios {POSITIVE} -1.0 at index \[1\]"),
  ("ratios", [0.0, -1.0], rf"ratios {POSITIVE} 0.0 at index \[0\]"),
  ("ratios", [1.0, np.inf], rf"ratios {POSITIVE} inf at index \[1\]"),
  ("pi_current", [np.nan, 1.0], rf"pi_current {POSITIVE} nan at index \[0\]"),
  ("pi_ref", [1.0, 0.0], rf"pi_ref {POSITIVE} 0.0 at index \[1\]"),
  ("pi_ref", [1.0, 1e-40], rf"pi_ref {POSITIVE} .*e-41 at index \[1\]"),
  ("advantages", [1.0, np.nan], r"advantages must be finite; got nan at index \[1\]"),
  ("advantages", [-np.inf, 1.0], r"advantages must be finite; got -inf at index \[0\]"),
  ("epsilon", 0.0, "epsilon must be greater than 0; got 0.0"),
  ("epsilon", np.nan, "epsilon must be greater than 0; got nan"),
  ("beta", -0.5, "beta must be at least 0 and finite; got -0.5"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
@pytest.mark.parametrize("fn", [gpo.gpo_objective, gpo.gpo_value_and_grad, gpo.gpo_loss])
def test_check_names_the_argument_and_the_first_bad_index(fn, name, value, message):
  arguments = dict(zip(NAMES, [*GOOD, 0.2, 0.01])) | {name: value}
  with pytest.raises(checkify.JaxRuntimeError, match=message):
    gpo.check(fn)(**arguments)
  with pytest.raises(checkify.JaxRuntimeError, match=message):
    gpo.check(jax.jit(fn))(*arguments.values())


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_check_inside_a_jitted_step(name, value, message):
  arguments = dict(zip(NAMES, [*GOOD, 0.2, 0.01])) | {name: value}
  step = jax.jit(checkify.checkify(jax.value_and_grad(gpo.check(gpo.gpo_objective))))
  error, _ = step(*[jnp.asarray(x) for x in arguments.values()])
  with pytest.raises(checkify.JaxRuntimeError, match=message):
    error.throw()


def test_check_leaves_good_values_alone():
  inputs = random_inputs((3, 4))
  np.testing.assert_array_equal(
    gpo.check(gpo.gpo_objective_per_group)(*inputs), gpo.gpo_objective_per_group(*inputs)
  )
  first = [x[0] for x in inputs]
  checked = jax.grad(gpo.check(gpo.gpo_objective))(*first)
  np.testing.assert_array_equal(checked, jax.grad(gpo.gpo_objective)(*first))
  assert gpo.check(gpo.gpo_objective).__name__ == "gpo_objective"


def test_check_in_groups_and_behind_a_mask():
  groups = np.ones((2, 3), np.float32)
  bad = groups.copy()
  bad[1, 2] = 0
  with pytest.raises(checkify.JaxRuntimeError, match=r"pi_ref .* got 0.0 at index \[1 2\]"):
    gpo.check(gpo.gpo_objective_per_group)(groups, groups, groups, bad)
  losses = gpo.check(gpo.gpo_loss)(*[[1.0, np.nan]] * 4, where=[1, 0])
  np.testing.assert_array_equal(losses, [-1.0, 0.0])


def test_check_leaves_shapes_to_clear_errors():
  checked = gpo.check(gpo.gpo_loss)
  for inputs, where, message in (
    ([[]] * 4, None, r"every axis at least 1; got ratios \[0\]"),
    ([[]] * 4, [], r"every axis at least 1; got ratios \[0\]"),
    (GOOD, [True], r"where must have the shape of .*\[2\], where \[1\]"),
    (GOOD, [True] * 3, r"where must have the shape of .*\[2\], where \[3\]"),
    (GOOD, np.ones((2, 2)), r"where must have the shape of .*\[2\], where \[2, 2\]"),
    (GOOD, True, r"where must have the shape of .*\[2\], where \[\]"),
    ([*GOOD[:3], [1.0] * 3], None, r"got ratios \[2\], .*pi_ref \[3\]"),
  ):
    with pytest.raises(ValueError, match=message):
      checked(*inputs, where=where)


def test_check_needs_something_to_check():
  with pytest.raises(ValueError, match="an argument among"):
    gpo.check(lambda x: x)


# --- what the penalty estimates, by enumeration ------------------------------------------------


def policies(size=5, seed=0):
  rng = np.random.default_rng(seed)
  logits, old, ref = rng.normal(size=(3, size)) * 0.7
  return jnp.asarray(logits), jax.nn.softmax(old), jax.nn.softmax(ref)


def expected_penalty(logits, old, ref, swapped):
  """E over x from `old` of the penalty of one sample: a sum over the whole vocabulary."""
  p = jax.nn.softmax(logits)
  bracket = (ref, p) if swapped else (p, ref)
  return jnp.sum(old * gpo.gpo_loss(p / old, jnp.zeros_like(p), *bracket, beta=1.0))


def kl(logits, ref):
  p = jax.nn.softmax(logits)
  return jnp.sum(p * jnp.log(p / ref))


def chi2(logits, ref):
  p = jax.nn.softmax(logits)
  return jnp.sum((p - ref) ** 2 / ref)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_chi2_minus_kl_and_not_a_kl(on_policy, seed, x64):
  logits, old, ref = policies(seed=seed)
  old = jax.nn.softmax(logits) if on_policy else old
  value_and_grad = jax.value_and_grad(functools.partial(expected_penalty, swapped=False))
  value, gradient = value_and_grad(logits, old, ref)
  expected = jax.value_and_grad(lambda x: chi2(x, ref) - kl(x, ref))(logits)
  np.testing.assert_allclose(value, expected[0], rtol=1e-11)
  np.testing.assert_allclose(gradient, expected[1], rtol=1e-10, atol=1e-13)
  assert abs(value / kl(logits, ref) - 1) > 0.01


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_with_the_arguments_exchanged_it_is_the_unbiased_kl(on_policy, seed, x64):
  logits, old, ref = policies(seed=seed)
  old = jax.nn.softmax(logits) if on_policy else old
  value_and_grad = jax.value_and_grad(functools.partial(expected_penalty, swapped=True))
  value, gradient = value_and_grad(logits, old, ref)
  expected = jax.value_and_grad(kl)(logits, ref)
  np.testing.assert_allclose(value, expected[0], rtol=1e-11)
  np.testing.assert_allclose(gradient, expected[1], rtol=1e-10, atol=1e-13)


def test_it_agrees_with_the_kl_to_second_order_only(x64):
  logits, _, ref = policies()
  direction = logits - jnp.log(ref)
  ratios = []
  for scale in (1e-3, 1e-2, 1e-1):
    near = jnp.log(ref) + scale * direction
    value = expected_penalty(near, jax.nn.softmax(near), ref, swapped=False)
    ratios.append(value / kl(near, ref) - 1)
  np.testing.assert_allclose(ratios[0], 0, atol=1e-3)
  np.testing.assert_allclose([ratios[1] / ratios[0], ratios[2] / ratios[1]], 10, rtol=0.2)


def test_below_a_fifth_of_the_reference_the_penalty_pushes_further_down(x64):
  def penalty(p):  # on-policy: ρ π_old = π_current, so u(u − log u − 1) with u = π_current/π_ref
    p = jnp.atleast_1d(p)
    return gpo.gpo_loss(p, [0.0], p, [1.0], beta=1.0)[0]

  slopes = jax.vmap(jax.grad(penalty))(jnp.array([0.1, 0.2, 0.2032, 0.21, 0.9]))
  assert slopes[0] > 0
  assert slopes[1] > 0
  np.testing.assert_allclose(slopes[2], 0, atol=1e-4)
  assert slopes[3] < 0


def test_no_pair_of_functions_disagrees():
  inputs = random_inputs((8,))
  value, gradients = gpo.gpo_value_and_grad(*inputs)
  assert value == gpo.gpo_objective(*inputs)
  auto = jax.grad(gpo.gpo_objective, argnums=(0, 2))(*inputs)
  for ours, theirs in itertools.zip_longest(gradients, auto):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
