"""Every public function under every transformation of JAX: one and the same answer."""

import copy
import functools
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
from tests.support.batches import PRESETS
from tests.support.calls import CALLS, LOG_PROBS, OBJECTIVE, PLAIN, SAMPLES
from tests.support.quick import jit


def slow_if(condition):
  """All entries, of which some are slow."""
  mark = lambda entry: pytest.mark.slow if condition(entry) else ()
  return pytest.mark.parametrize("entry", [pytest.param(e, marks=mark(e)) for e in CALLS])


ENTRY = slow_if(("levels", "divergences", "corrections").__contains__)  # the packed ones are more


def other(x):
  """Makes another right argument of one."""
  x = np.flip(x, -2) if np.ndim(x) > 1 else x
  return x / 2 if x.dtype == np.float32 else x


def plain(tree):
  return jax.tree.map(np.asarray, tree)


def at(i, pair):
  return jax.tree.map(lambda x: x[i], pair)


def case(entry):
  """The call, of one dictionary, and two sets of arguments, stacked."""
  call = CALLS[entry]
  return lambda given: call(given), {k: np.stack([x, other(x)]) for k, x in call.given.items()}


def convert(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, tree)


@functools.cache
def compiled(entry):
  return jit(lambda given: CALLS[entry](given))


@functools.cache
def right(entry):
  answers = [compiled(entry)(at(i, case(entry)[1])) for i in range(2)]
  return jax.tree.map(lambda x, y: np.stack([x, y]), *answers)


def assert_same(found, expected, rtol=2e-6, atol=1e-6):
  same = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
  jax.tree.map(same, plain(found), expected)


# --- transformations -----------------------------------------------------------------------------

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


@pytest.mark.slow
@pytest.mark.parametrize("transform", [vectorized, scanned, sharded])
@ENTRY
def test_transformed(entry, transform):
  call, pair = case(entry)
  assert_same(jit(transform(call, pair))(pair), right(entry))


@pytest.mark.quick("linear_loss", "objective", "prepare_packed")
@ENTRY
def test_vmap_inside_of_scan_inside_of_shard_map(entry):
  """On two devices, which take the two sets in opposite order."""
  call, pair = case(entry)
  both = jax.tree.map(lambda x: np.stack([x[None], x[None, ::-1]]), pair)
  inner = lambda pair: scanned(vectorized(call, pair), pair)(pair)
  found = plain(jit(sharded(inner, pair))(both))
  assert_same(jax.tree.map(lambda x: x[0, 0], found), right(entry))
  assert_same(jax.tree.map(lambda x: x[1, 0, ::-1], found), right(entry))


ALONE = ("linear_loss", "linear_token_log_probs", "objective", "prepare_packed", "by_group")


@pytest.mark.quick(
  "linear_loss-vectorized", "objective-sharded", "prepare_packed-sharded", "generalized-sharded"
)
@pytest.mark.parametrize("transform", [vectorized, sharded])
@slow_if(lambda entry: entry not in ALONE)
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


@pytest.mark.quick("linear_token_log_probs", "prepare", "token_log_probs")
@ENTRY
def test_nothing_leaks_and_compiled_code_transfers_nothing(entry):
  call, pair = case(entry)
  given = jax.device_put(at(0, pair))
  with jax.checking_leaks():
    jax.eval_shape(call, given)
  compiled(entry)(given)
  with jax.transfer_guard("disallow"):
    compiled(entry)(given)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.fixture
def wide(entry, request):
  right(entry)
  request.getfixturevalue("x64")


@pytest.mark.quick(
  "linear_loss-float64", "prepare-float64", "objective-float64", "surrogates-float64"
)
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@ENTRY
def test_float64_is_kept_and_float32_works_beside_it(entry, dtype):
  call, pair = case(entry)
  found = jit(lambda given: call(given))(convert(at(0, pair), dtype))
  assert_same(found, at(0, right(entry)), 1e-5, 1e-5)
  if dtype == "float64" and entry != "numbers":  # which has arrays that are no arguments
    floats = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype.name for x in floats} == {"float64"}


@pytest.mark.parametrize("entry", ["advantages", "weightings", "surrogates", "by_group"])
def test_bfloat16(entry):
  """Functions called alone answer to bfloat16, too: 3 % are 8 roundings to 8 bits."""
  call, pair = case(entry)
  found = jit(lambda given: call(given))(convert(at(0, pair), jnp.bfloat16))
  assert_same(jax.tree.map(lambda x: x.astype(float), found), at(0, right(entry)), 3e-2, 3e-2)


# --- derivatives ---------------------------------------------------------------------------------

SLOPES = [
  pytest.param(entry, marks=pytest.mark.slow if entry.endswith("_packed") else ())
  for entry, call in CALLS.items()
  if call.by
]
ONCE = ("linear_token_log_probs", "linear_loss")  # first reverse-mode derivatives only
STOPPED = ("surrogates", "levels", "divergences", "corrections", "exact_kl", "specification")


def total(tree):
  """Adds up, each value with a share of its own."""
  leaves = [x.astype(float).ravel() for x in jax.tree.leaves(tree)]
  return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=float))) for x in leaves)


def loss_of(tree, entry):
  """What is meant to be differentiated: of an objective the loss, whose terms have no gradient."""
  return tree[0][0] if entry == "objective" else tree[0] if entry == "objective_packed" else tree


@pytest.mark.quick("linear_loss", "objective", "specification", "levels")
@pytest.mark.parametrize("entry", SLOPES)
@pytest.mark.usefixtures("x64")
def test_derivatives_agree_forward_backward_and_with_differences(entry):
  call, pair = case(entry)
  given, rng = convert(at(0, pair), float), np.random.default_rng(0)
  point = {
    k: given[k] + rng.uniform(0, 0.05, given[k].shape) for k in CALLS[entry].by
  }  # off every corner
  move = {k: rng.normal(size=x.shape) for k, x in point.items()}
  value = lambda point: total(loss_of(call(given | point), entry))
  ends = [jax.tree.map(lambda x, d: x + h * d, point, move) for h in (1e-5, -1e-5)]
  ends = jax.tree.map(lambda *x: np.stack(x), *ends)

  @jit
  def run(point, move, ends):
    forward = None if entry in ONCE else jax.jvp(value, (point,), (move,))[1]
    return jax.grad(jax.checkpoint(value))(point), forward, jax.lax.map(value, ends)

  gradient, forward, (above, below) = run(point, move, ends)
  slope = sum(np.sum(gradient[k] * move[k]) for k in point)
  if not entry.startswith(STOPPED):  # where slopes are not all their values'
    np.testing.assert_allclose((above - below) / 2e-5, slope, rtol=1e-6)
  if entry in ONCE:
    with pytest.raises(NotImplementedError, match="first reverse-mode derivatives only"):
      jax.jvp(value, (point,), (move,))
  else:
    np.testing.assert_allclose(forward, slope, rtol=1e-9)


# --- copies, threads, check ----------------------------------------------------------------------


def test_copies_of_an_objective_are_the_same_to_the_compiler():
  traces = []
  run = jit(lambda o, rollout: traces.append(1) or o(LOG_PROBS, rollout)[0])
  for name in ("gpo", "dr_grpo", "gspo", "deepseek_v32"):
    objective = PRESETS[name]
    rollout, traces[:] = objective.prepare(**PLAIN), []
    expected = run(objective, rollout)
    for again in (lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy):
      assert run(again(objective), again(rollout)) == expected
    assert len(traces) == 1


UNNAMED = {
  "objective": gpo.grpo().replace(surrogate=lambda x, a: x * a),
  "as_loss": gpo.as_loss(OBJECTIVE, lambda params, x: params * x),
  "check": gpo.check(gpo.gpo_loss),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_what_is_made_of_unnamed_functions_is_copied_and_not_pickled(name):
  unnamed = UNNAMED[name]
  assert jax.tree.structure(copy.deepcopy(unnamed)) == jax.tree.structure(unnamed)
  with pytest.raises((pickle.PicklingError, AttributeError), match="[Cc]an't"):
    pickle.dumps(unnamed)


@pytest.mark.parametrize("entry", ["objective", "linear_loss", "by_group", "specification"])
def test_threads_share_a_compiled_function(entry):
  call, pair = case(entry)
  answers, run, start = right(entry), jit(lambda given: call(given)), threading.Barrier(8)

  def work(i):
    start.wait()
    return [plain(run(at((i + k) % 2, pair))) for k in range(8)]

  with ThreadPoolExecutor(8) as pool:
    for i, found in enumerate(pool.map(work, range(8))):
      for k, answer in enumerate(found):
        jax.tree.map(np.testing.assert_array_equal, answer, at((i + k) % 2, answers))


def test_check_raises_for_itself_and_in_compiled_code_through_checkify():
  checked, good = gpo.check(gpo.gpo_objective), list(SAMPLES.values())
  expected, rows = gpo.gpo_objective(*good), [x[None] for x in good]
  assert_same(jax.vmap(checked)(*rows)[0], expected)
  assert_same(jax.checkpoint(checked)(*good), expected)
  with pytest.raises(ValueError, match="not functionalized"):
    jax.jit(checked)(*good)
  assert_same(jax.jit(checkify.checkify(jax.vmap(checked)))(*rows)[1][0], expected)
  with pytest.raises(ValueError, match="ratios must be positive"):
    jax.jit(checkify.checkify(checked))(-good[0], *good[1:])[0].throw()


@pytest.mark.slow
def test_check_uncompiled():
  with jax.disable_jit():
    gpo.check(gpo.gpo_objective)(**SAMPLES)
