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
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from tests.support import linear

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
WRT = {"hidden": (0,), "unembedding": (1,), "bias": (2,), "both": (0, 1), "all": (0, 1, 2), "tied": (1,)}
TRANSFORMS = (
  "grad", "jit", "value_and_grad", "checkpoint", "scan", "scan_of_grads", "cond", "vmap",
  "shard_map", "donated",
)  # fmt: skip
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
      return jnp.sum(
        slopes[0] * gpo.linear_divergence(gpo.vocabulary.kl, hidden, head, *reference)
      )
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
  value, gradients = linear.jit(jax.value_and_grad(loss))(data.state)
  return value, [np.asarray(x) for x in gradients]


def step(shape, function, wrt, transform, frozen):
  """Differentiates in one way and compares; `frozen`: what is not differentiated is closed over."""
  data, places = data_of(shape), WRT[wrt]
  moving = [jnp.copy(data.state[i]) for i in places]
  rest = [x for i, x in enumerate(data.state) if i not in places]

  def loss(moving, rest, given=None, scale=1.0):
    state, moving, rest = [], iter(moving), iter(rest)
    for i in range(3):
      state.append(next(moving) if i in places else next(rest))
    return scale * data.from_hidden(function, wrt, state, data.data if given is None else given)

  factor = 1.0
  jit = functools.partial(linear.jit, donate_argnums=(0,) if transform == "donated" else ())
  grad = jax.grad
  if transform == "value_and_grad":
    grad = lambda f: lambda *args: jax.value_and_grad(f)(*args)[1]
  elif transform == "checkpoint":
    grad = lambda f: jax.grad(jax.checkpoint(f))
  elif transform == "scan":
    factor = SCALES.sum()
    grad = lambda f: jax.grad(
      lambda *args: jax.lax.scan(lambda sum_, c: (sum_ + c * f(*args), None), 0.0, SCALES)[0]
    )
  elif transform == "scan_of_grads":
    factor = SCALES.sum()

    def grad(f):
      def add(args, total, c):
        return jax.tree.map(lambda x, y: x + c * y, total, jax.grad(f)(*args)), None

      return lambda *args: jax.lax.scan(
        functools.partial(add, args), jax.tree.map(jnp.zeros_like, args[0]), SCALES
      )[0]

  elif transform == "cond":
    sign = jnp.sum(data.slopes) < 1e9
    grad = lambda f: jax.grad(lambda *args: jax.lax.cond(sign, f, lambda *_: 0.0, *args))
  elif transform == "vmap":
    factor = SCALES.sum()
    grad = lambda f: jax.grad(
      lambda *args: jnp.sum(jax.vmap(lambda c: c * f(*args))(jnp.asarray(SCALES)))
    )
  elif transform == "shard_map":
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=PAIR)
    at = lambda indices: [P(None, "x") if i == 0 else P() for i in indices]
    others = [i for i in range(3) if i not in places]
    specs = at(places), at(others), (P(None, "x"), P(None, None, "x"), P(None, "x"))
    own = lambda *args: jax.lax.psum(loss(*args), "x")
    split = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P())
    differentiated = lambda f: jax.grad(lambda moving, rest: f(moving, rest, data.data))
    grad, loss_of = differentiated, split
  loss_of = split if transform == "shard_map" else lambda moving, rest: loss(moving, rest)
  if frozen:
    gradient = grad(lambda moving: loss_of(moving, rest)) if transform != "shard_map" else (
      lambda moving: grad(loss_of)(moving, rest)
    )
    found = (gradient if transform == "grad" else jit(gradient))(moving)
  else:
    gradient = grad(loss_of)
    found = (gradient if transform == "grad" else jit(gradient))(moving, rest)
  _, gradients = wanted(shape, function, wrt == "tied")
  return [(np.asarray(x), factor * gradients[i]) for x, i in zip(found, places, strict=True)]


PAIR = jax.devices()[:2]


def sequence(seed, count):
  """Draws steps; a few parts of each are kept from the one before, so that alike meets alike."""
  rng, last = np.random.default_rng(seed), None
  parts = (tuple(SHAPES), FUNCTIONS, tuple(WRT), TRANSFORMS, (False, True))
  while count:
    drawn = [part[rng.integers(len(part))] for part in parts]
    if last is not None:
      kept = rng.random(len(parts)) < 0.5
      drawn = [old if keep else new for old, new, keep in zip(last, drawn, kept)]
    # Responses may be split over devices, a batch may not.
    if drawn[1] == "own" and drawn[3] == "shard_map":
      continue
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


@pytest.mark.parametrize("function", ["log_probs", "dapo"])
def test_a_scan_then_both_then_hidden_states(function):
  ways = [("hidden", "scan_of_grads"), ("both", "jit"), ("hidden", "jit")]
  check([("ordinary", function, wrt, transform, False) for wrt, transform in ways])


def test_a_random_history():
  check(sequence(seed=0, count=36))


@pytest.mark.slow
def test_a_long_history():
  start = time.perf_counter()
  check(sequence(seed=1, count=5000), forget_every=500)
  print(f"5000 steps in {(time.perf_counter() - start) / 60:.1f} minutes")
