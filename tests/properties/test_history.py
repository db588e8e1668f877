"""What was traced before changes nothing: any sequence of transforms has the right gradients.

JAX keeps traces, and pairs what it kept of one with what it keeps of another. Each step here
differentiates a function from hidden states in a way of its own, in one process, and is compared
with the same from full logits.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from tests.support import linear
from tests.support.interpret import interpret

# Tokens [P, G, T], vocabulary, width: all alike, where one gradient could pass for another; unlike.
SHAPES = {"square": ((1, 2, 2), 4, 4), "ordinary": ((2, 2, 3), 5, 4)}


def by_the_batch(log_ratio, advantages):
  ratio = jnp.exp(log_ratio)
  return ratio / jnp.mean(ratio) * advantages


OBJECTIVES = {
  "dapo": gpo.dapo(),
  "gspo": gpo.gspo(),
  "gmpo": gpo.gmpo(),
  "deepseek_v32": gpo.deepseek_v32(),
  "own": gpo.dapo().replace(surrogate=by_the_batch),
}
FUNCTIONS = ("log_probs", "entropy", "divergence", *OBJECTIVES)
WRT = {
  "hidden": (0,),
  "unembedding": (1,),
  "bias": (2,),
  "both": (0, 1),
  "all": (0, 1, 2),
  "tied": (1,),
}
SCALES = np.float32([1.0, -0.5, 2.0])


class Data:
  """One batch of a shape, and its functions, from hidden states and by way of the full logits."""

  def __init__(self, name):
    self.shape, vocabulary, width = SHAPES[name]
    *self.state, self.tokens = linear.draw(0, self.shape, vocabulary, width)
    rng = np.random.default_rng(1)
    self.slopes = jnp.asarray(rng.normal(size=(2, *self.shape)), jnp.float32)
    log_probs = gpo.token_log_probs(linear.logits_of(*self.state), self.tokens)
    others = {
      f"{policy}_log_probs": log_probs + rng.normal(size=self.shape).astype(np.float32) / 4
      for policy in ("old", "ref", "sampler")
    }
    old = others.pop("old_log_probs")
    rewards, mask = rng.normal(size=self.shape[:2]), np.ones(self.shape)
    self.rollouts = {
      name: objective.prepare(rewards, mask, old, **others)
      for name, objective in OBJECTIVES.items()
    }
    self.data = self.tokens, self.slopes, self.rollouts

  def hidden_of(self, wrt, hidden, unembedding, tokens):
    return jnp.tanh(hidden + unembedding[tokens]) if wrt == "tied" else hidden

  def from_hidden(self, function, wrt, state, data):
    (hidden, *head), (tokens, slopes, rollouts) = state, data
    hidden, head = self.hidden_of(wrt, hidden, head[0], tokens), gpo.Head(*head)
    if function in OBJECTIVES:
      rollout = rollouts[function]
      return gpo.linear_loss(OBJECTIVES[function], hidden, head, tokens, rollout)[0]
    if function == "divergence":
      reference = jax.lax.stop_gradient((hidden[..., ::-1], head.unembedding))
      return jnp.sum(slopes[0] * gpo.linear_divergence(gpo.vocabulary.kl, hidden, head, *reference))
    outputs = gpo.linear_token_log_probs(hidden, head, tokens)
    return self.total(function, outputs, slopes)

  def from_logits(self, function, wrt, state, data):
    (hidden, *head), (tokens, slopes, rollouts) = state, data
    hidden = self.hidden_of(wrt, hidden, head[0], tokens)
    logits = linear.logits_of(hidden, *head)
    if function in OBJECTIVES:
      log_probs = gpo.token_log_probs(logits, tokens)
      return OBJECTIVES[function](log_probs, rollouts[function])[0]
    if function == "divergence":
      reference = linear.logits_of(*jax.lax.stop_gradient((hidden[..., ::-1], head[0])))
      return jnp.sum(slopes[0] * gpo.exact_kl(logits, reference))
    outputs = gpo.token_log_probs(logits, tokens), gpo.token_entropy(logits)
    return self.total(function, outputs, slopes)

  def total(self, function, outputs, slopes):
    log_probs = jnp.sum(slopes[0] * outputs[0])
    return log_probs if function == "log_probs" else log_probs + jnp.sum(slopes[1] * outputs[1])


data_of = functools.cache(Data)


@functools.cache
def wanted(shape, function, tied):
  data = data_of(shape)
  loss = lambda state: data.from_logits(function, "tied" if tied else "", state, data.data)
  return [np.asarray(x) for x in interpret(jax.grad(loss), data.state)]


# Each makes, of a scalar function f(moving, rest), its gradient in what moves, times a factor.


def scanned(f):
  def total(*args):
    return jax.lax.scan(lambda sum_, c: (sum_ + c * f(*args), None), 0.0, SCALES)[0]

  return jax.grad(total)


def scan_of_grads(f):
  def gradient(*args):
    add = lambda sum_, c: (jax.tree.map(lambda x, y: x + c * y, sum_, jax.grad(f)(*args)), None)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, args[0]), SCALES)[0]

  return gradient


def branched(f):
  def one(*args):
    return jax.lax.cond(jnp.sum(args[0][0]) < 1e9, f, lambda *_: 0.0, *args)

  return jax.grad(one)


def mapped(f):
  return jax.grad(lambda *args: jnp.sum(jax.vmap(lambda c: c * f(*args))(jnp.asarray(SCALES))))


WAYS = {
  "grad": (jax.grad, 1),
  "jit": (lambda f: jax.jit(jax.grad(f)), 1),
  "grad_of_jit": (lambda f: jax.grad(jax.jit(f)), 1),
  "value_and_grad": (lambda f: lambda *args: jax.jit(jax.value_and_grad(f))(*args)[1], 1),
  "checkpoint": (lambda f: jax.jit(jax.grad(jax.checkpoint(f))), 1),
  "scan": (lambda f: jax.jit(scanned(f)), SCALES.sum()),
  "scan_of_grads": (scan_of_grads, SCALES.sum()),
  "cond": (branched, 1),
  "vmap": (lambda f: jax.jit(mapped(f)), SCALES.sum()),
  "shard_map": (jax.grad, 1),
  "donated": (jax.grad, 1),
}
COMPILED = ("shard_map", "donated")  # the others are traced, then interpreted: ten times as fast


def step(shape, function, wrt, way, frozen):
  """Differentiates in one way and compares; `frozen`: what is not differentiated is closed over."""
  data, places, (gradient_of, factor) = data_of(shape), WRT[wrt], WAYS[way]
  others = [i for i in range(3) if i not in places]
  moving, rest = ([jnp.copy(data.state[i]) for i in each] for each in (places, others))

  def loss(moving, rest, given=data.data):
    state = dict(zip((*places, *others), (*moving, *rest)))
    return data.from_hidden(function, wrt, [state[i] for i in range(3)], given)

  if way == "shard_map":
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    at = lambda indices: [P(None, "x") if i == 0 else P() for i in indices]
    specs = at(places), at(others), (P(None, "x"), P(None, None, "x"), P(None, "x"))
    own = lambda *args: jax.lax.psum(loss(*args), "x")
    split = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P())
    target = lambda moving, rest: split(moving, rest, data.data)
  else:
    target = lambda moving, rest: loss(moving, rest)
  if frozen:
    gradient, args = gradient_of(lambda moving: target(moving, rest)), (moving,)
  else:
    gradient, args = gradient_of(target), (moving, rest)
  if way in COMPILED:
    found = linear.jit(gradient, donate_argnums=(0,) if way == "donated" else ())(*args)
  else:
    found = interpret(gradient, *args)
  gradients = wanted(shape, function, wrt == "tied")
  return [(np.asarray(x), factor * gradients[i]) for x, i in zip(found, places, strict=True)]


def sequence(seed, count):
  """Draws steps; parts of each are kept from the one before, so that alike meets alike."""
  rng, last = np.random.default_rng(seed), None
  rare = [0.02 if way in COMPILED else 1 for way in WAYS]
  parts = [(list(x), None) for x in (SHAPES, FUNCTIONS, WRT, (False, True))]
  parts.insert(3, (list(WAYS), np.divide(rare, sum(rare))))
  while count:
    drawn = [part[rng.choice(len(part), p=p)] for part, p in parts]
    if last is not None:
      kept = rng.random(len(parts)) < 0.5
      drawn = [old if keep else new for old, new, keep in zip(last, drawn, kept)]
    if drawn[3] in COMPILED and (last is None or last[3] == drawn[3] or drawn[1] == "own"):
      continue  # a function of the whole batch may not be split over devices
    last, count = drawn, count - 1
    yield drawn


def check(steps, forget_every=None):
  history = []
  for i, how in enumerate(steps):
    if forget_every and i and i % forget_every == 0:
      jax.clear_caches()
      history.append("forget")
    history.append(tuple(how))
    for found, expected in step(*how):
      size = max(np.abs(expected).max(), 1e-3)
      np.testing.assert_allclose(found / size, expected / size, atol=2e-5, err_msg=f"{history}")


def test_gradients_of_hidden_states_after_those_of_the_unembedding():
  """All were zeros once: the rule of one trace met what another had kept."""
  hidden, unembedding = jnp.eye(3), jnp.arange(9.0).reshape(3, 3) / 9
  f = lambda h, w: jnp.sum(gpo.linear_token_log_probs(h, w, jnp.arange(3)).log_probs)
  of_hidden = lambda h: f(h, unembedding)
  jax.jit(jax.grad(jax.checkpoint(of_hidden)))(hidden)
  jax.jit(jax.grad(lambda w: f(hidden, w)))(unembedding)
  gradient = jax.jit(jax.grad(of_hidden))(hidden)
  np.testing.assert_allclose(jnp.linalg.norm(gradient), 0.845, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["dapo", "log_probs"])
def test_a_scan_then_both_then_hidden_states(function):
  ways = [("hidden", "scan_of_grads"), ("both", "jit"), ("hidden", "jit")]
  check([("ordinary", function, wrt, way, False) for wrt, way in ways])


@pytest.mark.slow
def test_a_random_history():
  check(sequence(seed=0, count=15))


@pytest.mark.slow
def test_a_long_history():
  start = time.perf_counter()
  check(sequence(seed=1, count=2000), forget_every=500)
  print(f"2000 steps in {(time.perf_counter() - start) / 60:.1f} minutes")
