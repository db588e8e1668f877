"""Synthetic batches, healthy and sabotaged: whole policies over a small vocabulary, by seed.

A policy is a table of log-probabilities, one row for each of many states. Tokens are drawn from the
sampler's table and read in the others', so that log-probabilities relate to each other as those of
real policies do: a temperature, a truncated support or a step of training acts on distributions.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from gpo_jax.presets import PRESETS

STATES, VOCABULARY = 2048, 64
# The spread of a state's logits: its median over states, and how it varies among them.
POLICIES = {"peaked": (8.0, 0.8), "typical": (4.0, 0.8), "flat": (0.7, 0.4)}
# The number of responses, the longest, the size of a group.
SIZES = [
  (8, 512, 4),
  (16, 16, 8),
  (16, 2048, 8),
  (64, 64, 4),
  (64, 512, 16),
  (512, 128, 8),
  (4096, 16, 8),
]


LOGS = ("log_probs", "old_log_probs", "sampler_log_probs", "ref_log_probs")


@dataclasses.dataclass(frozen=True)
class Setting:
  """How a batch is made; the defaults are healthy.

  Attributes:
    responses: how many.
    length: the longest, at least 4.
    group: responses to a prompt.
    policy: a key of `POLICIES`.
    preset: prepares the rollout.
    bfloat16: whether the sampler rounds its logits.
    drift: how far training has moved the policy since the sampler had it, in logits.
    with_old: whether the trainer's log-probabilities of the sampler's weights are given.
    with_sampler: whether the sampler's log-probabilities are given.
    ref_drift: how far the reference is from there; None gives none.
    temperature: the sampler's, which the trainer does not know.
    top_p: the sampler's, which the trainer does not know.
    mismatch: how far the sampler's model is from the trainer's, in logits.
    solvable: parameters of the beta distribution of the prompts' rates of success.
    tools: whether half of the responses hold a masked tool's output.
    empty: the share of responses without a token.
    real: whether rewards are real numbers, not 0 and 1.
  """

  responses: int = 64
  length: int = 64
  group: int = 8
  policy: str = "typical"
  preset: str = "grpo"
  bfloat16: bool = False
  drift: float = 0.0
  with_old: bool = True
  with_sampler: bool = True
  ref_drift: float | None = 0.2
  temperature: float = 1.0
  top_p: float = 1.0
  mismatch: float = 0.0
  solvable: tuple[float, float] = (1.5, 1.5)
  tools: bool = False
  empty: float = 0.0
  real: bool = False


@dataclasses.dataclass
class Batch:
  """Arrays `[P, G, T]`, rewards `[P, G]`; `changes` replace fields of the prepared rollout."""

  objective: gpo.Objective
  rewards: np.ndarray
  mask: np.ndarray
  log_probs: np.ndarray
  old_log_probs: np.ndarray | None
  sampler_log_probs: np.ndarray | None
  ref_log_probs: np.ndarray | None
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)

  def prepare(self) -> gpo.Rollout:
    """Prepares the rollout."""
    rollout = _prepare(self.objective, self.rewards, self.mask)
    return rollout.replace(**{name: getattr(self, name) for name in LOGS[1:]} | self.changes)

  def diagnose(self) -> gpo.Diagnosis:
    """Diagnoses the batch."""
    return gpo.diagnose(self.log_probs, self.prepare(), self.rewards)


def draw_setting(seed: int, **fixed: Any) -> Setting:
  """Draws a healthy setting."""
  rng = np.random.default_rng(seed)
  responses, length, group = SIZES[rng.integers(len(SIZES))]
  drawn = {
    "responses": responses,
    "length": length,
    "group": group,
    "policy": rng.choice(list(POLICIES)),
    "preset": rng.choice([name for name in PRESETS if _objective(name, 1).advantage is not None]),
    "bfloat16": rng.random() < 0.5,
    "drift": rng.choice([0.0, 0.02, 0.05]),
    "with_old": rng.random() < 0.8,
    "with_sampler": rng.random() < 0.6,
    "ref_drift": rng.choice([None, 0.0, 0.1, 0.3]),
    "solvable": [(1.5, 1.5), (0.7, 0.7), (1.0, 3.0)][rng.integers(3)],
    "tools": rng.random() < 0.2,
    "empty": rng.choice([0.0, 0.05]),
    "real": rng.random() < 0.2,
  }
  return Setting(**drawn | fixed)


def make(setting: Setting, seed: int) -> Batch:
  """Makes a batch."""
  rng = np.random.default_rng(seed)
  base = _logits(setting.policy)
  # Other shapes of a batch round otherwise.
  jitter = 0.003 * rng.normal(size=base.shape) if setting.bfloat16 else 0.0
  trainer = _log_softmax(base + jitter)
  sampled = base + setting.mismatch * rng.normal(size=base.shape)
  if setting.bfloat16:
    sampled = _rounded(sampled + 0.01 * rng.normal(size=base.shape))
  sampler = _truncate(_log_softmax(sampled / setting.temperature), setting.top_p)
  current = _log_softmax(base + setting.drift * rng.normal(size=base.shape))

  prompts = setting.responses // setting.group
  shape = (prompts, setting.group, setting.length)
  lengths = rng.integers(max(setting.length // 4, 2), setting.length + 1, shape[:2])
  mask = np.arange(setting.length) < lengths[..., None]
  if setting.tools and setting.length >= 64:
    starts = rng.integers(0, lengths[..., None])
    output = np.abs(np.arange(setting.length) - starts - 12) < 8
    mask &= ~(output & (rng.random((*shape[:2], 1)) < 0.5))
  mask[rng.random(shape[:2]) < setting.empty] = False
  states = rng.integers(STATES, size=shape)
  # By the inverse of the cumulative distribution; a row's last entry may round below 1.
  cumulative = np.cumsum(np.exp(sampler.astype(np.float64)), axis=-1)
  cumulative[:, -1] = 2
  draws = rng.random(shape)
  tokens = np.sum(cumulative[states[mask]] < draws[mask][:, None], axis=-1)

  def read(table: np.ndarray) -> np.ndarray:
    logs = np.zeros(shape, np.float32)
    logs[mask] = table[states[mask], tokens]
    return logs

  success = rng.beta(*setting.solvable, (prompts, 1))
  rewards = rng.random(shape[:2]) < success
  if setting.real:
    rewards = np.clip(success + 0.3 * rng.normal(size=shape[:2]), 0, 1)
  ref = None
  if setting.ref_drift is not None:
    ref = read(_log_softmax(base + setting.ref_drift * rng.normal(size=base.shape)))
  return Batch(
    objective=_objective(setting.preset, setting.length),
    rewards=rewards.astype(np.float32),
    mask=mask,
    log_probs=read(current),
    old_log_probs=read(trainer) if setting.with_old else None,
    sampler_log_probs=read(sampler) if setting.with_sampler else None,
    ref_log_probs=ref,
  )


@jax.jit
def _prepare(objective: gpo.Objective, rewards: np.ndarray, mask: np.ndarray) -> gpo.Rollout:
  return objective.prepare(rewards, mask)


@functools.cache
def _logits(policy: str) -> np.ndarray:
  rng = np.random.default_rng(0)
  spread, variation = POLICIES[policy]
  spreads = spread * np.exp(variation * rng.normal(size=(STATES, 1)))
  return spreads * rng.normal(size=(STATES, VOCABULARY))


@functools.cache
def _objective(preset: str, length: int) -> gpo.Objective:
  return PRESETS[preset](**({"length": length} if preset == "dr_grpo" else {}))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  """In float32, in which near-certain tokens have log-probability 0."""
  logits = (logits - logits.max(-1, keepdims=True)).astype(np.float32)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _rounded(x: np.ndarray) -> np.ndarray:
  return x.astype(jnp.bfloat16).astype(np.float64)


def _truncate(log_probs: np.ndarray, top_p: float) -> np.ndarray:
  """Keeps the smallest set of most likely tokens that holds `top_p`."""
  if top_p >= 1:
    return log_probs
  probs = np.exp(log_probs)
  order = np.argsort(-probs, axis=-1)
  ordered = np.take_along_axis(probs, order, axis=-1)
  before = np.cumsum(ordered, axis=-1) - ordered
  kept = np.zeros(probs.shape, bool)
  np.put_along_axis(kept, order, before < top_p, axis=-1)
  return _log_softmax(np.where(kept, log_probs, -1e3))


# --- sabotages: by name, the finding that names it and the batches that have it -----------------


def _edit(change: Callable[[Batch, np.random.Generator], None]) -> Callable[..., Batch]:
  def sabotaged(setting: Setting, seed: int) -> Batch:
    batch = make(setting, seed)
    change(batch, np.random.default_rng(seed + 1))
    return batch

  return sabotaged


def _set(**fields: Any) -> Callable[..., Batch]:
  return lambda setting, seed: make(dataclasses.replace(setting, **fields), seed)


def _roll(name: str, by: int) -> Callable[..., Batch]:
  def change(batch, rng):
    setattr(batch, name, np.roll(getattr(batch, name), by, axis=-1))

  return _edit(change)


def _fill(value: float, share: float) -> Callable[..., Batch]:
  def change(batch, rng):
    logs = batch.sampler_log_probs
    logs[batch.mask & (rng.random(logs.shape) < share)] = value

  return _edit(change)


def _old_at_temperature(temperature: float) -> Callable[..., Batch]:
  def sabotaged(setting, seed):
    sampled = dataclasses.replace(setting, temperature=temperature, bfloat16=False)
    batch = make(sampled, seed)
    batch.old_log_probs, batch.sampler_log_probs = batch.sampler_log_probs, None
    return batch

  return sabotaged


def _clipping_off(setting: Setting, seed: int) -> Batch:
  batch = make(dataclasses.replace(setting, drift=0.3), seed)
  batch.old_log_probs = batch.log_probs.copy()
  return batch


def _dead(batch, rng):
  dead = rng.random((len(batch.rewards), 1)) < 0.85
  batch.rewards = np.where(dead, batch.rewards[:, :1], batch.rewards)


def _long_is_good(batch, rng):
  lengths = batch.mask.sum(-1)
  z = (lengths - lengths.mean()) / lengths.std()
  batch.rewards = (0.8 * z + 0.6 * rng.normal(size=z.shape) > 0).astype(np.float32)


def _reference_moves(setting: Setting, seed: int) -> Batch:
  batch = make(dataclasses.replace(setting, drift=0.3), seed)
  batch.ref_log_probs = batch.log_probs.copy()
  return batch


def _prompts_count(batch, rng):
  """Puts eight prompt tokens, of log-probability 0, before each response, and counts them."""
  pad = lambda x, value: np.concatenate([np.full_like(x[..., :8], value), x], axis=-1)  # noqa: E731
  batch.mask = pad(batch.mask, True)
  for name in LOGS:
    if getattr(batch, name) is not None:
      setattr(batch, name, pad(getattr(batch, name), 0))


def _padding_counts(batch, rng):
  batch.mask = np.ones_like(batch.mask)


def _mean_of_means(batch, rng):
  parts = np.array_split(np.arange(len(batch.rewards)), 4)
  weights = [np.asarray(batch.objective.weighting(batch.mask[part], None)) for part in parts]
  batch.changes["weights"] = np.concatenate(weights) / 4


def _rewards_are_advantages(batch, rng):
  batch.changes["advantages"] = batch.rewards


def _transposed(batch, rng):
  """The advantages of a sampler that returns sample by sample what is scored prompt by prompt."""
  advantages = np.asarray(batch.prepare().advantages)[..., 0]
  batch.changes["advantages"] = advantages.reshape(advantages.shape[::-1]).T.copy()


def _far(batch, rng):
  batch.old_log_probs[batch.mask & (rng.random(batch.mask.shape) < 0.01)] = -45.0


class Sabotage(NamedTuple):
  """A fault.

  Attributes:
    finding: the name that it should get.
    make: makes a batch that has it, from a setting and a seed.
    setting: what the batch needs to be able to show it.
  """

  finding: str
  make: Callable[[Setting, int], Batch]
  setting: Mapping[str, Any] = types.MappingProxyType({})


_LONG = {"responses": 64, "length": 512, "group": 16, "policy": "typical"}
_MANY = {"responses": 512, "length": 128, "group": 8}

SABOTAGES = {
  "old log-probabilities one position late": Sabotage("shifted", _roll("old_log_probs", 1)),
  "sampler's one position early": Sabotage("shifted", _roll("sampler_log_probs", -1)),
  "reference's one position late": Sabotage("shifted", _roll("ref_log_probs", 1)),
  "sampled at temperature 0.7": Sabotage("temperature", _set(temperature=0.7)),
  "sampled at temperature 0.9": Sabotage("temperature", _set(temperature=0.9)),
  "sampled at temperature 1.2": Sabotage("temperature", _set(temperature=1.2)),
  "old at temperature 0.7": Sabotage("temperature", _old_at_temperature(0.7)),
  "top-p 0.9": Sabotage("support", _set(top_p=0.9)),
  "top-p 0.95": Sabotage("support", _set(top_p=0.95)),
  "5% of the sampler's are 0": Sabotage("placeholder", _fill(0.0, 0.05)),
  "1% of the sampler's are NaN": Sabotage("placeholder", _fill(np.nan, 0.01)),
  "the sampler's are -1": Sabotage("placeholder", _fill(-1.0, 1.0)),
  "1% of tokens of old at −45": Sabotage("bounded", _edit(_far)),
  "samples of an old policy": Sabotage("stale", _set(drift=1.5, with_sampler=False)),
  "old recomputed at each step": Sabotage("clipping_off", _clipping_off),
  "sampler in 8 bits": Sabotage("mismatch", _set(mismatch=0.2)),
  "late step of a product of ratios": Sabotage("few_responses", _set(drift=0.5), _LONG),
  "reference moves along": Sabotage("reference", _reference_moves),
  "reference far off": Sabotage("reference", _set(ref_drift=2.0)),
  "prompt counts": Sabotage("mask", _edit(_prompts_count)),
  "padding counts": Sabotage("mask", _edit(_padding_counts)),
  "mean of four means": Sabotage("weights", _edit(_mean_of_means), _MANY | {"preset": "dapo"}),
  "rewards as advantages": Sabotage("advantages", _edit(_rewards_are_advantages)),
  "advantages of other responses": Sabotage("advantages", _edit(_transposed)),
  "85% of groups dead": Sabotage("dead_groups", _edit(_dead), _MANY),
  "longer is better": Sabotage("length_bias", _edit(_long_is_good), _MANY),
}


def sabotaged(name: str, seed: int) -> Batch:
  """Makes a batch with a fault: of 64 responses or more, otherwise as healthy ones are drawn."""
  sabotage = SABOTAGES[name]
  full = {"with_old": True, "with_sampler": True, "ref_drift": 0.1}
  large = [size for size in SIZES if size[0] >= 64]
  size = large[np.random.default_rng(seed).integers(len(large))]
  sized = dict(zip(("responses", "length", "group"), size, strict=True))
  return sabotage.make(draw_setting(seed, **full | sized | sabotage.setting), seed)
