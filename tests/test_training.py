"""The objective inside real training code: microbatches, schedules, line searches, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from tests.batches import PRESETS, batch, relative_error

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion():
  """Optax's own arithmetic promotes."""
  with jax.numpy_dtype_promotion("standard"):
    yield


DATA = batch(prompts=8, length=8)
WIDTH, VOCABULARY = 16, 32
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, DATA.mask.shape))


def start(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32)
  return {
    "embedding": draw(VOCABULARY, WIDTH),
    "mix": draw(WIDTH, WIDTH),
    "unembedding": draw(VOCABULARY, WIDTH),
  }


def hidden_states(params, tokens):
  """A mean over the tokens before: causal, and every parameter matters."""
  before = jnp.concatenate([jnp.zeros_like(tokens[..., :1]), tokens[..., :-1]], axis=-1)
  sums = jnp.cumsum(params["embedding"][before], axis=-2)
  return jnp.tanh(sums @ params["mix"])


def policy(params, tokens):
  return gpo.token_log_probs(hidden_states(params, tokens) @ params["unembedding"].T, tokens)


def prepare(objective, params=None, data=DATA):
  """A rollout of a sampler that is a little stale."""
  old = policy(start(2) if params is None else params, TOKENS)
  near = lambda seed: old + np.random.default_rng(seed).normal(0, 0.1, old.shape).astype(np.float32)
  return objective.prepare(
    data.rewards, data.mask, near(1), ref_log_probs=near(2), sampler_log_probs=near(3)
  )


def assert_trees_close(found, expected, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert relative_error(x, y) < tolerance


def loss_and_grad(objective, params, rollout):
  loss_fn = gpo.as_loss(objective, policy)
  return jax.value_and_grad(loss_fn, has_aux=True)(params, rollout, TOKENS)


# --- microbatches
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "deepseek_v32", "dr_grpo"])
def test_optax_microbatches_are_the_full_batch(name):
  microbatching = pytest.importorskip("optax.microbatching")
  kinds = microbatching.AccumulationType
  objective, params = PRESETS[name], start()
  rollout = prepare(objective)
  (loss, terms), gradient = loss_and_grad(objective, params, rollout)
  grad_fn = jax.value_and_grad(gpo.as_loss(objective, policy), has_aux=True)
  cut = microbatching.microbatch(
    grad_fn,
    argnums=(1, 2),
    microbatch_size=2,
    accumulator=((kinds.SUM, kinds.CONCAT), kinds.SUM),
  )
  (found_loss, found_terms), found = jax.jit(cut)(params, rollout, TOKENS)
  np.testing.assert_allclose(found_loss, loss, rtol=1e-5, atol=1e-7)
  assert_trees_close(found, gradient)
  assert_trees_close(
    gpo.summarize(found_terms, rollout), gpo.summarize(terms, rollout), tolerance=1e-4
  )


def test_a_loop_is_the_full_batch_and_a_mean_of_means_is_not():
  objective, params, optimizer = gpo.dapo(), start(), optax.sgd(1.0)
  grad_fn = jax.jit(jax.grad(gpo.as_loss(objective, policy, has_aux=False)))
  rollout = prepare(objective)
  expected = grad_fn(params, rollout, TOKENS)
  cuts = [slice(i, i + 2) for i in range(0, 8, 2)]
  parts = [(jax.tree.map(lambda x: x[c], rollout), TOKENS[c]) for c in cuts]
  total = functools.reduce(
    functools.partial(jax.tree.map, jnp.add), [grad_fn(params, *part) for part in parts]
  )
  assert_trees_close(total, expected)

  # The wrong way: every microbatch prepared alone, MultiSteps averaging their gradients.
  steps = optax.MultiSteps(optimizer, every_k_schedule=4)
  state = steps.init(params)
  for cut, tokens in zip(cuts, (tokens for _, tokens in parts)):
    alone = objective.prepare(DATA.rewards[cut], DATA.mask[cut], rollout.old_log_probs[cut])
    updates, state = steps.update(grad_fn(params, alone, tokens), state, params)
  wrong = jax.tree.map(jnp.negative, updates)
  assert relative_error(wrong["mix"], expected["mix"]) > 1e-2


def test_multi_steps_over_cuts_of_one_rollout_are_the_full_batch_divided():
  """What MultiSteps is right for: weights from the whole batch, its mean undone by the count."""
  objective, params = gpo.dapo(), start()
  grad_fn = jax.jit(jax.grad(gpo.as_loss(objective, policy, has_aux=False)))
  rollout = prepare(objective)
  steps = optax.MultiSteps(optax.sgd(4.0), every_k_schedule=4)
  state = steps.init(params)
  for c in range(0, 8, 2):
    part = jax.tree.map(lambda x: x[c : c + 2], rollout)
    updates, state = steps.update(grad_fn(params, part, TOKENS[c : c + 2]), state, params)
  assert_trees_close(jax.tree.map(jnp.negative, updates), grad_fn(params, rollout, TOKENS))


# --- optax
# -------------------------------------------------------------------------------------------


def test_schedules_compile_once_and_are_the_numbers_of_their_step():
  beta = optax.linear_schedule(0.1, 0.0, 10)
  epsilon = optax.exponential_decay(0.3, 5, 0.5)
  rollout, params, traces = prepare(gpo.grpo()), start(), []

  @jax.jit
  def loss(count):
    traces.append(1)
    objective = gpo.grpo(epsilon=epsilon(count), beta=beta(count))
    return gpo.as_loss(objective, policy, has_aux=False)(params, rollout, TOKENS)

  for count in range(3):
    fixed = gpo.grpo(epsilon=float(epsilon(count)), beta=float(beta(count)))
    expected = gpo.as_loss(fixed, policy, has_aux=False)(params, rollout, TOKENS)
    np.testing.assert_allclose(loss(count), expected, rtol=1e-5)
  assert len(traces) == 1


def test_line_searches_take_the_loss_alone():
  objective, params = gpo.grpo(), start()
  rollout = prepare(objective)
  value_fn = gpo.as_loss(objective, policy, has_aux=False)
  optimizer = optax.chain(
    optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
  )
  state, losses = optimizer.init(params), []
  for _ in range(4):
    value, gradient = jax.value_and_grad(value_fn)(params, rollout, TOKENS)
    updates, state = optimizer.update(
      gradient,
      state,
      params,
      value=value,
      grad=gradient,
      value_fn=lambda params: value_fn(params, rollout, TOKENS),
    )
    params = optax.apply_updates(params, updates)
    losses.append(float(value))
  assert np.all(np.diff(losses) < 0)


@pytest.mark.usefixtures("x64")
def test_meta_gradients_through_an_update():
  """How the loss after one step depends on the β of that step: autodiff and a difference agree."""
  wide = lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x
  params, rollout = jax.tree.map(wide, (start(), prepare(gpo.grpo())))

  def after(beta):
    grad = jax.grad(gpo.as_loss(gpo.grpo(beta=beta), policy, has_aux=False))
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, params, grad(params, rollout, TOKENS))
    return gpo.as_loss(gpo.grpo(beta=0.0), policy, has_aux=False)(moved, rollout, TOKENS)

  slope = jax.grad(after)(0.1)
  difference = (after(0.1 + 1e-5) - after(0.1 - 1e-5)) / 2e-5
  np.testing.assert_allclose(slope, difference, rtol=1e-5)
  assert slope != 0


# --- devices
# -----------------------------------------------------------------------------------------


def train(params, rollout, tokens, loss_fn, steps=3):
  """Three steps of Adam: what every arrangement of devices must agree on."""
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params, state, rollout, tokens):
    loss, gradient = jax.value_and_grad(loss_fn)(params, rollout, tokens)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss, gradient

  state, history = optimizer.init(params), []
  for _ in range(steps):
    params, state, loss, gradient = step(params, state, rollout, tokens)
    history.append((loss, gradient))
  return jax.tree.map(np.asarray, (params, history))


def linear_policy_loss(objective):
  def loss_fn(params, rollout, tokens):
    hidden = hidden_states(params, tokens)
    return gpo.linear_loss(objective, hidden, params["unembedding"], tokens, rollout)[0]

  return loss_fn


PARAMETER_SHARDINGS = {
  "replicated": {"embedding": P(), "mix": P(), "unembedding": P()},
  "fully sharded": {
    "embedding": P(None, "data"), "mix": P("data"), "unembedding": P("model", "data"),
  },
  "vocabulary-parallel": {"embedding": P(), "mix": P(), "unembedding": P("model")},
}  # fmt: skip


@pytest.mark.parametrize("layout", PARAMETER_SHARDINGS)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("from_hidden", [False, True])
def test_training_on_a_mesh_is_training_on_one_device(layout, preset, from_hidden):
  objective, params = PRESETS[preset], start()
  rollout = prepare(objective)
  loss_fn = gpo.as_loss(objective, policy, has_aux=False)
  expected = train(params, rollout, TOKENS, loss_fn)
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  sharded = {name: put(x, PARAMETER_SHARDINGS[layout][name]) for name, x in params.items()}
  data = jax.tree.map(lambda x: put(x, P("data")), (rollout, TOKENS))
  if from_hidden:
    loss_fn = linear_policy_loss(objective)
  assert_trees_close(train(sharded, *data, loss_fn), expected, tolerance=1e-4)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_training_on_an_explicit_mesh_is_training_on_one_device(preset):
  objective, params = PRESETS[preset], start()
  rollout = prepare(objective)
  expected = train(params, rollout, TOKENS, gpo.as_loss(objective, policy, has_aux=False))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

  def explicit_hidden(params, tokens):
    before = jnp.concatenate([jnp.zeros_like(tokens[..., :1]), tokens[..., :-1]], axis=-1)
    rows = params["embedding"].at[before].get(out_sharding=P("data"))
    return jnp.tanh(jnp.cumsum(rows, axis=-2) @ params["mix"])

  def loss_fn(params, rollout, tokens):
    hidden = explicit_hidden(params, tokens)
    return gpo.linear_loss(objective, hidden, params["unembedding"], tokens, rollout)[0]

  with jax.set_mesh(mesh):
    data = jax.tree.map(lambda x: jax.device_put(x, P("data")), (rollout, TOKENS))
    replicated = jax.device_put(params, P())
    assert_trees_close(train(replicated, *data, loss_fn), expected, tolerance=1e-4)


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_training_under_shard_map_is_training_on_one_device(preset):
  objective, params = PRESETS[preset], start()
  rollout = prepare(objective)
  loss_fn = gpo.as_loss(objective, policy, has_aux=False)
  expected = train(params, rollout, TOKENS, loss_fn)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda *arguments: jax.lax.psum(loss_fn(*arguments), "data"),
    mesh=mesh,
    in_specs=(P(), P("data"), P("data")),
    out_specs=P(),
  )
  assert_trees_close(train(params, rollout, TOKENS, mapped), expected, tolerance=1e-4)


# --- samplers
# ----------------------------------------------------------------------------------------


def test_a_bfloat16_sampler_shows_in_the_metrics_and_is_truncated():
  """The sampler rounds what the learner does not; the capped weight bounds what that may do."""
  params = jax.tree.map(lambda x: 3 * x, start())
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  logits = hidden_states(rounded, TOKENS) @ rounded["unembedding"].T
  sampled = gpo.token_log_probs(logits, TOKENS)
  assert sampled.dtype == jnp.float32
  learned = policy(params, TOKENS)
  plain = gpo.dapo()
  capped = plain.replace(
    corrections=(functools.partial(gpo.corrections.truncate_importance, cap=1.0),)
  )
  found = {}
  for name, objective in {"plain": plain, "capped": capped}.items():
    rollout = objective.prepare(DATA.rewards, DATA.mask, learned, sampler_log_probs=sampled)
    _, terms = objective(learned, rollout)
    trained, history = train(params, rollout, TOKENS, gpo.as_loss(objective, policy, has_aux=False))
    assert np.isfinite(jax.tree.leaves(history)[0]).all()
    assert relative_error(trained["mix"], params["mix"]) > 1e-4
    found[name] = gpo.summarize(terms, rollout)
  mask = np.asarray(DATA.mask)
  weight = np.exp(np.asarray(learned) - np.asarray(sampled))[mask]
  assert weight.min() < 1.0 < weight.max()
  assert found["plain"]["sampler_kl"] > 0
  np.testing.assert_allclose(
    found["plain"]["sampler_kl"], np.mean(weight - 1 - np.log(weight)), rtol=1e-3
  )
  np.testing.assert_allclose(
    found["capped"]["factor_mean"], np.minimum(weight, 1).mean(), rtol=1e-5
  )
  assert "factor_mean" not in found["plain"]
