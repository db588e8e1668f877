"""A batch may be cut, shuffled, packed or spread over devices: the loss and the gradient stay.

Weights are data, computed once, so every cut adds up. The control: a mean of means does not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

import gpo_jax as gpo
from gpo_jax import weightings
from tests.batches import PRESETS, batch, grpo_with, relative_error, value_and_grad

WEIGHTINGS = {
  "token_mean": weightings.token_mean,
  "sequence_mean": weightings.sequence_mean,
  "sequence_sum": weightings.sequence_sum,
  "constant_length": Partial(weightings.constant_length, length=7.0),
  "token_sum": weightings.token_sum,
}
BATCH = batch(prompts=8)


def whole(objective, data=BATCH):
  rollout = data.prepare(objective)
  return rollout, *value_and_grad(objective, data.log_probs, rollout)


def assert_same(value, gradient, expected_value, expected_gradient):
  np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-6)
  assert relative_error(gradient, expected_gradient) < 1e-5


def part(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("pieces", [2, 8])
def test_microbatches(name, pieces):
  objective = grpo_with(WEIGHTINGS[name])
  rollout, value, gradient = whole(objective)
  cuts = [slice(i, i + 8 // pieces) for i in range(0, 8, 8 // pieces)]
  results = [value_and_grad(objective, BATCH.log_probs[c], part(rollout, c)) for c in cuts]
  assert_same(sum(v for v, _ in results), np.concatenate([g for _, g in results]), value, gradient)


@pytest.mark.parametrize("name", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_mean_of_means_is_something_else(name):
  objective = grpo_with(WEIGHTINGS[name])
  _, value, gradient = whole(objective)
  results = []
  for i in range(8):
    piece = type(BATCH)(**{k: v[i : i + 1] for k, v in vars(BATCH).items()})
    results.append(value_and_grad(objective, piece.log_probs, piece.prepare(objective)))
  mean = np.concatenate([g for _, g in results]) / 8
  assert relative_error(mean, gradient) > 0.05
  assert relative_error(np.mean([v for v, _ in results]), value) > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_adds_up_over_samples_of_a_group(name):
  objective = PRESETS[name]
  rollout, value, gradient = whole(objective)
  halves = [(slice(None), slice(0, 1)), (slice(None), slice(1, 4))]
  results = [value_and_grad(objective, BATCH.log_probs[h], part(rollout, h)) for h in halves]
  joined = np.concatenate([g for _, g in results], axis=1)
  assert_same(sum(v for v, _ in results), joined, value, gradient)


@pytest.mark.parametrize("name", PRESETS)
def test_order_of_prompts_and_samples(name):
  objective = PRESETS[name]
  _, value, gradient = whole(objective)
  rng = np.random.default_rng(0)
  rows = rng.permutation(8)[:, None], rng.permuted(np.tile(np.arange(4), (8, 1)), axis=1)
  shuffled = type(BATCH)(**{k: v[rows] for k, v in vars(BATCH).items()})
  _, other_value, other_gradient = whole(objective, shuffled)
  assert_same(other_value, other_gradient, value, np.asarray(gradient)[rows])


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_vmap_over_groups_and_scan_over_them(name):
  objective = grpo_with(WEIGHTINGS[name])
  rollout, value, gradient = whole(objective)
  one = jax.value_and_grad(lambda x, r: objective(x, r)[0])
  values, gradients = jax.jit(jax.vmap(one))(BATCH.log_probs, rollout)
  assert_same(jnp.sum(values), gradients, value, gradient)
  step = lambda carry, xs: (carry + one(*xs)[0], one(*xs)[1])
  scanned = jax.jit(lambda xs: jax.lax.scan(step, jnp.zeros(()), xs))
  assert_same(*scanned((BATCH.log_probs, rollout)), value, gradient)
  remat = jax.checkpoint(lambda x: objective(x, rollout)[0])
  assert_same(*jax.jit(jax.value_and_grad(remat))(BATCH.log_probs), value, gradient)


# --- packing
# -----------------------------------------------------------------------------------------


def pack(data, rows=5, width=24, seed=1):
  """Packs the responses of a batch into rows, in random order, with random padding between."""
  rng = np.random.default_rng(seed)
  prompts, samples, length = data.mask.shape
  fields = ("mask", "log_probs", "old_log_probs", "ref_log_probs", "sampler_log_probs")
  packed = {k: np.full((rows, width), np.nan, np.float32) for k in fields[1:]}
  packed["mask"] = np.zeros((rows, width), bool)
  packed["segment_ids"] = np.zeros((rows, width), np.int32)
  rewards, group_ids = [[] for _ in range(rows)], [[] for _ in range(rows)]
  place = np.full((prompts, samples, 2), -1)
  row, start = 0, 0
  for index in rng.permutation(prompts * samples):
    p, g = divmod(int(index), samples)
    gap = int(rng.integers(0, 2))
    if start + gap + length > width:
      row, start, gap = row + 1, 0, 0
    at = slice(start + gap, start + gap + length)
    for k in fields:
      packed[k][row, at] = getattr(data, k)[p, g]
    rewards[row].append(data.rewards[p, g])
    group_ids[row].append(p)
    packed["segment_ids"][row, at] = len(rewards[row])
    place[p, g] = row, at.start
    start = at.stop
  most = max(map(len, rewards))
  fill = lambda lists, x: np.array([r + [x] * (most - len(r)) for r in lists])
  packed["rewards"] = fill(rewards, np.nan).astype(np.float32)
  packed["group_ids"] = fill(group_ids, -1)
  return packed, place


@pytest.mark.parametrize("name", PRESETS)
def test_packed_rows(name):
  objective = PRESETS[name]
  if name == "cispo":
    objective = objective.replace(corrections=(gpo.corrections.truncate_importance,))
  data = batch(prompts=4, length=5, seed=3)
  _, value, gradient = whole(objective, data)
  packed, place = pack(data, rows=4)
  if name == "reinforce_plus_plus":  # its group is the batch
    packed.pop("group_ids")
  log_probs = packed.pop("log_probs")
  arrays = (packed.pop("rewards"), packed.pop("mask"), packed.pop("old_log_probs"))
  rollout = objective.prepare(*arrays, **packed)
  packed_value, packed_gradient = value_and_grad(objective, log_probs, rollout)
  unpacked = np.array(
    [[packed_gradient[row, at : at + 5] for row, at in group] for group in place.tolist()]
  )
  assert_same(packed_value, unpacked, value, gradient)
  assert np.count_nonzero(packed_gradient) == np.count_nonzero(gradient)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_packed_weights(name):
  data = batch(prompts=4, length=5, seed=4)
  packed, place = pack(data, rows=4)
  expected = WEIGHTINGS[name](data.mask)
  weights = WEIGHTINGS[name](packed["mask"], packed["segment_ids"])
  unpacked = np.array([[weights[r, at : at + 5] for r, at in group] for group in place.tolist()])
  np.testing.assert_allclose(unpacked, expected, rtol=1e-6)
  np.testing.assert_allclose(jnp.sum(weights), jnp.sum(expected), rtol=1e-6)


# --- devices
# -----------------------------------------------------------------------------------------


def mesh(axis_type):
  return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices(name, axis_type):
  objective = PRESETS[name]
  _, value, gradient = whole(objective)
  with jax.set_mesh(mesh(axis_type)):
    sharding = NamedSharding(mesh(axis_type), PartitionSpec("data"))
    data = type(BATCH)(**{k: jax.device_put(v, sharding) for k, v in vars(BATCH).items()})

    @jax.jit
    def step(data, objective):
      rollout = data_prepare(data, objective)
      return jax.value_and_grad(lambda x: objective(x, rollout)[0])(data["log_probs"])

    assert_same(*step(vars(data), objective), value, gradient)


def data_prepare(data, objective):
  others = {k: data[k] for k in ("ref_log_probs", "sampler_log_probs")}
  return objective.prepare(data["rewards"], data["mask"], data["old_log_probs"], **others)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_shard_map(name):
  objective = grpo_with(WEIGHTINGS[name])
  rollout, value, gradient = whole(objective)
  spec = PartitionSpec("data")

  @functools.partial(
    jax.shard_map,
    mesh=mesh(AxisType.Auto),
    in_specs=(spec, spec),
    out_specs=(PartitionSpec(), spec),
  )
  def step(log_probs, rollout):
    value, gradient = jax.value_and_grad(lambda x: objective(x, rollout)[0])(log_probs)
    return jax.lax.psum(value, "data"), gradient

  assert_same(*jax.jit(step)(BATCH.log_probs, rollout), value, gradient)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "r1"])
def test_packed_rows_and_metrics_on_eight_devices(axis_type, name):
  objective = PRESETS[name]
  packed, _ = pack(batch(prompts=8, length=5, seed=5), rows=8)
  log_probs = packed.pop("log_probs")
  first = [packed.pop(field) for field in ("rewards", "mask", "old_log_probs")]
  rollout = objective.prepare(*first, **packed)

  @jax.jit
  def step(log_probs, rollout):
    (loss, terms), gradient = jax.value_and_grad(objective, has_aux=True)(log_probs, rollout)
    return loss, gradient, gpo.summarize(terms, rollout)

  expected = step(log_probs, rollout)
  with jax.set_mesh(mesh(axis_type)):
    sharding = NamedSharding(mesh(axis_type), PartitionSpec("data"))
    value = step(*jax.device_put((log_probs, rollout), sharding))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), value, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sharded", ["mask", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_uneven_groups_on_eight_devices(axis_type, sharded, packed):
  objective = gpo.gspo()
  ids = np.tile([1, 1, 2, 3, 0], (8, 1))
  rewards = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  group_ids = np.arange(24).reshape(8, 3) % 5
  mask = ids > 0 if packed else np.ones((8, 3, 2))

  def step(rewards, group_ids, mask, ids):
    kind = {"segment_ids": ids} if packed else {}
    rollout = objective.prepare(rewards, mask, group_ids=group_ids, **kind)
    log_probs = jnp.where(rollout.mask, -1.0, 0.0)
    return value_and_grad(objective, log_probs, rollout)

  arguments = [rewards, group_ids, mask, ids]
  expected = step(*arguments)
  with jax.set_mesh(mesh(axis_type)):
    sharding = NamedSharding(mesh(axis_type), PartitionSpec("data"))
    first = 2 if sharded == "mask" else 0
    arguments[first:] = jax.device_put(arguments[first:], sharding)
    assert_same(*step(*arguments), *expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_statistics_over_the_batch_on_eight_devices(axis_type):
  @jax.jit
  def factors(log_probs, rollout):
    entropy = gpo.corrections.entropy_mask(-log_probs, rollout, quantile=0.5)
    return entropy, gpo.corrections.covariance_mask(log_probs, rollout, fraction=0.2)

  rollout = BATCH.prepare(gpo.dapo())
  expected = factors(jnp.asarray(BATCH.log_probs), rollout)
  with jax.set_mesh(mesh(axis_type)):
    sharding = NamedSharding(mesh(axis_type), PartitionSpec("data"))
    value = factors(*jax.device_put((BATCH.log_probs, rollout), sharding))
  jax.tree.map(np.testing.assert_array_equal, value, expected)
