"""Objectives inside real training code: microbatches, scans, modules, schedules, line searches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import microbatching

import gpo_jax as gpo
from tests.support.batches import COVERING, PRESETS, relative_error
from tests.support.policies import (
  DATA,
  TOKENS,
  VOCABULARY,
  WIDTH,
  assert_trees_close,
  hidden_states,
  policy,
  prepare,
  start,
)
from tests.support.quick import jit

SUM, CONCAT = microbatching.AccumulationType.SUM, microbatching.AccumulationType.CONCAT


@pytest.fixture(autouse=True)
def _standard_promotion():
  """Optax's own arithmetic promotes."""
  with jax.numpy_dtype_promotion("standard"):
    yield


# --- microbatches and scans ----------------------------------------------------------------------


def make_module():
  nnx = pytest.importorskip("flax.nnx")

  class Module(nnx.Module):
    def __init__(self, rngs):
      self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
      self.readout = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
      return self.readout(jnp.tanh(self.embedding(tokens)))

  return Module(nnx.Rngs(0)), lambda module, tokens: gpo.token_log_probs(module(tokens), tokens)


def in_slices(grad_fn, params, rollout, tokens, size=2):
  """The whole batch, microbatches of optax and a scan over slices: what each computes."""
  kinds = ((SUM, CONCAT), SUM)
  settings = {"argnums": (1, 2), "microbatch_size": size}
  microbatched = microbatching.microbatch(grad_fn, accumulator=kinds, **settings)

  def step(carry, data):
    (loss, terms), gradient = grad_fn(params, *data)
    return jax.tree.map(jnp.add, carry, (loss, gradient)), terms

  split = lambda x: x.reshape(-1, size, *x.shape[1:])
  zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
  (loss, gradient), terms = jax.lax.scan(step, zero, jax.tree.map(split, (rollout, tokens)))
  join = lambda x: x.reshape(-1, *x.shape[2:])
  results = {
    "whole": grad_fn(params, rollout, tokens),
    "microbatch": microbatched(params, rollout, tokens),
    "scan": ((loss, jax.tree.map(join, terms)), gradient),
  }
  return {
    name: (loss, gpo.summarize(terms, rollout), gradient)
    for name, ((loss, terms), gradient) in results.items()
  }


CASES = [*((name, "pytree") for name in COVERING), ("deepseek_v32", "module")]


@pytest.mark.quick("gspo-pytree")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_microbatches_and_scans_are_the_whole_batch(name, kind):
  params, of_params = (start(), policy) if kind == "pytree" else make_module()
  objective = PRESETS[name]
  grad_fn = jax.value_and_grad(gpo.as_loss(objective, of_params), has_aux=True)
  found = jit(functools.partial(in_slices, grad_fn))(params, prepare(objective), TOKENS)
  loss, metrics, gradient = found.pop("whole")
  assert any(np.any(x) for x in jax.tree.leaves(gradient))
  for loss_, metrics_, gradient_ in found.values():
    np.testing.assert_allclose(loss_, loss, rtol=1e-5, atol=1e-6)
    assert_trees_close(gradient_, gradient)
    assert metrics_.keys() == metrics.keys()
    for key in metrics:
      np.testing.assert_allclose(metrics_[key], metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_terms_that_were_summed_are_caught():
  objective, params = gpo.dapo(), start()
  rollout = prepare(objective)
  grad_fn = jax.value_and_grad(gpo.as_loss(objective, policy), has_aux=True)
  by_default = microbatching.microbatch(grad_fn, argnums=(1, 2), microbatch_size=2)
  (_, terms), _ = jax.eval_shape(by_default, params, rollout, TOKENS)
  with pytest.raises(
    ValueError, match=r"shape of rollout.mask, \[8, 4, 6\]; got \[2, 4, 6\].*CONCAT"
  ):
    gpo.summarize(terms, rollout)


@pytest.mark.slow
def test_slices_of_unequal_size_add_up_and_a_mean_of_means_does_not():
  objective, params = PRESETS["deepseek_v32"], start()
  grad_fn = jit(jax.value_and_grad(gpo.as_loss(objective, policy), has_aux=True))
  rollout = prepare(objective)
  (loss, terms), gradient = grad_fn(params, rollout, TOKENS)
  slices = [slice(0, 3), slice(3, 8)]
  parts = [grad_fn(params, *jax.tree.map(lambda x: x[s], (rollout, TOKENS))) for s in slices]
  add = functools.partial(jax.tree.map, lambda *x: functools.reduce(jnp.add, x))
  np.testing.assert_allclose(add(*(part[0][0] for part in parts)), loss, rtol=1e-5)
  assert_trees_close(add(*(gradient for _, gradient in parts)), gradient)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(part[0][1] for part in parts))
  assert_trees_close(gpo.summarize(joined, rollout), gpo.summarize(terms, rollout))

  alone = []
  for s in slices:
    fields = {k: v[s] for k, v in vars(rollout).items() if k.endswith("log_probs")}
    part = objective.prepare(DATA.rewards[s], DATA.mask[s], **fields)
    alone.append(grad_fn(params, part, TOKENS[s])[1]["mix"])
  assert relative_error(functools.reduce(jnp.add, alone) / 2, gradient["mix"]) > 1e-2


def test_multi_steps_over_slices_of_one_rollout_are_the_full_batch_divided():
  """What MultiSteps is right for: weights from the whole batch, its mean undone by the count."""
  objective, params = gpo.dapo(), start()
  grad_fn = jit(jax.grad(gpo.as_loss(objective, policy, has_aux=False)))
  rollout = prepare(objective)
  steps = optax.MultiSteps(optax.sgd(4.0), every_k_schedule=4)
  state = steps.init(params)
  for i in range(0, 8, 2):
    part = jax.tree.map(lambda x: x[i : i + 2], (rollout, TOKENS))
    updates, state = steps.update(grad_fn(params, *part), state, params)
  assert_trees_close(jax.tree.map(jnp.negative, updates), grad_fn(params, rollout, TOKENS))


# --- optax ---------------------------------------------------------------------------------------


def test_schedules_compile_once_and_are_the_numbers_of_their_step():
  beta = optax.linear_schedule(0.1, 0.0, 10)
  epsilon = optax.exponential_decay(0.3, 5, 0.5)
  rollout, params, traces = prepare(gpo.grpo()), start(), []

  @jit
  def loss(count):
    traces.append(1)
    objective = gpo.grpo(epsilon_low=epsilon(count), beta=beta(count))
    return gpo.as_loss(objective, policy, has_aux=False)(params, rollout, TOKENS)

  for count in range(3):
    fixed = gpo.grpo(epsilon_low=float(epsilon(count)), beta=float(beta(count)))
    expected = gpo.as_loss(fixed, policy, has_aux=False)(params, rollout, TOKENS)
    np.testing.assert_allclose(loss(count), expected, rtol=1e-5)
  assert len(traces) == 1


def test_line_searches_take_the_loss_alone():
  objective, params = gpo.grpo(), start()
  rollout = prepare(objective)
  value_fn = lambda params: gpo.as_loss(objective, policy, has_aux=False)(params, rollout, TOKENS)
  search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
  optimizer = optax.chain(optax.sgd(1.0), search)

  @jit
  def step(params, state):
    value, grad = jax.value_and_grad(value_fn)(params)
    seen = {"value": value, "grad": grad, "value_fn": value_fn}
    updates, state = optimizer.update(grad, state, params, **seen)
    return optax.apply_updates(params, updates), state, value

  state, losses = optimizer.init(params), []
  for _ in range(4):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert np.all(np.diff(losses) < 0)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_meta_gradients_through_an_update():
  """How the loss after one step depends on the β of that step: autodiff and a difference agree."""
  wide = lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x
  params, rollout = jax.tree.map(wide, (start(), prepare(gpo.grpo())))

  def after(beta):
    grad = jax.grad(gpo.as_loss(gpo.grpo(beta=beta), policy, has_aux=False))
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, params, grad(params, rollout, TOKENS))
    return gpo.as_loss(gpo.grpo(beta=0.0), policy, has_aux=False)(moved, rollout, TOKENS)

  ends = jnp.array([0.1 + 1e-5, 0.1 - 1e-5])
  slope, (above, below) = jit(lambda x: (jax.grad(after)(x), jax.lax.map(after, ends)))(0.1)
  difference = (above - below) / 2e-5
  np.testing.assert_allclose(slope, difference, rtol=1e-6)
  assert slope != 0


# --- samplers ------------------------------------------------------------------------------------


def test_a_bfloat16_sampler_shows_in_the_metrics_and_is_truncated():
  """The sampler rounds what the learner does not; the capped weight bounds what that may do."""
  params = jax.tree.map(lambda x: 2 * x, start())
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  logits = hidden_states(rounded, TOKENS) @ rounded["unembedding"].T
  sampled, learned = gpo.token_log_probs(logits, TOKENS), policy(params, TOKENS)
  assert sampled.dtype == jnp.float32
  cap = functools.partial(gpo.corrections.truncate_importance, cap=1.0)
  objectives = {"plain": gpo.dapo(), "capped": gpo.dapo().replace(corrections=(cap,))}
  found = {}
  for name, objective in objectives.items():
    rollout = objective.prepare(DATA.rewards, DATA.mask, learned, sampler_log_probs=sampled)
    loss_fn = gpo.as_loss(objective, policy)
    (loss, terms), grad = jit(jax.value_and_grad(loss_fn, has_aux=True))(params, rollout, TOKENS)
    assert np.isfinite(loss)
    assert np.any(grad["mix"])
    found[name] = gpo.summarize(terms, rollout)
  weight = np.exp(np.asarray(learned, float) - np.asarray(sampled, float))[DATA.mask]
  assert weight.min() < 1.0 < weight.max()
  expected = np.mean(weight - 1 - np.log(weight))
  np.testing.assert_allclose(found["plain"]["sampler_kl"], expected, rtol=1e-5)
  capped = np.minimum(weight, 1).mean()
  np.testing.assert_allclose(found["capped"]["factor_mean"], capped, rtol=1e-5)
  assert "factor_mean" not in found["plain"]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("objective", "function", "message"),
  [
    pytest.param(gpo.grpo, policy, r"objective must be an Objective.*gpo.grpo\(\)", id="preset"),
    pytest.param(gpo.dapo(), None, "policy must be a function", id="no_policy"),
    pytest.param(
      gpo.dapo(),
      lambda params, tokens: policy(params, tokens)[..., None],
      r"log_probs must have the shape of mask; .*\[8, 4, 6, 1\]",
      id="shape",
    ),
  ],
)
def test_a_mistake_is_named(objective, function, message):
  with pytest.raises(ValueError, match=message):
    gpo.as_loss(objective, function)(start(), prepare(gpo.dapo()), TOKENS)
