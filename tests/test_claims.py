"""Claims of README, docs and docstrings that no other test would miss: found and expected."""

import inspect
import math
import pathlib
import re
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from gpo_jax import _linear, advantages, corrections, divergences, levels, weightings
from gpo_jax.demo.config import Config
from tests import test_divergences as enumerated
from tests.batches import PRESETS, batch, value_and_grad

DATA = batch()
MASK, X, DAPO, GRPO = DATA.mask, jnp.asarray(DATA.log_probs), gpo.dapo(), gpo.grpo(beta=0.3)
RNG, BF16 = np.random.default_rng(0), jnp.finfo(jnp.bfloat16)
HIDDEN, HEAD = (jnp.asarray(RNG.normal(size=n), jnp.float32) for n in ((*MASK.shape, 4), (7, 4)))
TOKENS = jnp.asarray(RNG.integers(0, 7, MASK.shape))
ITS_SUM = partial(weightings.constant_length, length=1.0), weightings.sequence_sum
RULES = [weightings.token_mean, weightings.sequence_mean, weightings.token_sum, *ITS_SUM]
# fmt: off
ROOT = pathlib.Path(__file__).parent.parent
README, PAGE = ((ROOT / name).read_text() for name in ("README.md", "docs/migrating.md"))
MIGRATING = re.findall(r"`((?:partial\(|gpo\.|lambda r)[^`]*)`", PAGE)
CORRECTIONS = [partial(f, **{"threshold": 0.1} if "threshold"
  in inspect.signature(f).parameters else {}) for f in vars(corrections).values()
  if inspect.isfunction(f) and f.__module__ == corrections.__name__ and f.__name__[0] != "_"]
square = lambda tree: sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))
seen = lambda *x: gpo.gspo().replace(divergence=lambda r, d, _: d, beta=1.0)(*row(1.0, *x))[1]
vespo = lambda a, ratios: [corrections.vespo(*row(a, np.log(w)))[0] for w in ratios]
kl_of = lambda n: lambda h, w: jnp.sum(gpo.linear_exact_kl(h, w, 2 * h, w, chunk_size=n))
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
prepared = DATA.prepare
loss = lambda o, rollout=None, **changes: value_and_grad(o, X, rollout or prepared(o, **changes))
counts = lambda o, rollout: gpo.summarize(o(X, rollout)[1], rollout)["clip_fraction"]
memory = lambda f, *shapes: (jax.jit(f).lower(*map(jnp.zeros, shapes)).compile()
  .memory_analysis().temp_size_in_bytes)
# fmt: on


def row(advantage, *log_probs):
  """Log-probabilities of one response, and its rollout, whose others are 0."""
  x = jnp.array(log_probs)
  return x, gpo.Rollout(jnp.full((), advantage), 0 * x + 1, 0 * x + 1, 0 * x, 0 * x)


def slope_of_max_rl(success, size):
  """The derivative of what `max_rl` maximises in the chance of success."""
  k = np.arange(size + 1)
  rewards = (np.arange(size) < k[:, None]).astype(np.float32)
  chance = [math.comb(size, j) * success**j * (1 - success) ** (size - j) for j in k]
  score = np.where(rewards == 1, 1 / success, -1 / (1 - success))
  return np.dot(chance, np.mean(advantages.max_rl(rewards) * score, axis=-1))


def sizes(backend):
  head = _linear.Head(jnp.zeros((5000, 4)), None, None, jnp.ones(()))
  with mock.patch.object(jax, "default_backend", return_value=backend):
    return tuple(inspect.getmodule(gpo.linear_loss)._tiling(HIDDEN, head, None, None, None))


def seen_in_padding():
  """A divergence of every field, over NaN in the padding."""

  def every(r, d, rollout):
    assert rollout.mask.dtype == bool
    return r + d + sum(x for x in vars(rollout).values() if x is not None and x.dtype != bool)

  dirty = jnp.where(MASK, X, jnp.nan)
  names = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
  rollout = prepared(GRPO, mask=MASK.astype(int), **dict.fromkeys(names, dirty))
  rollout = rollout.replace(advantages=dirty, factor=dirty, weights=dirty)
  return GRPO.replace(divergence=every)(dirty, rollout)[1].divergence[~MASK]


def kl_of_responses_is_exact(weighting):
  """Of a loss by `sequence_unbiased`, on batches of one response each: value, gradient."""
  logits, old, ref = enumerated.tables(0)
  weights = jax.vmap(weighting)(jnp.asarray(enumerated.MASK)[:, None])[:, 0]
  weights *= jnp.exp(enumerated.response_log_probs(old))[:, None]
  others = map(enumerated.token_log_probs, (old, ref))
  rollout = gpo.Rollout(jnp.zeros(len(weights)), enumerated.MASK, weights, *others)
  objective = gpo.gpo(beta=1.0).replace(divergence=divergences.sequence_unbiased)
  loss = jax.jit(lambda x: objective(enumerated.token_log_probs(x), rollout)[0])
  found = jax.value_and_grad(loss)(logits)
  return [enumerated.close(*p) for p in zip(found, enumerated.true_sequence_kl(logits, ref))]


def fits_its_slot(code):
  """Whether an expression of the page on migrating works where it belongs."""
  known = {"ρ": 0.2, "mask": MASK, "epsilon_high": 4.0, "partial": partial, "gpo": gpo, "jnp": jnp}
  made = eval(code.replace("weights=…", "weights=[2.0]").replace("…", "2.0"), vars(gpo) | known)
  if isinstance(made, partial):
    slot = made.func.__module__.split(".")[1]
    made = DAPO.replace(**{slot: (made,)} if slot == "corrections" else {slot[:-1]: made})
  return isinstance(made, gpo.Objective) or callable(made)


# fmt: off
FACTS = {
  "pass_at_k, a shared first place": lambda: (advantages.pass_at_k([2.0, 2.0, 1.0]), 0),
  "max_rl, towards log p": lambda: (slope_of_max_rl(0.3, 300), 1 / 0.3),
  "geometric, A = 0 as A < 0": lambda: (levels.geometric(*row(0.0, 1.0, -1.0)), 0.3),
  "weights": lambda: ([jnp.sum(f(m)) for f in RULES[:2] for m in (MASK, 0 * MASK)], [1, 0, 1, 0]),
  "an id that comes back, advantages": lambda: (
    DAPO.prepare([[1.0, 0]], [[1] * 3], segment_ids=[[1, 2, 1]]).advantages[0, [0, 2]], 0.7070068),
  "an id that comes back, weights": lambda: (
    gpo.grpo().prepare([[1.0, 0]], [[1] * 3], segment_ids=[[1, 2, 1]]).weights, 1 / 3),
  "a level averages, then is bounded": lambda: (seen(40.0, -20.0).log_ratio, 10),
  "a divergence sees tokens": lambda: (seen(40.0, -20.0).divergence, [20, -20]),
  "a slot sees zeros in the padding": lambda: (seen_in_padding(), 0),
  "the sampler's weights are bounded": lambda: (corrections.mask_importance(
    jnp.zeros(1), row(1.0, 0.0)[1].replace(sampler_log_probs=-jnp.full(1, 900.0)), high=np.inf),
    np.exp(20)),
  "vespo, highest at k/λ": lambda: ([np.argmax(vespo(a, np.array([0.97, 1, 1.03]) * w))
    for a, w in ((1.0, 2 / 3), (-1.0, 3 / 2))], 1),
  "vespo, bad ones fade sooner below 1": lambda: (
    np.less(vespo(-1.0, [0.2, 0.5, 2, 5]), vespo(1.0, [0.2, 0.5, 2, 5])), [1, 1, 0, 0]),
  "a ban of the reference": lambda: (gpo.exact_kl([[0.0, 0.0]], [[0.0, -np.inf]]), np.inf),
  "no gradient to the reference's states": lambda: (jnp.concatenate([x.ravel() for x in jax.grad(
    lambda *x: jnp.sum(gpo.linear_exact_kl(HIDDEN, HEAD, *x[:2], ref_bias=x[2])), (0, 1, 2))(
    2 * HIDDEN, HEAD[::-1], jnp.arange(7.0))]), 0),
  "no gradient to a factor": lambda: (jax.grad(
    lambda f: DAPO(X, prepared(DAPO).replace(factor=f))[0])(X), 0),
  "no gradient of a correction": lambda: ([jax.grad(lambda x: jnp.sum(f(x, prepared(DAPO, **k))))(X)
    for f in CORRECTIONS for k in ({}, {"old_log_probs": None})], 0),
  "no gradient of terms": lambda: ([jax.grad(lambda x: square(o(x, prepared(o))[1]))(X)
    for o in map(PRESETS.get, ("gpo", "gmpo", "deepseek_v32", "r1", "vespo"))], 0),
  "no gradient of linear_loss's terms": lambda: ([jax.grad(lambda h: square(
    gpo.linear_loss(o, h, HEAD, TOKENS, prepared(o))[1]))(HIDDEN) for o in (GRPO, gpo.gspo())], 0),
  "advantages of any shape": lambda: ([loss(DAPO, prepared(DAPO).replace(
    advantages=jnp.broadcast_to(prepared(DAPO).advantages, (4, 4, n))[..., i]))[1]
    for n, i in ((1, 0), (1, slice(1)), (6, slice(6)))], loss(DAPO)[1]),
  "more axes before G": lambda: (value_and_grad(GRPO, X.reshape(2, 2, 4, 6), jax.tree.map(
    lambda x: x.reshape(2, 2, *x.shape[1:]), prepared(GRPO)))[1].reshape(4, 4, 6), loss(GRPO)[1]),
  "a term of one's own by the weights": lambda: (
    loss(GRPO.replace(divergence=None, beta=None))[1] + jax.grad(lambda x: 0.3 * jnp.sum(
    prepared(GRPO).weights * divergences.k3(x - DATA.ref_log_probs, None, None), where=MASK))(X),
    loss(GRPO)[1]),
  "what is counted as clipped": lambda: ([counts(o, prepared(o, old_log_probs=X - 3)) > 0.2
    for o in map(PRESETS.get, ("grpo", "cispo", "gmpo", "dppo", "topr"))], [1, 0, 0, 0, 0]),
  "TRL's RLOO is ours on-policy": lambda: (
    loss(gpo.r1(beta=None).replace(advantage=advantages.leave_one_out), old_log_probs=X)[1],
    loss(gpo.rloo(), old_log_probs=X)[1]),
  "options on the page on migrating": lambda: (
    [len(MIGRATING) > 20, *map(fits_its_slot, MIGRATING)], True),
  "bfloat16 beside 1, and its rounding at -1 and -4": lambda: (
    [BF16.epsneg, BF16.eps, BF16.eps / 2, 2 * BF16.eps], [1 / 256, 2 / 256, 1 / 256, 1 / 64]),
  "half precision": lambda: ([f(HIDDEN.astype(t)).dtype == np.float32
    for t in (jnp.bfloat16, jnp.float16) for f in (
    gpo.token_entropy, lambda x: gpo.exact_kl(x, x),
    lambda x: gpo.linear_token_log_probs(x, HEAD.astype(x.dtype), TOKENS).entropy)], True),
  "sizes": lambda: (sizes("cpu") + sizes("gpu"), (512, 1024, True, 512, 5000, False)),
  "chunks without masked tokens": lambda: ([_linear._Chunks(
    jnp.asarray(m), _linear.Tiling(5, 7, True)).count for m in (MASK, MASK & False, MASK | True)],
    [-(-MASK.sum() // 5), 0, -(-MASK.size // 5)]),
  "log-probabilities are at most 0": lambda: ([jnp.max(f) > 0 for s in (1.0, 30.0, 1e4) for f in (
    gpo.token_log_probs(s * HIDDEN @ HEAD.T, TOKENS),
    gpo.linear_token_log_probs(s * HIDDEN, HEAD, TOKENS, tile_size=2).log_probs)], False),
  "groups by id, 64·N values at a time": lambda: (memory(lambda r: advantages.by_group(
    advantages.standardize, r, jnp.arange(4096) // 8), (4096,)) < 8 * 4 * 64 * 4096, True),
  "linear_exact_kl, some chunks of logits": lambda: ([memory(jax.value_and_grad(kl_of(n), (0, 1)),
    (1, 1024, 8), (8192, 8)) < 8 * 4 * 32 * 8192 for n in (32, 1024)], [True, False]),
  "groups by id, compiled once": lambda: (np.diff([[advantages.by_group(partial(
    advantages.standardize, eps=e), DATA.rewards, MASK[..., 0].astype(int)),
    advantages._of_samples._cache_size()][1] for e in (1e-4, 0.1)]), 0),
  "by_group on a mesh with Explicit axes": lambda: (advantages.by_group(advantages.center,
    jax.device_put(jnp.ones(8), NamedSharding(MESH, P("data"))), jnp.arange(8))
    .sharding.is_fully_replicated, True),
  "defaults": lambda: ([*corrections.mask_importance.__kwdefaults__.values()][:2], [0.5, 5]),
  "the demo's recipe": lambda: ("{0.steps} updates of {0.prompts}\nprompts × {0.samples} samples"
    .format(Config()).replace("\n", " ") in README.replace("\n", " "), True),
}
IN_FLOAT64 = {
  "dtypes": lambda: ([x.dtype.itemsize for x in (prepared(GRPO).weights, *loss(GRPO))], [8, 8, 4]),
  "exact for responses": lambda: (  # the count of `token_mean` has the response's length in it
    [kl_of_responses_is_exact(f) for f in RULES], np.array([[0, 0, 1, 1, 1]] * 2).T),
  "gradients to a level's number": lambda: (*(f(lambda c: gpo.gmpo(clip=c)(
    X, prepared(gpo.gmpo()))[0]) for f in (lambda f: jax.grad(f)(0.25),
    lambda f: (f(0.25 + 1e-4) - f(0.25 - 1e-4)) / 2e-4)),),
}
# fmt: on


@pytest.mark.parametrize("fact", [*FACTS, *IN_FLOAT64])
def test_facts(fact, request):
  if fact in IN_FLOAT64:
    request.getfixturevalue("x64")
  found, expected = map(np.asarray, (FACTS | IN_FLOAT64)[fact]())
  expected = np.broadcast_to(expected, found.shape)
  np.testing.assert_allclose(found.astype(float), expected, rtol=1e-5, atol=1e-6)
