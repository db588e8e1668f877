"""Every arrangement of devices trains the same policy, and sees the same batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from tests.support.batches import PRESETS, batch, grpo_with, relative_error, value_and_grad
from tests.support.packing import pack
from tests.support.policies import (
  TOKENS,
  assert_trees_close,
  hidden_states,
  policy,
  prepare,
  start,
)
from tests.support.quick import jit

BATCH = batch(prompts=8)
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
EACH_AXIS_TYPE = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])


def mesh_of(axis_type, shape=(8,), names=("data",)):
  return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


# --- training ------------------------------------------------------------------------------------


def train(params, rollout, tokens, loss_fn):
  """Three steps: what every arrangement of devices must agree on."""
  optimizer = optax.sgd(0.1, momentum=0.9)

  @jit
  def steps(params, rollout, tokens):
    def step(carry, _):
      params, state = carry
      loss, gradient = jax.value_and_grad(loss_fn)(params, rollout, tokens)
      updates, state = optimizer.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), (loss, gradient)

    (params, _), history = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    return params, history

  with jax.numpy_dtype_promotion("standard"):
    return jax.tree.map(np.asarray, steps(params, rollout, tokens))


@functools.cache
def on_one_device(name):
  loss_fn = gpo.as_loss(PRESETS[name], policy, has_aux=False)
  return train(start(), prepare(PRESETS[name]), TOKENS, loss_fn)


def assert_same_training(found, name):
  assert relative_error(on_one_device(name)[0]["mix"], start()["mix"]) > 1e-3
  assert_trees_close(found, on_one_device(name))


def linear_loss(objective, sharding=None, spec=None):
  def loss_fn(params, rollout, tokens):
    hidden = hidden_states(params, tokens, spec)
    head = params["unembedding"]
    return gpo.linear_loss(objective, hidden, head, tokens, rollout, sharding=sharding)[0]

  return loss_fn


PARAMETERS = {
  "replicated": {"embedding": P(), "mix": P(), "unembedding": P()},
  "fully_sharded": {
    "embedding": P(None, "data"), "mix": P("data"), "unembedding": P("model", "data"),
  },
  "vocabulary_parallel": {"embedding": P(), "mix": P(), "unembedding": P("model")},
}  # fmt: skip


@pytest.mark.quick("vocabulary_parallel-gspo-linear")
@pytest.mark.parametrize(
  ("layout", "name", "path"),
  [
    ("replicated", "gspo", "logits"),
    ("fully_sharded", "grpo", "linear"),
    ("vocabulary_parallel", "gspo", "linear"),
    ("replicated", "grpo", "linear"),
    ("fully_sharded", "gspo", "logits"),
    ("fully_sharded", "gspo", "linear"),
    ("vocabulary_parallel", "grpo", "linear"),
    ("vocabulary_parallel", "grpo", "linear_unsaid"),
  ],
)
def test_training_on_a_mesh_is_training_on_one_device(layout, name, path):
  objective, specs = PRESETS[name], PARAMETERS[layout]
  mesh = mesh_of(AUTO, (4, 2), ("data", "model"))
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  params = {key: put(x, specs[key]) for key, x in start().items()}
  data = jax.tree.map(lambda x: put(x, P("data")), (prepare(objective), TOKENS))
  said = gpo.Sharding(mesh, tokens=P("data"), unembedding=specs["unembedding"])
  loss_fn = linear_loss(objective, said if path == "linear" else None)
  if path == "logits":
    loss_fn = gpo.as_loss(objective, policy, has_aux=False)
  assert_same_training(train(params, *data, loss_fn), name)


@pytest.mark.quick("grpo")
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_training_on_an_explicit_mesh_is_training_on_one_device(name):
  objective = PRESETS[name]
  with jax.set_mesh(mesh_of(EXPLICIT)):
    data = jax.tree.map(lambda x: jax.device_put(x, P("data")), (prepare(objective), TOKENS))
    params = jax.device_put(start(), P())
    assert_same_training(train(params, *data, linear_loss(objective, spec=P("data"))), name)


@pytest.mark.quick("gspo")
@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_training_under_shard_map_is_training_on_one_device(name):
  objective = PRESETS[name]
  loss_fn = gpo.as_loss(objective, policy, has_aux=False)
  mapped = jax.shard_map(
    lambda *arguments: jax.lax.psum(loss_fn(*arguments), "data"),
    mesh=mesh_of(AUTO),
    in_specs=(P(), P("data"), P("data")),
    out_specs=P(),
  )
  assert_same_training(train(start(), prepare(objective), TOKENS, mapped), name)


# --- a batch on eight devices --------------------------------------------------------------------


def same(found, expected, rtol=1e-5, atol=1e-6):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


@jit
def prepared_on_devices(data, objective):
  others = {k: data[k] for k in ("ref_log_probs", "sampler_log_probs")}
  rollout = objective.prepare(data["rewards"], data["mask"], data["old_log_probs"], **others)
  return jax.value_and_grad(lambda x: objective(x, rollout)[0])(data["log_probs"])


ON_MESHES = [
  pytest.param(name, kind, id=f"{name}-{kind.name}")
  for name in PRESETS
  for kind in (AUTO, EXPLICIT)
]


@pytest.mark.quick("gspo-Auto", "deepseek_v32-Explicit", "vespo-Explicit")
@pytest.mark.parametrize(("name", "axis_type"), ON_MESHES)
def test_a_batch_is_prepared_and_evaluated_alike(name, axis_type):
  objective = PRESETS[name]
  expected = value_and_grad(objective, BATCH.log_probs, BATCH.prepare(objective))
  with jax.set_mesh(mesh_of(axis_type)):
    data = jax.device_put(vars(BATCH), NamedSharding(mesh_of(axis_type), P("data")))
    same(prepared_on_devices(data, objective), expected)


WEIGHTINGS = {
  "token_mean": gpo.weightings.token_mean,
  "sequence_mean": gpo.weightings.sequence_mean,
  "token_sum": gpo.weightings.token_sum,
}


@jit
@functools.partial(
  jax.shard_map, mesh=mesh_of(AUTO), in_specs=(P("data"), P("data")), out_specs=(P(), P("data"))
)
def in_shards(log_probs, rollout):
  value, gradient = jax.value_and_grad(lambda x: gpo.grpo()(x, rollout)[0])(log_probs)
  return jax.lax.psum(value, "data"), gradient


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_shares_of_a_shard_map_add_up(name):
  rollout = BATCH.prepare(grpo_with(WEIGHTINGS[name]))
  expected = value_and_grad(gpo.grpo(), BATCH.log_probs, rollout)
  same(in_shards(BATCH.log_probs, rollout), expected)


@jit
def loss_and_metrics(objective, log_probs, rollout):
  (loss, terms), gradient = jax.value_and_grad(objective, has_aux=True)(log_probs, rollout)
  return loss, gradient, gpo.summarize(terms, rollout)


@pytest.mark.quick("gspo-explicit")
@EACH_AXIS_TYPE
@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "r1"])
def test_packed_rows_and_metrics(axis_type, name):
  objective = PRESETS[name]
  packed, _ = pack(batch(prompts=8, length=5, seed=5), rows=8)
  log_probs = packed.pop("log_probs")
  first = [packed.pop(field) for field in ("rewards", "mask", "old_log_probs")]
  rollout = objective.prepare(*first, **packed)
  expected = loss_and_metrics(objective, log_probs, rollout)
  with jax.set_mesh(mesh_of(axis_type)):
    sharding = NamedSharding(mesh_of(axis_type), P("data"))
    same(loss_and_metrics(objective, *jax.device_put((log_probs, rollout), sharding)), expected)


@pytest.mark.quick("packed-all-explicit")
@EACH_AXIS_TYPE
@pytest.mark.parametrize("sharded", ["mask", "all"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_uneven_groups(axis_type, sharded, packed):
  objective = gpo.gspo()
  ids = np.tile([1, 1, 2, 3, 0], (8, 1))
  rewards = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  group_ids = np.arange(24).reshape(8, 3) % 5
  mask = ids > 0 if packed else np.ones((8, 3, 2))

  @jit
  def step(rewards, group_ids, mask, ids):
    kind = {"segment_ids": ids} if packed else {}
    rollout = objective.prepare(rewards, mask, group_ids=group_ids, **kind)
    log_probs = jnp.where(rollout.mask, -1.0, 0.0)
    return value_and_grad(objective, log_probs, rollout)

  arguments = [rewards, group_ids, mask, ids]
  expected = step(*arguments)
  with jax.set_mesh(mesh_of(axis_type)):
    sharding = NamedSharding(mesh_of(axis_type), P("data"))
    first = 2 if sharded == "mask" else 0
    arguments[first:] = jax.device_put(arguments[first:], sharding)
    same(step(*arguments), expected)


def test_groups_by_id_of_sharded_rewards_are_not_sharded():
  rewards = jax.device_put(jnp.ones(8), NamedSharding(mesh_of(EXPLICIT), P("data")))
  value = gpo.advantages.by_group(gpo.advantages.center, rewards, jnp.arange(8) // 2)
  assert not rewards.sharding.is_fully_replicated
  assert value.sharding.is_fully_replicated


@jit
def statistics(log_probs, rollout):
  entropy = gpo.corrections.entropy_mask(-log_probs, rollout, quantile=0.5)
  return entropy, gpo.corrections.covariance_mask(log_probs, rollout, fraction=0.2)


@EACH_AXIS_TYPE
def test_statistics_over_the_batch(axis_type):
  rollout = BATCH.prepare(gpo.dapo())
  expected = statistics(jnp.asarray(BATCH.log_probs), rollout)
  with jax.set_mesh(mesh_of(axis_type)):
    sharding = NamedSharding(mesh_of(axis_type), P("data"))
    same(statistics(*jax.device_put((BATCH.log_probs, rollout), sharding)), expected, 0, 0)
