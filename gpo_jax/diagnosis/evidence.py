"""A batch on the host, token by token, as the checks see it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from gpo_jax._inputs import as_array, as_ids, check_same_shape
from gpo_jax._padding import validate
from gpo_jax.diagnosis.statistics import score
from gpo_jax.types import Rollout

POLICIES = ("log_probs", "old_log_probs", "sampler_log_probs", "ref_log_probs")
TOLERANCE = 1e-3  # by which rounding may put a log-probability above 0


class UnknownError(Exception):
  """What a finding needs is not in the batch; the message says what is missing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
  """Two policies' log-probabilities of the same N tokens, all of them finite.

  Attributes:
    name: of the rollout's field.
    base: of the field it is compared with.
    values: the field's, `[N]`.
    base_values: the other's, `[N]`.
    response: the response of each token, `[N]`.
    column: its position in its row, `[N]`.
  """

  name: str
  base: str
  values: np.ndarray
  base_values: np.ndarray
  response: np.ndarray
  column: np.ndarray

  @property
  def difference(self) -> np.ndarray:
    """The field's log-probabilities minus the other's."""
    return self.values - self.base_values

  def where(self, kept: np.ndarray) -> "Pair":
    """Keeps these tokens."""
    arrays = self.values, self.base_values, self.response, self.column
    return Pair(self.name, self.base, *(x[kept] for x in arrays))

  def apart(self, lag: int) -> np.ndarray:
    """Computes |values at t − base_values at t + lag|; NaN where the response has no such token."""
    apart = np.full(self.values.size, np.nan)
    if abs(lag) < self.values.size:
      here = slice(max(-lag, 0), self.values.size - max(lag, 0))
      there = slice(max(lag, 0), self.values.size - max(-lag, 0))
      near = self.response[here] == self.response[there]
      near &= self.column[there] - self.column[here] == lag
      apart[here] = np.where(near, np.abs(self.values[here] - self.base_values[there]), np.nan)
    return apart

  def lag(self) -> int:
    """Finds the lag, −1, 0 or 1, at which the two agree.

    ±1 if the mean distance there is below 0.7 of the one at 0, by five standard errors of the
    paired difference.
    """
    for lag in (-1, 1):
      there = self.apart(lag)
      near = ~np.isnan(there)
      here, there = self.apart(0)[near], there[near]
      if here.size > 7 and np.mean(there) < 0.7 * np.mean(here) and score(here - there) > 5:
        return lag
    return 0


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
  """The N active tokens of a batch, sorted by response, and its R responses that have some.

  Attributes:
    logs: log-probabilities by the name of their field, `[N]`.
    usable: whether each is a log-probability, by name, `[N]` bools.
    constants: values that stand in place of log-probabilities, by name: the value and how often.
    response: the response of each token, `[N]` integers below R.
    column: its position in its row, `[N]`.
    advantages: `[N]`.
    weights: `[N]`.
    group: the group of each response, `[R]` integers.
    rewards: of each response, `[R]`; None if not given.
    rows: rows of the mask.
    empty: how many of them have no active token.
  """

  logs: dict[str, np.ndarray]
  usable: dict[str, np.ndarray]
  constants: dict[str, tuple[float, int]]
  response: np.ndarray
  column: np.ndarray
  advantages: np.ndarray
  weights: np.ndarray
  group: np.ndarray
  rewards: np.ndarray | None
  rows: int
  empty: int

  @property
  def lengths(self) -> np.ndarray:
    """Tokens per response, `[R]`."""
    return np.bincount(self.response, minlength=self.group.size)

  def total(self, x: np.ndarray) -> np.ndarray:
    """Sums tokens over responses, `[N]` to `[R]`."""
    return np.bincount(self.response, x, minlength=self.group.size)

  def mean(self, x: np.ndarray) -> np.ndarray:
    """Averages tokens over responses, `[N]` to `[R]`."""
    return self.total(x) / self.lengths

  def pair(self, name: str, base: str = "log_probs") -> Pair:
    """Compares a field with another, at the tokens where both are log-probabilities."""
    for missing in (name, base):
      if missing not in self.logs:
        raise UnknownError(f"no {missing}")
    both = self.usable[name] & self.usable[base]
    if not both.any():
      raise UnknownError(f"{name} and {base} have no token in common")
    pair = Pair(name, base, self.logs[name], self.logs[base], self.response, self.column)
    return pair.where(both)

  def behaviour(self) -> str:
    """Names the field closest to the policy that the tokens were drawn from."""
    for name in ("sampler_log_probs", "old_log_probs"):
      if name in self.logs:
        return name
    raise UnknownError("no old_log_probs or sampler_log_probs")


def gather(
  log_probs: Any, rollout: Rollout, rewards: Any = None, group_ids: Any = None
) -> Evidence:
  """Brings a batch to the host and sorts its tokens by response."""
  given = jax.tree.leaves((log_probs, rollout, rewards, group_ids))
  if any(isinstance(x, jax.core.Tracer) for x in given):
    raise ValueError("diagnose needs concrete arrays; got traced ones: call it outside of jax.jit")
  rollout = validate(rollout)
  log_probs = as_array("log_probs", log_probs)
  check_same_shape(mask=rollout.mask, log_probs=log_probs)
  mask = _rows(rollout.mask, bool)
  row, column = np.nonzero(mask)
  if not row.size:
    raise ValueError("diagnose needs a batch with a token; got a mask of zeros")
  packed = rollout.segment_ids is not None
  segment = _rows(rollout.segment_ids, int)[mask] if packed else np.ones_like(row)
  keys, response = np.unique(np.stack([row, segment]), axis=1, return_inverse=True)
  places, order = (keys[0], keys[1] - 1), np.argsort(response.reshape(-1), kind="stable")

  def tokens(x: Any) -> np.ndarray:
    return _rows(x)[mask][order]

  logs = {name: getattr(rollout, name, log_probs) for name in POLICIES}
  logs = {name: tokens(x) for name, x in logs.items() if x is not None}
  if rewards is not None:
    rewards = _of_responses("rewards", as_array("rewards", rewards), rollout, places)
  batch = Evidence(
    logs=logs,
    usable={name: np.isfinite(x) & (x <= TOLERANCE) for name, x in logs.items()},
    constants={},
    response=response.reshape(-1)[order],
    column=column[order],
    advantages=tokens(np.broadcast_to(np.asarray(rollout.advantages), rollout.mask.shape)),
    weights=tokens(rollout.weights),
    group=_number_groups(group_ids, rollout, places),
    rewards=rewards,
    rows=len(mask),
    empty=int(np.sum(~mask.any(-1))),
  )
  _find_constants(batch)
  return batch


def _number_groups(group_ids: Any, rollout: Rollout, places: tuple) -> np.ndarray:
  """Numbers the group of each response from 0."""
  if group_ids is not None:
    remedy = "pass the group_ids that prepare got"
    groups = _of_responses("group_ids", as_ids("group_ids", group_ids, remedy), rollout, places)
  else:  # of a row in packed rows, of the axis before the tokens in others
    packed = rollout.segment_ids is not None
    samples = 1 if packed or rollout.mask.ndim < 2 else rollout.mask.shape[-2]
    groups = places[0] // samples
  return np.unique(groups, return_inverse=True)[1].reshape(-1)


def _find_constants(batch: Evidence) -> None:
  """Takes constants that stand in place of log-probabilities out of what is usable.

  A value counts if it is repeated where another policy is more than 0.5 nats from it: any value at
  more than 1 token in 20; then 0, which near-certain tokens have, at more than 1 in 1,000. Two
  policies one position apart disagree everywhere, which is another finding.
  """
  first = next((name for name in POLICIES[1:] if name in batch.logs), "")
  partners = {name: first if name == "log_probs" else "log_probs" for name in batch.logs}
  for least, only_zero in ((0.05, False), (1e-3, True)):
    for name, partner in partners.items():
      if not partner or not (usable := batch.usable[name] & batch.usable[partner]).any():
        continue
      logs, other = batch.logs[name], batch.logs[partner]
      values, counts = np.unique(logs[usable], return_counts=True)
      value = 0.0 if only_zero else float(values[np.argmax(counts)])
      same = batch.usable[name] & (logs == value)
      apart = same & usable & (np.abs(other - value) > 0.5)
      if apart.sum() > max(1, least * usable.size) and batch.pair(name, partner).lag() == 0:
        bad = apart if only_zero else same
        batch.constants[name] = value, int(bad.sum())
        batch.usable[name] &= ~bad


def _rows(x: Any, dtype: Any = np.float64) -> np.ndarray:
  return np.asarray(x).astype(dtype).reshape(-1, np.shape(x)[-1])


def _of_responses(name: str, values: Any, rollout: Rollout, places: tuple) -> np.ndarray:
  """Looks up one value for each response: that of its row, or of its segment at s − 1."""
  packed, rows = rollout.segment_ids is not None, rollout.mask.shape[:-1]
  shape = values.shape[:-1] if packed else values.shape
  if shape != rows or (packed and not ((places[1] >= 0) & (places[1] < values.shape[-1])).all()):
    expected = f"[{', '.join(map(str, rows))}{', S' if packed else ''}]"
    raise ValueError(
      f"{name} must have one value per response, {expected}; got {list(values.shape)}: pass what "
      "prepare got; several kinds of reward summed"
    )
  flat = np.asarray(values)
  return flat.reshape(-1, flat.shape[-1])[places] if packed else flat.reshape(-1)[places[0]]
