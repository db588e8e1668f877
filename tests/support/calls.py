"""Every public function in one table, by family, each with a right call on small arrays.

A call takes its arrays by name and returns a tree of arrays. All arrays are of numbers that every
float dtype holds exactly.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from gpo_jax import advantages, corrections, divergences, levels, surrogates, weightings
from gpo_jax.traits import traits_of
from tests.support.quick import jit

RNG = np.random.default_rng(0)


class Call(NamedTuple):
  """A function of arrays by name, and arrays that fit; `by` are those it is differentiable in."""

  function: Any
  given: dict[str, np.ndarray]
  by: tuple[str, ...] = ()

  def __call__(self, arrays):
    """Calls with these arrays in place of the given ones."""
    return self.function(**arrays)


def draw(*shape, sign=-1):
  """Numbers that every float dtype holds exactly."""
  return (sign * RNG.integers(1, 16, shape) / 8).astype(np.float32)


OBJECTIVE = gpo.deepseek_v32(beta=0.5)  # it reads every array of a rollout
MASK = np.array([[[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]], bool)
IDS = np.array([[1, 1, 2, 2, 3, 0], [1, 2, 2, 0, 0, 0]])
NAMES = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
LOG_PROBS, PACKED_LOG_PROBS = draw(*MASK.shape), draw(*IDS.shape)
PLAIN = {"rewards": draw(1, 3), "mask": MASK} | {name: draw(*MASK.shape) for name in NAMES}
PACKED = {"rewards": draw(2, 3), "mask": IDS > 0, "segment_ids": IDS, "group_ids": IDS[:, ::2] // 2}
PACKED |= {name: draw(*IDS.shape) for name in NAMES}
_prepare, _evaluate = jit(lambda arrays: OBJECTIVE.prepare(**arrays)), jit(OBJECTIVE)
ROLLOUT, PACKED_ROLLOUT = _prepare(PLAIN), _prepare(PACKED)
SAMPLES = {name: draw(3, sign=1) for name in ("ratios", "advantages", "pi_current", "pi_ref")}
WHERE = np.array([[1, 1, 1], [1, 1, 0]], bool)
LOGITS = {"logits": draw(2, 5), "support": np.array([1, 1, 1, 1, 0], bool)}
STATES = {"hidden": draw(1, 3, 4, 2), "unembedding": draw(5, 2), "bias": draw(5)}
REFERENCE = {f"ref_{name}": draw(*value.shape) for name, value in STATES.items()}
TOKENS = {"tokens": RNG.integers(0, 5, MASK.shape)}

_NEEDED = {"cispo": {"high": 4.0}, "dro": {"beta": 0.5}, "binary_kl_mask": {"low": 0.1}}
_NEEDED |= {"off_policy_sequence_mask": {"threshold": 0.1}, "constant_length": {"length": 8}}
_NEEDED |= {"covariance_mask": {"fraction": 0.3}, "mask_importance": {"low": 0.5, "high": 5.0}}
_NEEDED |= {"reject": {"high": 0.1}}


def functions_of(module, but=()):
  """Finds the slot functions of a module, their numbers bound."""
  found = {k: f for k, f in vars(module).items() if callable(f) and traits_of(f).ours}
  own = {
    k: f for k, f in found.items() if f.__module__.startswith(module.__name__) and k not in but
  }
  return {k: functools.partial(f, **_NEEDED.get(k, {})) for k, f in own.items()}


def every(module, *arguments, but=()):
  """Makes one call of all functions of a module."""
  functions = functions_of(module, but)
  return lambda **given: {k: f(*(given[n] for n in arguments)) for k, f in functions.items()}


def _rollout(given):
  fields = ("advantages", "mask", "weights", "segment_ids", "factor", *NAMES)
  return gpo.Rollout(**{k: given.pop(k) for k in fields if k in given})


def _with_rollout(function):
  """Makes a function of a rollout one of its arrays."""

  def call(**given):
    rollout = _rollout(given)
    return function(rollout=rollout, **given)

  return call


def _fields(rollout):
  return {k: np.asarray(v) for k, v in vars(rollout).items() if v is not None}


def _head(unembedding, bias):
  return gpo.Head(unembedding, bias, softcap=4.0, temperature=2.0)


def _linear_loss(hidden, unembedding, bias, tokens, rollout):
  head = _head(unembedding, bias)
  return [gpo.linear_loss(o, hidden, head, tokens, rollout)[0] for o in (OBJECTIVE, gpo.gspo())]


def _of_numbers(log_probs, epsilon, length, temperature):
  """Makes objectives and settings of what is traced."""
  return (
    gpo.grpo(epsilon_low=epsilon, beta=length)(log_probs, ROLLOUT),
    gpo.dr_grpo(length=length).prepare(PLAIN["rewards"], MASK),
    gpo.token_entropy(log_probs, temperature=temperature, softcap=length),
    gpo.linear_token_log_probs(
      log_probs,
      gpo.Head(jnp.eye(5, 4, dtype=log_probs.dtype), None, length, temperature),
      TOKENS["tokens"][..., 0],
    ),
  )


_of_params = gpo.as_loss(OBJECTIVE, lambda params, x: params * x, has_aux=False)
_FIELDS, _PACKED_FIELDS = _fields(ROLLOUT), _fields(PACKED_ROLLOUT)
_SLOTS = {
  "levels": (levels, ("log_ratio", "rollout")),
  "divergences": (divergences, ("ref_log_ratio", "log_ratio", "rollout")),
  "corrections": (corrections, ("log_probs", "rollout")),
}
_KINDS = ("decoupled", "optimal_baseline")

# fmt: off
CALLS = {
  "specification": Call(
    lambda **x: (
      gpo.gpo_objective(**x), gpo.gpo_value_and_grad(**x), gpo.gpo_loss(**x, where=WHERE[1]),
      gpo.gpo_objective_per_group(**{k: jnp.stack([v, 2 * v]) for k, v in x.items()}),
    ),
    SAMPLES, tuple(SAMPLES),
  ),
  "token_log_probs": Call(
    gpo.token_log_probs, LOGITS | {"tokens": np.array([0, 3])}, ("logits",)
  ),
  "token_entropy": Call(gpo.token_entropy, LOGITS, ("logits",)),
  "exact_kl": Call(gpo.exact_kl, LOGITS | {"ref_logits": draw(2, 5)}, ("logits",)),
  "linear_token_log_probs": Call(
    lambda hidden, unembedding, bias, tokens, mask: gpo.linear_token_log_probs(
      hidden, _head(unembedding, bias), tokens, mask=mask
    ),
    STATES | TOKENS | {"mask": MASK}, tuple(STATES),
  ),
  "linear_loss": Call(
    _with_rollout(_linear_loss), STATES | TOKENS | _FIELDS, tuple(STATES),
  ),
  "linear_divergence": Call(
    lambda hidden, unembedding, bias, ref_hidden, ref_unembedding, ref_bias, mask:
    gpo.linear_divergence(
      gpo.vocabulary.kl, hidden, _head(unembedding, bias), ref_hidden,
      gpo.Head(ref_unembedding, ref_bias), mask=mask,
    ),
    STATES | REFERENCE | {"mask": MASK}, tuple(STATES),
  ),
  "prepare": Call(lambda **x: vars(OBJECTIVE.prepare(**x)), PLAIN),
  "prepare_packed": Call(lambda **x: vars(OBJECTIVE.prepare(**x)), PACKED),
  "objective": Call(
    _with_rollout(lambda log_probs, rollout: (
      OBJECTIVE(log_probs, rollout), OBJECTIVE.losses(log_probs, rollout)
    )),
    _FIELDS | {"log_probs": LOG_PROBS, "factor": draw(*MASK.shape, sign=1)}, ("log_probs",),
  ),
  "objective_packed": Call(
    _with_rollout(lambda log_probs, rollout: gpo.gspo()(log_probs, rollout)),
    _PACKED_FIELDS | {"log_probs": PACKED_LOG_PROBS}, ("log_probs",),
  ),
  "as_loss": Call(
    _with_rollout(lambda params, x, rollout: _of_params(params, rollout, x)),
    _FIELDS | {"params": LOG_PROBS, "x": LOG_PROBS}, ("params", "x"),
  ),
  "summarize": Call(
    _with_rollout(lambda rollout, **terms: gpo.summarize(
      gpo.Terms(**{k.removeprefix("terms_"): x for k, x in terms.items()}), rollout
    )),
    _FIELDS | {f"terms_{k}": x for k, x in _fields(_evaluate(LOG_PROBS, ROLLOUT)[1]).items()},
  ),
  "by_group": Call(
    functools.partial(advantages.by_group, advantages.center),
    {"rewards": draw(2, 3), "where": WHERE, "group_ids": IDS[:, ::2]},
  ),
  "advantages": Call(
    lambda rewards, where, lengths: every(advantages, "rewards", "where", but=_KINDS)(
      rewards=rewards, where=where
    ) | {
      "optimal_baseline": advantages.optimal_baseline(rewards, where, lengths=lengths),
      "decoupled": advantages.decoupled(jnp.stack([rewards, rewards**2]), where),
    },
    {"rewards": draw(2, 3), "where": WHERE, "lengths": draw(2, 3, sign=1)},
  ),
  "generalized": Call(
    advantages.generalized,
    {"rewards": draw(2, 6), "values": draw(2, 6), "mask": IDS > 0, "segment_ids": IDS},
  ),
  "weightings": Call(
    every(weightings, "mask", "segment_ids"), {"mask": IDS > 0, "segment_ids": IDS}
  ),
  "surrogates": Call(
    every(surrogates, "log_ratio", "advantages"),
    {"log_ratio": draw(3, 4), "advantages": draw(3, 1)}, ("log_ratio", "advantages"),
  ),
  "numbers": Call(
    lambda log_probs, **numbers: _of_numbers(log_probs, **{k: x[0] for k, x in numbers.items()}),
    {"log_probs": LOG_PROBS, "epsilon": np.float32([0.5]), "length": np.float32([2]),
     "temperature": np.float32([2])},
  ),
}
for _name, (_module, _arguments) in _SLOTS.items():
  _call = _with_rollout(every(_module, *_arguments, but=("sequence_exact",)))
  for _suffix, _x, _data in (("", draw(1, 3, 4), _FIELDS), ("_packed", draw(2, 6), _PACKED_FIELDS)):
    _floats = {k: _x / (i + 1) for i, k in enumerate(_arguments[:-1])}
    CALLS[_name + _suffix] = Call(_call, _data | _floats, tuple(_floats))
# fmt: on
