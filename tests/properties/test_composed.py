"""Objectives composed at random, from hidden states: what the definition says of full logits.

Of the package's functions and of functions of every kind that a user may write: tokenwise or
coupled along tokens, rows and the batch, declared or not, bound to numbers and arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

import gpo_jax as gpo
from gpo_jax import corrections, divergences, levels, surrogates, weightings
from gpo_jax.linear import one_pass
from tests.support.quick import jit

pytestmark = pytest.mark.usefixtures("x64")
partial = functools.partial
SHAPE, WIDTH, VOCABULARY = (3, 2, 5), 4, 11  # [P, G, T]
SHARES = np.linspace(0.5, 1.5, SHAPE[-1])


# --- functions of every kind ---------------------------------------------------------------------


class Powered:
  """A callable object."""

  def __call__(self, log_ratio, advantages):
    return jnp.tanh(log_ratio) * advantages


@jax.jit
def jitted(log_ratio, advantages):
  return jnp.sinh(log_ratio) * advantages


@jax.custom_jvp
def twice(x):
  return jnp.sin(x)


twice.defjvp(lambda primals, tangents: (twice(*primals), 2 * jnp.cos(primals[0]) * tangents[0]))


@functools.wraps(surrogates.importance_weighted)
def wrapped(log_ratio, advantages):
  """Looks like ours, and couples the batch."""
  return surrogates.importance_weighted(log_ratio - jnp.mean(log_ratio), advantages)


@gpo.tokenwise
def declared(log_ratio, advantages, *, power=2):
  return log_ratio * advantages + log_ratio**power


def scaled(log_ratio, advantages, *, shares):
  return jnp.exp(log_ratio) * advantages * shares[None, None]


def of_tokens(log_ratio, advantages):
  """Couples a token with those before it."""
  return jnp.cumsum(log_ratio, axis=-1) * advantages


def of_rows(log_ratio, advantages):
  """Couples the rows of a group."""
  return (log_ratio - jnp.mean(log_ratio, axis=-2, keepdims=True)) * advantages


def of_batch(log_ratio, advantages):
  """Couples everything."""
  return jnp.exp(log_ratio) / jnp.mean(jnp.exp(log_ratio)) * advantages


SURROGATES = {
  "clip": partial(surrogates.clip, epsilon_low=0.1, epsilon_high=0.3),
  "dual_clip": surrogates.dual_clip,
  "cispo": partial(surrogates.cispo, high=1.2),
  "sapo": surrogates.sapo,
  "reinforce": surrogates.reinforce,
  "importance_weighted": surrogates.importance_weighted,
  "dro": partial(surrogates.dro, beta=0.5),
  "lambda": lambda log_ratio, advantages: jnp.exp(log_ratio) * advantages,
  "closure": lambda log_ratio, advantages: log_ratio * advantages * SHARES[None, None],
  "object": Powered(),
  "jitted": jitted,
  "custom_jvp": lambda log_ratio, advantages: twice(log_ratio) * advantages,
  "partial": partial(declared, power=3),
  "declared": declared,
  "partial_of_array": Partial(scaled, shares=jnp.asarray(SHARES)),
  "wraps": wrapped,
  "of_tokens": of_tokens,
  "of_rows": of_rows,
  "of_batch": of_batch,
}
LEVELS = {
  "token": levels.token,
  "sequence": levels.sequence,
  "sequence_token": levels.sequence_token,
  "sequence_product": levels.sequence_product,
  "sequence_max": levels.sequence_max,
  "clipped_sequence": partial(levels.clipped_sequence, low=0.1),
  "own": lambda log_ratio, rollout: (log_ratio + rollout.mean(log_ratio)) / 2,
  "of_neighbours": lambda log_ratio, rollout: log_ratio + jnp.roll(log_ratio, 1, axis=-1) / 2,
}
DIVERGENCES = {
  "none": None,
  "k1": divergences.k1,
  "k2": divergences.k2,
  "k3": divergences.k3,
  "absolute": divergences.absolute,
  "straight_through": divergences.straight_through,
  "unbiased": divergences.unbiased,
  "sequence_unbiased": divergences.sequence_unbiased,
  "sequence_k3": divergences.sequence_k3,
  "chi2_minus_kl": divergences.chi2_minus_kl,
  "forward_kl": divergences.forward_kl,
  "own": lambda d, log_ratio, rollout: d**2 * jnp.exp(rollout.mean(log_ratio)),
  "without_reference": gpo.tokenwise(lambda d, log_ratio, rollout: log_ratio**2),
  "of_batch": lambda d, log_ratio, rollout: d * jnp.mean(log_ratio),
}
CORRECTIONS = {
  "truncate": partial(corrections.truncate_importance, cap=1.1),
  "mask_importance": partial(corrections.mask_importance, low=0.7, high=1.4),
  "off_policy": partial(corrections.off_policy_sequence_mask, threshold=0.1),
  "vespo": corrections.vespo,
  "topr": corrections.topr,
  "total_variation": partial(corrections.total_variation_mask, low=0.1, high=0.05),
  "reject": partial(corrections.reject, high=0.02),
  "reject_responses": partial(
    corrections.reject, low=-0.1, high=0.1, statistic=divergences.k1, level=levels.sequence_max
  ),
  "own": lambda log_probs, rollout: jnp.exp(log_probs - jnp.mean(log_probs)),
}
WEIGHTINGS = {
  "token_mean": weightings.token_mean,
  "sequence_mean": weightings.sequence_mean,
  "constant_length": partial(weightings.constant_length, length=4.0),
}
TILINGS = (None, gpo.Tiling(1, 1), gpo.Tiling(3, 4), gpo.Tiling(7, 11), gpo.Tiling(64, 5))
choose = st.sampled_from

CHOICES = {
  "surrogate": choose(sorted(SURROGATES)),
  "level": choose(sorted(LEVELS)),
  "divergence": choose(sorted(DIVERGENCES)),
  "corrections": st.lists(choose(sorted(CORRECTIONS)), max_size=2, unique=True),
  "weighting": choose(sorted(WEIGHTINGS)),
  "packed": st.booleans(),
  "factor": st.booleans(),
  "tiling": choose(TILINGS),
  "softcap": choose([None, 2.0]),
  "bias": st.booleans(),
  "seed": st.integers(0, 2**16),
}


# --- the same twice ------------------------------------------------------------------------------


def compose(surrogate, level, divergence, corrections, weighting):
  return gpo.Objective(
    surrogate=SURROGATES[surrogate],
    level=LEVELS[level],
    advantage=gpo.advantages.center,
    weighting=WEIGHTINGS[weighting],
    divergence=DIVERGENCES[divergence],
    beta=None if divergence == "none" else 0.3,
    corrections=tuple(CORRECTIONS[name] for name in corrections),
    allow_token_weighting=True,
  )


def draw(objective, seed, packed, factor, density):
  """Draws parameters, tokens and a rollout of policies that are near; density is of the mask."""
  rng = np.random.default_rng(seed)
  params = {
    "hidden": rng.normal(size=(*SHAPE, WIDTH)),
    "unembedding": rng.normal(size=(VOCABULARY, WIDTH)),
    "bias": rng.normal(size=VOCABULARY),
  }
  mask, tokens = rng.random(SHAPE) < density, rng.integers(0, VOCABULARY, SHAPE)
  near = {
    f"{name}_log_probs": np.minimum(rng.normal(-2.5, 0.5, SHAPE), 0)
    for name in ("old", "ref", "sampler")
  }
  kind = {}
  if packed:
    kind["segment_ids"] = np.sort(rng.integers(1, 4, SHAPE), axis=-1)
    kind["group_ids"] = rng.integers(0, 3, (*SHAPE[:2], 3))
  rewards = rng.normal(size=(*SHAPE[:2], 3) if packed else SHAPE[:2])
  rollout = objective.prepare(rewards, mask, **near, **kind)
  if factor:
    rollout = rollout.replace(factor=rng.uniform(0.5, 2, SHAPE))
  return params, tokens, rollout


def from_logits(params, objective, tokens, rollout, softcap, bias):
  logits = jnp.einsum("...h,vh->...v", params["hidden"], params["unembedding"])
  logits = logits + params["bias"][None, None, None] if bias else logits
  log_probs = gpo.token_log_probs(logits, tokens, softcap=softcap, temperature=0.8)
  return objective(log_probs, rollout)


def from_hidden(params, objective, tokens, rollout, softcap, bias, tiling):
  head = gpo.Head(params["unembedding"], params["bias"] if bias else None, softcap, 0.8)
  return gpo.linear_loss(objective, params["hidden"], head, tokens, rollout, tiling=tiling)


def in_params_and_beta(loss_fn, objective):
  """Value and gradients, in the parameters and in β; what else is bound stays what it is."""

  def run(params, beta, tokens, rollout):
    return loss_fn(params, objective.replace(beta=beta), tokens, rollout)[0]

  return jax.value_and_grad(run, argnums=(0, 1))


def garbage_at_masked(params, tokens, rollout, garbage):
  """Fills what is masked; a masked token may be any id."""
  at = lambda x, y: jnp.where(rollout.mask.reshape(*SHAPE, *[1] * (x.ndim - 3)), x, y)
  fields = ("old_log_probs", "ref_log_probs", "sampler_log_probs", "factor")
  dirty = {k: at(v, garbage) for k, v in vars(rollout).items() if k in fields and v is not None}
  hidden = {"hidden": at(params["hidden"], garbage)}
  return params | hidden, at(tokens, -7), rollout.replace(**dirty)


def check(packed, factor, tiling, softcap, bias, seed, **slots):
  objective = compose(**slots)
  ours = partial(from_hidden, softcap=softcap, bias=bias, tiling=tiling)
  theirs = partial(from_logits, softcap=softcap, bias=bias)
  step, definition = (jit(in_params_and_beta(f, objective)) for f in (ours, theirs))
  for density in (0.0, 0.3, 0.8):
    params, tokens, rollout = draw(objective, seed, packed, factor, density)
    beta = objective.beta
    found = step(params, beta, tokens, rollout)
    expected = definition(params, beta, tokens, rollout)
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      assert x.dtype == jnp.float64
      np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12 * scale)
    for garbage in (np.nan, 1e300, -np.inf):
      dirty, ids, dirty_rollout = garbage_at_masked(params, tokens, rollout, garbage)
      again = step(dirty, beta, ids, dirty_rollout)
      jax.tree.map(np.testing.assert_array_equal, again, found)


HEALTH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
how = partial(
  settings,
  derandomize=True,
  deadline=None,
  database=None,
  suppress_health_check=HEALTH,
  phases=(Phase.explicit, Phase.generate),  # to shrink a failure would compile for an hour
)


@how(max_examples=4)
@given(st.fixed_dictionaries(CHOICES))
def test_a_composed_objective_is_that_of_the_full_logits(choices):
  check(**choices)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_hundreds_of_composed_objectives_are_those_of_the_full_logits(surrogate):
  rest = {name: strategy for name, strategy in CHOICES.items() if name != "surrogate"}

  @how(max_examples=20)
  @given(st.fixed_dictionaries(rest))
  def run(choices):
    check(surrogate=surrogate, **choices)

  run()


def test_both_paths_are_met():
  rest = {"level": "token", "divergence": "none", "corrections": [], "weighting": "token_mean"}
  once = {name for name in SURROGATES if one_pass.is_enough(compose(surrogate=name, **rest))}
  ours = {"clip", "dual_clip", "cispo", "sapo", "reinforce", "importance_weighted", "dro"}
  assert once == ours | {"declared", "partial"}
