"""Many devices give the loss and gradients of one, and tell each other little."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from tests.support import linear
from tests.support.linear import BIAS, HIDDEN, MASK, TOKENS, UNEMBEDDING, VOCABULARY, assert_same
from tests.support.quick import fused

# Devices along each axis, tokens [P, G, T] (8, 4, 6), unembedding [V, H] (56, 16).
LAYOUTS = {
  "data": ({"x": 4}, P("x"), P()),
  "fsdp_over_hidden": ({"x": 4}, P("x"), P(None, "x")),
  "fsdp_over_vocabulary": ({"x": 4}, P("x"), P("x")),
  "vocabulary": ({"v": 8}, P(), P("v")),
  "data_and_vocabulary": ({"x": 4, "v": 2}, P("x"), P("v")),
  "fsdp_and_vocabulary": ({"x": 4, "v": 2}, P("x"), P("v", "x")),
  "sequence": ({"x": 4, "s": 2}, P("x", None, "s"), P()),
  "sequence_and_fsdp": ({"x": 4, "s": 2}, P("x", None, "s"), P(None, ("x", "s"))),
  "tokens_and_vocabulary_over_one_axis": ({"x": 4, "v": 2}, P("x", "v"), P("v", "x")),
  "hidden_over_an_axis_without_tokens": ({"x": 4, "v": 2}, P("x"), P(None, "v")),
  "hidden_over_both": ({"x": 4, "v": 2}, P("x"), P(None, ("x", "v"))),
  "replicated": ({"x": 8}, P(), P()),
}
STATE = (HIDDEN, UNEMBEDDING, BIAS)
TILING = gpo.Tiling(5, 5)
# One pass, two passes, two although one is enough.
OBJECTIVES = (gpo.dapo(), gpo.gspo(), gpo.dapo())
TILINGS = (TILING, TILING, TILING._replace(recompute=True))


@functools.cache
def rollouts():
  old = linear.near("grpo").old_log_probs
  return [objective.prepare(linear.BATCH.rewards, MASK, old) for objective in OBJECTIVES]


def loss_of(kind, state, tokens, rollouts, **how):
  """The loss of one kind."""
  hidden, *head = state
  settings = {"tiling": TILINGS[kind]} | how
  return gpo.linear_loss(
    OBJECTIVES[kind], hidden, gpo.Head(*head), tokens, rollouts[kind], **settings
  )[0]


def both(state, tokens, rollouts, **how):
  """Losses and gradients of all kinds, in one program."""
  losses = [functools.partial(loss_of, kind, **how) for kind in range(len(OBJECTIVES))]
  return [jax.value_and_grad(loss)(state, tokens, rollouts) for loss in losses]


@functools.cache
def wanted():
  return linear.jit(both)(STATE, TOKENS, rollouts())


@pytest.fixture(autouse=True, scope="module")
def _of_one_device():
  """Computes what is wanted before any mesh is set, whose axes would become part of its types."""
  wanted()


def mesh_of(sizes, kind):
  count = int(np.prod(list(sizes.values())))
  axes = tuple(sizes.values()), tuple(sizes)
  return jax.make_mesh(*axes, axis_types=(kind,) * len(sizes), devices=jax.devices()[:count])


def place(mesh, spec, tree):
  """Puts arrays on a mesh, along as many of a spec's axes as they have."""

  def put(x):
    own = [axis if size > 1 else None for axis, size in zip(spec, np.shape(x))]
    return jax.device_put(x, NamedSharding(mesh, P(*own)))

  return jax.tree.map(put, tree)


def placed(mesh, tokens, unembedding):
  state = place(mesh, tokens, HIDDEN), place(mesh, unembedding, UNEMBEDDING), place(mesh, P(), BIAS)
  return state, *place(mesh, tokens, (TOKENS, rollouts()))


def check(found):
  for (loss, gradients), (wanted_loss, wanted_gradients) in zip(found, wanted(), strict=True):
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-4, atol=1e-6)
    assert_same(jax.device_get(gradients), jax.device_get(wanted_gradients), 2e-5)


@pytest.mark.quick("tokens_and_vocabulary_over_one_axis", "sequence")
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_auto_mesh_gives_what_one_device_gives(name):
  sizes, tokens, unembedding = LAYOUTS[name]
  mesh = mesh_of(sizes, AxisType.Auto)
  run = linear.jit(functools.partial(both, sharding=gpo.Sharding(mesh, tokens, unembedding)))
  check(run(*placed(mesh, tokens, unembedding)))


@pytest.mark.quick("fsdp_and_vocabulary")
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_explicit_mesh_needs_no_sharding(name):
  sizes, tokens, unembedding = LAYOUTS[name]
  mesh = mesh_of(sizes, AxisType.Explicit)
  with jax.set_mesh(mesh):
    arguments = placed(mesh, tokens, unembedding)
    found = linear.jit(both)(*arguments)
  check(found)
  for _, gradients in found:
    for x, y in zip(gradients, arguments[0]):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_the_mesh_may_be_the_one_in_context():
  sizes, tokens, unembedding = LAYOUTS["data_and_vocabulary"]
  mesh = mesh_of(sizes, AxisType.Auto)
  sharding = gpo.Sharding(tokens=tokens, unembedding=unembedding)
  run = linear.jit(functools.partial(both, sharding=sharding))
  with jax.set_mesh(mesh):
    check(run(*placed(mesh, tokens, unembedding)))
  with pytest.raises(ValueError, match=r"sharding needs a mesh; got none: pass gpo.Sharding\(mesh"):
    both(STATE, TOKENS, rollouts(), sharding=sharding)


@pytest.mark.quick("jit")
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_inside_a_shard_map_of_the_user_s_tokens(jit):
  mesh = mesh_of({"x": 8}, AxisType.Auto)

  def loss(*arguments):
    parts = [loss_of(kind, *arguments) for kind in range(len(OBJECTIVES))]
    return jax.lax.psum(jnp.stack(parts), "x")

  specs = (P("x"), P(), P()), P("x"), P("x")
  mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
  if not jit:
    found = mapped(STATE, TOKENS, rollouts())
    np.testing.assert_allclose(found, [x for x, _ in wanted()], rtol=1e-4, atol=1e-6)
    return
  jacobian = linear.jit(jax.jacrev(mapped))(STATE, TOKENS, rollouts())
  for i, (_, gradients) in enumerate(wanted()):
    assert_same(tuple(x[i] for x in jacobian), gradients, 2e-5)


@pytest.mark.slow
def test_log_probs_on_a_mesh():
  sizes, tokens, unembedding = LAYOUTS["fsdp_and_vocabulary"]
  mesh = mesh_of(sizes, AxisType.Auto)

  def loss(state, tokens, **how):
    x = gpo.linear_token_log_probs(state[0], gpo.Head(*state[1:]), tokens, mask=MASK, **how)
    return jnp.sum(x.log_probs + x.entropy**2), x

  arguments = placed(mesh, tokens, unembedding)[:2]
  step = jax.value_and_grad(loss, has_aux=True)
  sharding = gpo.Sharding(mesh, tokens, unembedding)
  found = linear.jit(functools.partial(step, sharding=sharding))(*arguments)
  assert_same(jax.device_get(found), jax.device_get(linear.jit(step)(STATE, TOKENS)), 2e-5)


IDS = np.random.default_rng(1).integers(0, VOCABULARY, (*MASK.shape, 3))
TEACHER = linear.draw(7, width=24)[:2]


def of_ids(hidden, unembedding, bias, ids, mask, **how):
  """Computes log-probabilities at several ids, and within a support."""
  head, how = gpo.Head(unembedding, bias), {"mask": mask, "tiling": TILING} | how
  several = gpo.linear_token_log_probs(hidden, head, ids, **how)
  return *several, *gpo.linear_token_log_probs(hidden, head, ids[..., 0], support=ids, **how)


def of_distributions(hidden, unembedding, bias, teacher, teacher_head, ids, mask, **how):
  """Sums log-probabilities at several ids, within a support, and a divergence."""
  own, function = (hidden, gpo.Head(unembedding, bias)), gpo.vocabulary.jensen_shannon
  settings = {"mask": mask, "tiling": TILING} | how
  divergence = gpo.linear_divergence(function, *own, teacher, teacher_head, **settings)
  parts = (*of_ids(hidden, unembedding, bias, ids, mask, **how), divergence)
  return sum(jnp.sum(x**2) for x in parts), parts


step = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)


@functools.cache
def distributions():
  return jax.device_get(linear.jit(step(of_distributions))(*STATE, *TEACHER, IDS, MASK))


KINDS = [
  pytest.param(name, kind, id=f"{name}-{kind.name}")
  for name in LAYOUTS
  for kind in (AxisType.Auto, AxisType.Explicit)
]


@pytest.mark.quick("fsdp_and_vocabulary-Explicit")
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_several_ids_supports_and_distributions_on_a_mesh(name, kind):
  sizes, tokens, unembedding = LAYOUTS[name]
  mesh = mesh_of(sizes, kind)
  arguments = (
    *placed(mesh, tokens, unembedding)[0],
    place(mesh, tokens, TEACHER[0]),
    place(mesh, unembedding, TEACHER[1]),
    *place(mesh, tokens, (IDS, MASK)),
  )
  auto = kind == AxisType.Auto
  how = {"sharding": gpo.Sharding(mesh, tokens, unembedding)} if auto else {}
  with jax.set_mesh(mesh):
    found = linear.jit(step(functools.partial(of_distributions, **how)))(*arguments)
  assert_same(jax.device_get(found), distributions(), 3e-5)


@pytest.mark.slow
def test_distributions_inside_a_shard_map_of_the_user_s_tokens():
  mesh = mesh_of({"x": 8}, AxisType.Auto)

  def loss(*arguments):
    return jax.lax.psum(of_distributions(*arguments)[0], "x")

  specs = P("x"), P(), P(), P("x"), P(), P("x"), P("x")
  mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())
  run = linear.jit(jax.value_and_grad(mapped, argnums=(0, 1, 2)))
  (value, _), gradients = distributions()
  assert_same(run(*STATE, *TEACHER, IDS, MASK), (value, gradients), 3e-5)


INSIDE = {  # of a shard_map over x
  "vocabulary": (AxisType.Auto, P("v")),
  "hidden": (AxisType.Auto, P(None, "v")),
  "replicated": (AxisType.Auto, P()),
  "explicit": (AxisType.Explicit, P("v")),
}


def loss_of_ids(state, ids, mask, **how):
  return sum(jnp.sum(x**2) for x in of_ids(*state, ids, mask, **how))


@functools.cache
def wanted_of_ids():
  return linear.jit(jax.grad(loss_of_ids))(STATE, IDS, MASK)


@pytest.mark.quick("vocabulary-two_passes")
@pytest.mark.parametrize("kind", range(4), ids=["one_pass", "two_passes", "recompute", "ids"])
@pytest.mark.parametrize("name", INSIDE)
def test_on_some_axes_inside_a_shard_map_over_others(name, kind):
  if kind < len(OBJECTIVES):
    of_kind, data = functools.partial(loss_of, kind), (TOKENS, rollouts())
    expected = wanted()[kind][1]
  else:
    of_kind, data, expected = loss_of_ids, (IDS, MASK), wanted_of_ids()
  axes, unembedding = INSIDE[name]
  if axes == AxisType.Explicit and jax.__version_info__ < (0, 10):
    pytest.skip("JAX 0.8 raises an error for Explicit axes there, for one pass too")
  how = {"sharding": gpo.Sharding(unembedding=unembedding)} if axes == AxisType.Auto else {}
  mesh = mesh_of({"x": 4, "v": 2}, axes)
  loss = lambda *arguments: jax.lax.psum(of_kind(*arguments, **how), "x")
  specs = (P("x"), P(), P()), P("x"), P("x")
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(loss, in_specs=specs, out_specs=P(), axis_names={"x"})
    state = HIDDEN, place(mesh, unembedding, UNEMBEDDING), BIAS
    found = jax.device_get(linear.jit(jax.grad(mapped))(state, *data))
  assert_same(found, jax.device_get(expected), 3e-5)


def test_a_divergence_on_some_axes_inside_a_shard_map_over_others_is_refused():
  mesh = mesh_of({"x": 4, "v": 2}, AxisType.Auto)
  sharding = gpo.Sharding(unembedding=P("v"))
  divergence = lambda *x: gpo.linear_divergence(gpo.vocabulary.kl, *x, *x, sharding=sharding)
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(divergence, in_specs=(P("x"), P()), out_specs=P("x"), axis_names={"x"})
    with pytest.raises(ValueError, match="inside of a jax.shard_map over some axes"):
      jax.jit(mapped)(HIDDEN, UNEMBEDDING)


def test_an_id_outside_of_every_part_of_the_vocabulary_is_nan():
  mesh = mesh_of({"v": 8}, AxisType.Auto)
  tokens = jnp.array([[0, 55, 56, -1, 7]])
  sharding = gpo.Sharding(mesh, unembedding=P("v"))
  found = gpo.linear_token_log_probs(HIDDEN[:1, 0, :5], UNEMBEDDING, tokens, sharding=sharding)
  np.testing.assert_array_equal(jnp.isnan(found.log_probs), [[False, False, True, True, False]])


def test_a_vocabulary_is_padded_by_rows_with_a_bias_of_minus_infinity():
  mesh = mesh_of({"v": 8}, AxisType.Auto)
  rows = 8  # to 64, of garbage
  unembedding = jnp.concatenate([UNEMBEDDING, 1e3 * UNEMBEDDING[:rows]])
  bias = jnp.concatenate([BIAS, jnp.full(rows, -jnp.inf)])

  def loss(hidden, unembedding, bias, **how):
    head = gpo.Head(unembedding, bias)
    x = gpo.linear_token_log_probs(hidden, head, TOKENS, mask=MASK, **how)
    return jnp.sum(x.log_probs + x.entropy**2)

  step = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
  expected = linear.jit(step(loss))(*STATE)
  for how in ({}, {"sharding": gpo.Sharding(mesh, unembedding=P("v"))}):
    found = linear.jit(step(functools.partial(loss, **how)))(HIDDEN, unembedding, bias)
    gradients = found[1][0], *(x[:VOCABULARY] for x in found[1][1:])
    assert_same(jax.device_get((found[0], gradients)), jax.device_get(expected), 2e-5)
    assert not any(np.any(x[VOCABULARY:]) for x in found[1][1:])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["data_and_vocabulary", "fsdp_over_hidden"])
def test_in_float64_too(name):
  sizes, tokens, unembedding = LAYOUTS[name]
  mesh = mesh_of(sizes, AxisType.Auto)
  state = [x.astype(jnp.float64) for x in STATE]
  rollout = jax.tree.map(jnp.asarray, rollouts())
  sharding = gpo.Sharding(mesh, tokens, unembedding)
  run = functools.partial(both, sharding=sharding)
  for loss, gradients in jax.eval_shape(run, state, TOKENS.astype(int), rollout):
    assert {x.dtype for x in jax.tree.leaves((loss, gradients))} == {jnp.dtype("float64")}


# --- what is said to whom ------------------------------------------------------------------------

COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)\("
)


def collectives(text):
  """Kind and size of each collective of a compiled program, and whether a loop repeats it."""
  computations, calls = {}, {}
  for block in re.split(r"\n\n", text):
    name = re.match(r"\s*(?:ENTRY )?%?([\w.\-]+)", block)
    if name:
      found = []
      for types, kind in COLLECTIVE.findall(block):
        sizes = re.findall(r"\w+\[([\d,]*)\]", types)
        found.append((kind, sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in sizes)))
      computations[name[1]] = found
      called = re.findall(
        r"(?:calls|to_apply|body|condition|branch_computations)=\{?%([\w.\-]+)", block
      )
      calls[name[1]] = called
  loops = set(re.findall(r"(?:body|condition)=%([\w.\-]+)", text))
  while True:  # and what they call
    more = loops | {name for loop in loops for name in calls.get(loop, ())}
    if more == loops:
      break
    loops = more
  return [
    (kind, size, name in loops) for name, found in computations.items() for kind, size in found
  ]


@pytest.mark.quick("one_pass-data_and_vocabulary", "two_passes-fsdp_over_hidden")
@pytest.mark.parametrize("name", ["fsdp_over_hidden", "data_and_vocabulary", "fsdp_and_vocabulary"])
@pytest.mark.parametrize("kind", OBJECTIVES[:2], ids=["one_pass", "two_passes"])
def test_devices_tell_each_other_a_few_numbers_per_token_in_the_loop_and_the_unembedding_once(
  name, kind
):
  sizes, tokens, unembedding = LAYOUTS[name]
  mesh, chunk = mesh_of(sizes, AxisType.Auto), 16
  sharding, tiling = gpo.Sharding(mesh, tokens, unembedding), gpo.Tiling(chunk, 28)
  shape, vocabulary, width = (8, 4, 32), 512, 128
  rollout = kind.prepare(linear.BATCH.rewards, np.ones(shape))

  def loss(hidden, unembedding):
    how = {"tiling": tiling, "sharding": sharding}
    return gpo.linear_loss(kind, hidden, unembedding, jnp.zeros(shape, int), rollout, **how)[0]

  def given(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

  arguments = given((*shape, width), tokens), given((vocabulary, width), unembedding)
  step = fused(jax.grad(loss, (0, 1)))
  found = collectives(step.lower(*arguments).compile().as_text())
  assert all(size <= 8 * chunk for _, size, in_loop in found if in_loop), found
  assert any(in_loop for *_, in_loop in found) == ("vocabulary" in name)
  assert [kind for kind, *_ in found].count("all-gather") == ("fsdp" in name), found


@pytest.mark.parametrize("name", ["fsdp_over_hidden", "data_and_vocabulary"])
def test_a_divergence_gathers_each_unembedding_once_outside_of_its_loop(name):
  sizes, tokens, unembedding = LAYOUTS[name]
  mesh = mesh_of(sizes, AxisType.Auto)
  how = {"tiling": gpo.Tiling(16), "sharding": gpo.Sharding(mesh, tokens, unembedding)}

  def total(hidden, w, teacher, teacher_w):
    kl = gpo.linear_divergence(gpo.vocabulary.kl, hidden, w, teacher, teacher_w, **how)
    return jnp.sum(kl)

  def given(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

  state = given((8, 4, 32, 128), tokens), given((512, 128), unembedding)
  text = linear.jit(jax.grad(total, (0, 1))).lower(*state, *state).compile().as_text()
  found = collectives(text)
  assert not any(in_loop for *_, in_loop in found), found
  assert 1 <= [kind for kind, *_ in found].count("all-gather") <= 2, found


# --- wrong input ---------------------------------------------------------------------------------

WRONG = {
  "unknown_axis_of_tokens": ((P("y"), P()), r"sharding.tokens names 'y'; the mesh has axes \('x',"),
  "unknown_axis_of_unembedding": ((P(), P("y")), "sharding.unembedding names 'y'"),
  "tokens_that_are_not_divided": (
    (P(None, None, "x"), P()),
    r"sharding.tokens splits an axis of 6 over 4 devices \(x\), which do not divide it: pad it",
  ),
  "vocabulary_that_is_not_divided": (
    (P(), P(("x", "v", "w"))),
    r"sharding.unembedding splits an axis of 56 over 16 devices .* rows of W with a bias of -inf",
  ),
  "too_many_axes_of_tokens": ((P("x", None, None, None), P()), "specs of tokens of rank 3"),
  "too_many_axes_of_unembedding": ((P(), P("x", None, None)), r"an unembedding \[V, H\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shardings_are_named(name):
  (tokens, unembedding), message = WRONG[name]
  mesh = jax.sharding.AbstractMesh((4, 2, 2), ("x", "v", "w"), axis_types=(AxisType.Auto,) * 3)
  with pytest.raises(ValueError, match=message):
    both(STATE, TOKENS, rollouts(), sharding=gpo.Sharding(mesh, tokens, unembedding))


def test_a_mesh_is_not_a_sharding():
  mesh = mesh_of({"x": 4}, AxisType.Auto)
  with pytest.raises(ValueError, match="sharding must be a Sharding; got"):
    both(STATE, TOKENS, rollouts(), sharding=mesh)
