"""Every public function under every transformation and setting of JAX: one and the same answer."""

import copy
import functools
import inspect
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from gpo_jax import advantages, corrections, divergences, levels, surrogates, weightings
from tests import test_bad_input as table
from tests.batches import PRESETS
from tests.test_bad_input import LOG_PROBS, OBJECTIVE, ROLLOUT, draw

# --- every public function in one table, each with two right calls

NEEDED = {"cispo": {"high": 4.0}, "dro": {"beta": 0.5}, "binary_kl_mask": {"threshold": 0.1}}
NEEDED["off_policy_sequence_mask"] = NEEDED["binary_kl_mask"]


def every(module, *arguments, but=()):
  """Makes one call of all functions of a module."""
  functions = {
    name: functools.partial(function, **NEEDED.get(name, {}))
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and name[0] != "_" and name not in but
  }
  return lambda **given: {k: f(*(given[n] for n in arguments)) for k, f in functions.items()}


def plain(tree):
  return jax.tree.map(np.asarray, tree)


def of_numbers(log_probs, epsilon, length, temperature):
  """Makes objectives of what is traced."""
  return (
    gpo.grpo(epsilon=epsilon, beta=length)(log_probs, ROLLOUT),
    gpo.dr_grpo(length=length).prepare(table.REWARDS, table.MASK),
    gpo.token_entropy(log_probs, temperature=temperature, softcap=length),
    gpo.linear_token_log_probs(**table.LINEAR, temperature=temperature, softcap=length),
  )


ROWS = {"log_probs": LOG_PROBS, "ref_log_ratio": draw(1, 3, 4), "rollout": plain(ROLLOUT)}
PACKED = {"log_probs": draw(2, 6), "ref_log_ratio": draw(2, 6)}
PACKED |= {"rollout": plain(OBJECTIVE.prepare(**table.PACKED))}
TERMS = plain(OBJECTIVE(LOG_PROBS, ROLLOUT)[1])
NUMBERS = {"epsilon": np.float32([0.5]), "length": np.float32([2]), "temperature": np.float32([2])}
of_params = gpo.as_loss(OBJECTIVE, lambda params, x: params * x, has_aux=False)
SLOTS = {
  "levels": every(levels, "log_probs", "rollout"),
  "divergences": every(divergences, "ref_log_ratio", "log_probs", "rollout"),
  "corrections": every(corrections, "log_probs", "rollout"),
}
# fmt: off
ENTRIES = {name: table.ENTRIES[name] for name in list(table.ENTRIES)[:19]} | {
  "advantages": (
    every(advantages, "rewards", "where", but=("by_group", "optimal_baseline", "decoupled")),
    table.BY_REWARDS,
  ),
  "weightings": (every(weightings, "mask", "segment_ids", but=["constant_length"]), table.BY_MASK),
  "surrogates": (
    every(surrogates, "log_ratio", "advantages"),
    {"log_ratio": draw(3, 4), "advantages": draw(3, 1)},
  ),
  "as_loss": (
    lambda params, x, rollout: of_params(params, rollout, x),
    {"params": LOG_PROBS, "x": LOG_PROBS, "rollout": ROWS["rollout"]},
  ),
  "summarize": (gpo.summarize, {"terms": TERMS, "rollout": ROWS["rollout"]}),
  "numbers": (
    lambda log_probs, **numbers: of_numbers(log_probs, **{k: x[0] for k, x in numbers.items()}),
    {"log_probs": LOG_PROBS} | NUMBERS,
  ),
}
# fmt: on
for slot, function in SLOTS.items():
  ENTRIES |= {slot: (function, ROWS), f"{slot} packed": (function, PACKED)}
ENTRY = pytest.mark.parametrize("entry", ENTRIES)


def other(x):
  """Makes another right argument of one."""
  x = np.flip(x, -2) if np.ndim(x) > 1 else x
  return x / 2 if x.dtype == np.float32 else x


def at(i, pair):
  return jax.tree.map(lambda x: x[i], pair)


def case(entry):
  """Gives the call, of one dictionary, and two sets of arguments, stacked."""
  function, given = ENTRIES[entry]
  stacked = jax.tree.map(lambda x: np.stack([x, other(x)]), given)
  return lambda given: function(**given), stacked


def convert(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, tree)


@functools.cache
def compiled(entry):
  return jax.jit(case(entry)[0])


@functools.cache
def right(entry):
  answers = [compiled(entry)(at(i, case(entry)[1])) for i in range(2)]
  return jax.tree.map(lambda x, y: np.stack([x, y]), *answers)


def assert_same(found, expected, rtol=2e-6, atol=1e-6):
  same = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
  jax.tree.map(same, plain(found), expected)


# --- transformations and settings

MESH = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])


def vectorized(call, varying):
  return lambda pair: jax.vmap(call, ({k: 0 if k in varying else None for k in pair},))(pair)


def sharded(call, varying):
  """Gives two devices an argument each where it varies, and the same one where not."""

  def of_device(pair):
    given = {k: at(0, x) if k in varying else x for k, x in pair.items()}
    return jax.tree.map(lambda x: x[None], call(given))

  def mapped(pair):
    specs = {k: P("data") if k in varying else P() for k in pair}
    return jax.shard_map(of_device, mesh=MESH, in_specs=(specs,), out_specs=P("data"))(pair)

  return mapped


def scanned(call, varying):
  step = lambda _, given: (None, jax.checkpoint(call)(given))
  return lambda pair: jax.lax.scan(step, None, pair)[1]


@pytest.mark.parametrize("transform", [vectorized, scanned, sharded])
@ENTRY
def test_transformed(entry, transform):
  call, pair = case(entry)
  assert_same(jax.jit(transform(call, pair))(pair), right(entry))


@pytest.mark.parametrize("transform", [vectorized, sharded])
@ENTRY
def test_one_argument_may_vary_alone(entry, transform):
  call, pair = case(entry)
  for name in pair:
    given = {k: x if k == name else at(0, x) for k, x in pair.items()}
    jax.eval_shape(transform(call, {name}), given)


@pytest.mark.slow
@ENTRY
def test_uncompiled(entry):
  call, pair = case(entry)
  for setting in (jax.disable_jit(), jax.debug_nans(True)):
    with setting:
      assert_same(call(at(0, pair)), at(0, right(entry)))


@ENTRY
def test_nothing_leaks_and_compiled_code_transfers_nothing(entry):
  call, pair = case(entry)
  given = jax.device_put(at(0, pair))
  with jax.checking_leaks():
    jax.eval_shape(call, given)
  compiled(entry)(given)
  with jax.transfer_guard("disallow"):
    compiled(entry)(given)


@pytest.mark.parametrize("name", ["rewards", *table.NAMES])
def test_a_masked_nan_does_not_trip_debug_nans(name):
  mask = table.MASK.any(-1) if name == "rewards" else table.MASK
  arrays = jax.device_put(table.PLAIN | {name: np.where(mask, table.PLAIN[name], np.nan)})
  with jax.debug_nans(True):
    found = OBJECTIVE(LOG_PROBS, OBJECTIVE.prepare(**arrays))[0]
  np.testing.assert_array_equal(found, OBJECTIVE(LOG_PROBS, ROLLOUT)[0])


@pytest.mark.parametrize("name", ["logits", "temperature", "softcap"])
@pytest.mark.parametrize("entry", ["token_log_probs", "token_entropy", "exact_kl"])
def test_a_masked_nan_does_not_reach_a_gradient(entry, name):
  function, given = table.ENTRIES[entry]
  given = given | {"where": np.array([[1], [0]]), "softcap": 5.0, "temperature": 2.0}
  given["logits"] = np.where(given["where"], given["logits"], np.nan)
  assert np.isfinite(jax.grad(lambda x: function(**given | {name: x})[0])(given[name])).all()


# --- dtypes


@pytest.fixture
def wide(entry, request):
  right(entry)
  request.getfixturevalue("x64")


@pytest.mark.usefixtures("wide")
@ENTRY
def test_float64_is_kept_and_float32_works_beside_it(entry):
  call, pair = case(entry)
  given = at(0, pair)
  found, narrow = jax.jit(lambda *both: [call(x) for x in both])(convert(given, float), given)
  for answer in (found, narrow):
    assert_same(answer, at(0, right(entry)), 1e-5, 1e-5)
  if entry not in ("numbers", "linear_loss"):  # which have arrays that are no arguments
    assert {x.dtype.name for x in jax.tree.leaves(found)} <= {"float64", "bool"}


@pytest.mark.parametrize("entry", [name for name in list(ENTRIES)[19:] if name != "summarize"])
def test_bfloat16(entry):
  """The slots' functions alone answer in bfloat16, too: 3 % are 8 roundings to 8 bits."""
  call, pair = case(entry)
  found = jax.jit(call)(convert(at(0, pair), jnp.bfloat16))
  assert_same(jax.tree.map(lambda x: x.astype(float), found), at(0, right(entry)), 3e-2, 3e-2)


# --- derivatives

BY = dict(zip(list(ENTRIES)[:10], [table.SAMPLES] * 4 + [["logits"]] * 3 + [table.STATES] * 3))
BY |= {"objective": ["log_probs"], "as_loss": ["params", "x"]}
OTHERS = ("surrogates", "levels", "levels packed", "divergences", "divergences packed")


def total(tree):
  """Adds up, each value with a share of its own."""
  leaves = [x.astype(float).ravel() for x in jax.tree.leaves(tree)]
  return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=float))) for x in leaves)


@pytest.mark.parametrize("entry", [*BY, *OTHERS])  # the others' slopes are not all their values'
@pytest.mark.usefixtures("x64")
def test_derivatives_agree_forward_backward_and_with_differences(entry):
  call, pair = case(entry)
  given, rng = convert(at(0, pair), float), np.random.default_rng(0)
  names = BY.get(entry, given.keys() - {"rollout"})
  point = {k: given[k] + rng.uniform(0, 0.05, given[k].shape) for k in names}  # off every corner
  move = {k: rng.normal(size=x.shape) for k, x in point.items()}
  value = jax.jit(lambda point: total(call(given | point)))
  gradient = jax.jit(jax.grad(jax.checkpoint(value)))(point)
  slope = sum(np.sum(gradient[k] * move[k]) for k in names)
  if entry in BY:
    ends = [value(jax.tree.map(lambda x, d: x + h * d, point, move)) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6)
  if entry in ("linear_token_log_probs", "linear_loss"):
    with pytest.raises(TypeError, match="forward-mode"):
      jax.jvp(value, (point,), (move,))
  else:
    np.testing.assert_allclose(jax.jvp(value, (point,), (move,))[1], slope, rtol=1e-9)


# --- copies, threads, check


def test_copies_of_an_objective_are_the_same_to_the_compiler():
  traces = []
  run = jax.jit(lambda o, rollout: traces.append(1) or o(LOG_PROBS, rollout)[0])
  for objective in map(PRESETS.get, ("gpo", "dr_grpo", "gspo", "deepseek_v32")):
    rollout, traces[:] = objective.prepare(**table.PLAIN), []
    expected = run(objective, rollout)
    for again in (lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy):
      assert run(again(objective), again(rollout)) == expected
    assert len(traces) == 1


UNNAMED = gpo.grpo().replace(surrogate=lambda x, a: x * a), of_params, gpo.check(gpo.gpo_loss)


@pytest.mark.parametrize("unnamed", UNNAMED)
def test_what_is_made_of_unnamed_functions_is_copied_and_not_pickled(unnamed):
  assert jax.tree.structure(copy.deepcopy(unnamed)) == jax.tree.structure(unnamed)
  with pytest.raises((pickle.PicklingError, AttributeError), match="[Cc]an't"):
    pickle.dumps(unnamed)


@pytest.mark.parametrize("entry", ["objective", "linear_loss", "by_group", "gpo_value_and_grad"])
def test_threads_share_a_compiled_function(entry):
  call, pair = case(entry)
  answers, run, start = right(entry), jax.jit(call), threading.Barrier(8)

  def work(i):
    start.wait()
    return [plain(run(at((i + k) % 2, pair))) for k in range(8)]

  with ThreadPoolExecutor(8) as pool:
    for i, found in enumerate(pool.map(work, range(8))):
      for k, answer in enumerate(found):
        jax.tree.map(np.testing.assert_array_equal, answer, at((i + k) % 2, answers))


def test_check_raises_for_itself_and_in_compiled_code_through_checkify():
  checked, good = gpo.check(gpo.gpo_objective), list(table.SAMPLES.values())
  expected, rows = gpo.gpo_objective(*good), [x[None] for x in good]
  assert_same(jax.vmap(checked)(*rows)[0], expected)
  assert_same(jax.checkpoint(checked)(*good), expected)
  with pytest.raises(ValueError, match="not functionalized"):
    jax.jit(checked)(*good)
  assert_same(jax.jit(checkify.checkify(jax.vmap(checked)))(*rows)[1][0], expected)
  with pytest.raises(ValueError, match="ratios must be positive"):
    jax.jit(checkify.checkify(checked))(-good[0], *good[1:])[0].throw()


def test_check_uncompiled():
  with jax.disable_jit():
    gpo.check(gpo.gpo_objective)(**table.SAMPLES)
