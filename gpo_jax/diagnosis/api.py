"""`diagnose`: runs the checks, causes before consequences."""

from typing import Any

from gpo_jax.diagnosis import distances, readings, rollouts
from gpo_jax.diagnosis.checks import Check
from gpo_jax.diagnosis.evidence import UnknownError, gather
from gpo_jax.diagnosis.report import Diagnosis, Finding
from gpo_jax.types import Rollout

CHECKS: tuple[Check, ...] = (
  readings.shifted,
  readings.placeholder,
  readings.support,
  readings.temperature,
  distances.bounded,
  distances.stale,
  distances.clipping_off,
  distances.mismatch,
  distances.few_responses,
  distances.reference,
  rollouts.mask,
  rollouts.weights,
  rollouts.advantages,
  rollouts.dead_groups,
  rollouts.length_bias,
)


def diagnose(
  log_probs: Any, rollout: Rollout, rewards: Any = None, *, group_ids: Any = None
) -> Diagnosis:
  """Examines one batch for what makes runs fail silently.

  On the host, from concrete arrays, with whatever fields the rollout has, packed or not; call it on
  the first batch of a run, and on one when something looks wrong. Limits take the size of the batch
  into account: of healthy batches fewer than 1 in 100 have a finding.

  - `shifted`: log-probabilities are one position off.
  - `placeholder`: NaN, infinite, positive, or a constant in place of a log-probability.
  - `support`: the sampler renormalised over top-k or top-p.
  - `temperature`: one policy is the other at another temperature, which it estimates.
  - `bounded`: log-ratios at the bound of ±20.
  - `stale`: the policy has left the one that sampled.
  - `clipping_off`: old log-probabilities equal the current ones, the samples are of another policy.
  - `mismatch`: sampler and trainer disagree beyond what precision explains.
  - `few_responses`: few responses carry all of the weight of response-level ratios.
  - `reference`: the reference moves along with the policy, or is far off.
  - `mask`: it counts prompts or padding, or has empty rows or holes.
  - `weights`: not those of one weighting over the whole batch.
  - `advantages`: not centred, huge, constant, or not those of these rewards.
  - `dead_groups`: most groups teach nothing.
  - `length_bias`: advantages go with length.

  Args:
    log_probs: log π of the sampled tokens, as passed to the objective, `[..., G, T]`.
    rollout: from `prepare`, or made by hand; the whole batch of a step.
    rewards: as passed to `prepare`, `[..., G]`, or `[..., S]` for packed rows; several kinds of
      reward summed.
    group_ids: as passed to `prepare`.

  Returns:
    A `Diagnosis`.

  Raises:
    ValueError: for traced arrays, shapes that do not fit, and a batch without a token.

  Example:
    >>> import numpy as np
    >>> import gpo_jax as gpo
    >>> rng = np.random.default_rng(0)
    >>> log_probs = -rng.exponential(size=(8, 8, 32)).astype(np.float32)
    >>> old_log_probs = np.roll(log_probs, 1, axis=-1)  # a mistake
    >>> rewards = rng.random((8, 8)) < 0.5
    >>> rollout = gpo.grpo(beta=None).prepare(rewards, np.ones((8, 8, 32)), old_log_probs)
    >>> for finding in gpo.diagnose(log_probs, rollout, rewards).findings:
    ...   print(finding.name, "|", finding.evidence)
    shifted | old_log_probs are one position late: ...
  """
  batch = gather(log_probs, rollout, rewards, group_ids)
  found, table, examined, unexamined = [], [], [], {}
  blamed: dict[str, set[str]] = {}  # the fields that a finding is about, by its name
  for check in CHECKS:
    reasons = []
    for field in check.policies or ("",):
      try:
        numbers, text = check.function(*([batch, batch.pair(field)] if field else [batch]))
      except UnknownError as unknown:
        reasons.append(str(unknown))
        continue
      table += [(check.name, field, statistic, value) for statistic, value in numbers.items()]
      if text and (cause := _cause(check, field, blamed)):
        reasons.append(f"{cause} explains it")
      elif text:
        blamed.setdefault(check.name, set()).add(field)
        found.append(Finding(check.name, check.severity, text, *check[2:5]))
    if len(reasons) < len(check.policies or ("",)):
      examined.append(check.name)
    else:
      unexamined[check.name] = ", ".join(reasons)
  found.sort(key=lambda finding: finding.severity)
  return Diagnosis(tuple(found), tuple(examined), unexamined, tuple(table), batch)


def _cause(check: Check, field: str, blamed: dict[str, set[str]]) -> str:
  """Finds an earlier finding that explains this one."""
  for cause in check.explained_by:
    # A check of the whole batch is about the policies that sampled, not about the reference.
    about = blamed.get(cause, set())
    if field in about if field else about - {"ref_log_probs"}:
      return cause
  return ""
