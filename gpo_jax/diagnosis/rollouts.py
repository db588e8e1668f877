"""Mask, weights and advantages that are not what they should be."""

import numpy as np

from gpo_jax.diagnosis.checks import Result, check
from gpo_jax.diagnosis.evidence import Evidence, UnknownError
from gpo_jax.diagnosis.statistics import (
  centered,
  groups_that_differ,
  largest_spread,
  score,
  share_at_least,
)


@check(
  "warning",
  limit="more than 10% of the rows empty; log-probabilities of exactly 0 at the five tokens of one "
  "end, in a share of the responses larger by 0.25 than that of such tokens elsewhere; holes of 1 "
  "or 2 tokens in a fifth of the responses",
  remedy="Count sampled tokens only, up to and with the end token: no prompt, no padding, no tool "
  "output. Build the mask from lengths, not by comparing ids with the padding token.",
)
def mask(batch: Evidence) -> Result:
  """A mask that counts what was not sampled, or leaves out what was."""
  size, lengths, texts = batch.group.size, batch.lengths, []
  zero = np.all([x == 0 for x in batch.logs.values()], axis=0)
  rank = np.arange(zero.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  edges, elsewhere = {}, {}
  for end, distance in {"start": rank, "end": lengths[batch.response] - 1 - rank}.items():
    near = distance < 5
    edges[end] = int(np.sum((batch.total(zero & near) == 5) & (lengths > 5)))
    elsewhere[end] = np.sum(zero & ~near) / max(np.sum(~near), 1)
  gaps = np.diff(batch.column) - 1
  inside = (np.diff(batch.response) == 0) & (gaps > 0)
  holed = np.unique(batch.response[1:][inside & (gaps <= 2)]).size
  numbers = {
    "empty rows": batch.empty / batch.rows,
    "zeros at the start": edges["start"] / size,
    "zeros at the end": edges["end"] / size,
    "responses with small holes": holed / size,
    "tokens of log-probability 0": float(np.mean(zero)),
  }
  if share_at_least(batch.empty, batch.rows) > 0.1:
    texts.append(f"{batch.empty:,} of {batch.rows:,} rows have no active token")
  for end, count in edges.items():
    if share_at_least(count, size) > 0.25 + elsewhere[end]:
      texts.append(
        f"{count:,} of {size:,} responses {end} with active tokens whose log-probability is "
        f"exactly 0, as {'prompts have' if end == 'start' else 'padding has'}"
      )
  if share_at_least(holed, size) > 0.2:
    texts.append(f"{holed:,} of {size:,} responses have holes of one or two tokens")
  return numbers, "; ".join(texts)


@check(
  "warning",
  limit="a weight per token or per response that varies by 1e-3 otherwise than by group",
  source="the definitions of weightings: equal for tokens, or shared equally within responses",
  remedy="Call prepare once, over the data of one optimizer step, and slice the rollout. Weights "
  "of microbatches, prepared apart and averaged, are a mean of means.",
)
def weights(batch: Evidence) -> Result:
  """Weights that belong to no weighting of the whole batch."""
  w = batch.weights
  if not np.isfinite(w).all() or (w < 0).any():
    return {}, "weights are negative or not finite"
  if not w.any():
    return {}, "all weights are 0: nothing is learnt"
  mean = batch.mean(w)
  if np.any((w == 0) & (mean[batch.response] > 0)):
    share = np.mean((w == 0) & (mean[batch.response] > 0))
    return {"tokens of weight 0": float(share)}, (
      f"{share:.1%} of the tokens are active and weigh 0, unlike others of their response: the "
      "weights belong to another mask"
    )
  if np.max(np.abs(w - mean[batch.response]) / np.maximum(mean[batch.response], 1e-30)) > 1e-3:
    raise UnknownError("weights differ inside responses: a weighting of your own")
  kept = mean > 0
  kinds = {"per token": mean[kept], "per response": (mean * batch.lengths)[kept]}
  numbers = {f"spread {kind}": float(np.ptp(x) / np.max(x)) for kind, x in kinds.items()}
  numbers["sum"] = float(np.sum(w))
  group = batch.group[kept]
  whole = any(largest_spread(x, np.zeros_like(group)) < 1e-3 for x in kinds.values())
  # One prompt, one share: equal within a group, whose sum is that of every other.
  shares = np.bincount(group, kinds["per response"])[np.unique(group)]
  by_group = any(largest_spread(x, group) < 1e-3 for x in kinds.values())
  if not whole and not (by_group and np.ptp(shares) < 1e-3 * np.max(shares)):
    return numbers, (
      f"weights vary by {numbers['spread per token']:.0%} over tokens and by "
      f"{numbers['spread per response']:.0%} over responses, as in a mean of means"
    )
  per_response = numbers["spread per response"] < 1e-3 < numbers["spread per token"]
  if per_response and numbers["sum"] > 1.001:
    return numbers, (
      f"weights sum to {numbers['sum']:.3g}, not 1: parts were normalised on their own"
    )
  return numbers, ""


@check(
  "error",
  limit="one sign; mean above half a standard deviation by 5 standard errors; |A| above 10 and the "
  "group's size; a correlation with the rewards below 0.5 in a group, on average",
  source="what the functions of advantages return: mean 0, at most G, increasing in the reward",
  remedy="Compute advantages by prepare(rewards=…), with the samples of one prompt along the last "
  "axis: rewards of [G, P] need .T. Advantages of one sign are meant for advantages.pass_at_k.",
)
def advantages(batch: Evidence) -> Result:
  """Advantages that are not relative to a group."""
  if not np.isfinite(batch.advantages).all():
    return {}, "advantages are not finite"
  values, texts = batch.mean(batch.advantages), []
  if not values.any():
    spread = batch.rewards is not None and groups_that_differ(batch.rewards, batch.group).any()
    return {}, "all advantages are 0, though rewards differ within groups" if spread else ""
  mean, largest, size = float(np.mean(values)), float(np.max(np.abs(values))), values.size
  limit = max(10, np.max(np.bincount(batch.group)))
  numbers = {"mean": mean, "standard deviation": float(np.std(values)), "largest": largest}
  if size > 1 and (np.min(values) >= 0 or np.max(values) <= 0):
    texts.append(
      f"all advantages are {'≥' if mean > 0 else '≤'} 0, so nothing is pushed the other way"
    )
  elif abs(mean) > 0.5 * np.std(values) and abs(score(values)) > 5:
    texts.append(f"advantages have mean {mean:.2g} and standard deviation {np.std(values):.2g}")
  if largest > limit:
    texts.append(f"the largest |A| is {largest:.3g}")
  if batch.rewards is not None and groups_that_differ(batch.rewards, batch.group).any():
    numbers["correlation with the rewards"] = agreement = _agreement(
      values, batch.rewards, batch.group
    )
    if agreement < 0.5:
      texts.append(f"advantages do not follow the rewards: correlation {agreement:.2f} in groups")
  return numbers, "; ".join(texts)


def _agreement(advantages: np.ndarray, rewards: np.ndarray, group: np.ndarray) -> float:
  """Averages the correlation of the two over the groups whose rewards differ."""
  a, r = centered(advantages, group), centered(rewards, group)
  products, *squares = (np.bincount(group, x) for x in (a * r, a * a, r * r))
  scale = np.sqrt(squares[0] * squares[1])
  correlations = products / np.where(scale > 0, scale, 1)
  return float(np.mean(correlations[groups_that_differ(rewards, group)]))


@check(
  "warning",
  limit="more than half of the groups without spread, by 2.6 standard errors",
  source="Wilson's interval; DAPO (arXiv:2503.14476) samples until none is left",
  remedy="Choose prompts that are neither always nor never solved, sample more responses to each, "
  "or leave dead groups out: mask & advantages.informative(rewards)[..., None, None].",
)
def dead_groups(batch: Evidence) -> Result:
  """Groups that teach nothing."""
  groups = np.bincount(batch.group).size
  alive = np.bincount(batch.group[batch.response], batch.advantages != 0, minlength=groups) > 0
  if not alive.any() and batch.rewards is None and "ref_log_probs" in batch.logs:
    raise UnknownError("all advantages are 0 and no rewards given: distillation?")
  dead = groups - int(alive.sum())
  held = np.sum(batch.weights[~alive[batch.group[batch.response]]])
  weight = float(held / np.sum(batch.weights)) if batch.weights.any() else 0.0
  numbers = {"groups": float(groups), "dead": dead / groups, "their weight": weight}
  text = (
    f"{dead:,} of {groups:,} groups have no spread, and hold {weight:.0%} of the weight: the rest "
    "learns that much more slowly"
  )
  return numbers, text if share_at_least(dead, groups) > 0.5 else ""


@check(
  "warning",
  limit="a correlation of advantage and length within groups above 0.4 by 4 standard errors",
  source="the permutation test within groups, by its normal approximation; healthy batches of the "
  "demo reach 0.3",
  remedy="Look at long and short responses by hand: is length rewarded, or are long ones cut off "
  "and scored 0? An overlong penalty, or masking truncated responses, changes the latter.",
)
def length_bias(batch: Evidence) -> Result:
  """Advantages that go with length."""
  a, n = (
    centered(x, batch.group) for x in (batch.mean(batch.advantages), batch.lengths.astype(float))
  )
  sums = [np.bincount(batch.group, x) for x in (a * n, a * a, n * n)]
  variance = np.sum(sums[1] * sums[2] / np.maximum(np.bincount(batch.group) - 1, 1))
  if not variance > 0:
    raise UnknownError("no group in which both advantages and lengths differ")
  correlation = float(np.sum(sums[0]) / np.sqrt(np.sum(sums[1]) * np.sum(sums[2])))
  standard = float(np.sum(sums[0]) / np.sqrt(variance))
  numbers = {"correlation": correlation, "standard errors": standard}
  text = (
    f"{'longer' if correlation > 0 else 'shorter'} responses have the better advantages: "
    f"correlation {correlation:.2f}, {abs(standard):.0f} standard errors from 0"
  )
  return numbers, text if abs(correlation) > 0.4 and abs(standard) > 4 else ""
