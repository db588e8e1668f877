"""Policies that are too far apart, or too close."""

import numpy as np

from gpo_jax._numerics import MAX_LOG_RATIO
from gpo_jax.diagnosis.checks import Result, check
from gpo_jax.diagnosis.evidence import POLICIES, Evidence, Pair, UnknownError
from gpo_jax.diagnosis.statistics import beyond_precision, effective_share, error


@check(
  "error",
  limit=f"|log π − log π_old| or |log π − log π_ref| of {MAX_LOG_RATIO:g} at any token",
  source="ratios beyond e^±20 are bounded before they are used",
  remedy="Look at these tokens: a token id outside of the vocabulary, a value such as -1e9 for a "
  "masked logit, or log-probabilities of another response.",
)
def bounded(batch: Evidence) -> Result:
  """Tokens whose log-ratio is at the bound."""
  numbers, texts = {}, []
  for name in ("old_log_probs", "ref_log_probs"):
    if name in batch.logs:
      far = int(np.sum(np.abs(batch.pair(name).difference) >= MAX_LOG_RATIO))
      numbers[f"{name} at the bound"] = float(far)
      if far:
        texts.append(f"{far:,} tokens of {name} are 20 nats or more from log_probs")
  if not numbers:
    raise UnknownError("no old_log_probs or ref_log_probs")
  return numbers, "; ".join(texts)


_AFTER = ("shifted", "temperature", "support")


@check(
  "warning",
  explained_by=_AFTER,
  limit="KL above 0.1 nats per token, by 3 standard errors, or an effective sample size below 0.3 "
  "of 100 tokens or more",
  source="verl's guide to rollout correction: KL at most 0.1, effective sample size at least 0.3, "
  "χ² at most 1",
  remedy="Take fewer steps on a batch or sample more often; a smaller learning rate; a correction, "
  "such as corrections.truncate_importance, or off_policy_sequence_mask.",
)
def stale(batch: Evidence) -> Result:
  """The policy has left the one that sampled."""
  name = batch.behaviour()
  pair = batch.pair(name)
  log_ratio = np.clip(-pair.difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
  of_token = np.expm1(log_ratio) - log_ratio
  effective = effective_share(log_ratio)
  spreads = np.std(pair.values) * np.std(pair.base_values)
  covariance = np.mean((pair.values - pair.values.mean()) * pair.base_values)
  numbers = {
    "KL per token": float(np.mean(of_token)),
    "KL per response": float(-np.sum(log_ratio) / batch.group.size),
    "χ² of tokens": float(np.mean(np.exp(2 * log_ratio)) - 1),
    "effective sample size of tokens": effective,
    "correlation": float(covariance / spreads) if spreads else 0.0,
  }
  far = np.mean(of_token) - 3 * error(of_token) > 0.1
  text = (
    f"log_probs have left {name}: KL {np.mean(of_token):.2g} nats per token, effective sample size "
    f"{effective:.0%} of {log_ratio.size:,} tokens, χ² {numbers['χ² of tokens']:.2g}"
  )
  if numbers["correlation"] < 0.5:
    text += (
      f"; they hardly go together (correlation {numbers['correlation']:.2f}): rows or tokens in "
      "another order?"
    )
  return numbers, text if far or (effective < 0.3 and log_ratio.size >= 100) else ""


@check(
  "warning",
  explained_by=_AFTER,
  limit="old_log_probs equal to log_probs, the sampler's beyond what precision explains",
  source="a ratio of exactly 1 cannot be clipped",
  remedy="Compute old_log_probs once per batch, before its first step, not in each step. If this "
  "is the first step, the samples are of older weights, or the sampler differs: give the objective "
  "a correction, or pass the sampler's as old_log_probs.",
)
def clipping_off(batch: Evidence) -> Result:
  """The ratio is 1 everywhere though the samples are of another policy."""
  sampler = batch.pair("sampler_log_probs").difference
  old = np.zeros(1)
  if "old_log_probs" in batch.logs:
    old = batch.pair("old_log_probs").difference
  distance, beyond = beyond_precision(sampler)
  numbers = {"largest |log π − log π_old|": float(np.max(np.abs(old)))}
  numbers["mean(e^|Δ|) − 1 of the sampler"] = distance
  text = (
    "old_log_probs equal log_probs, so nothing can be clipped, while sampler_log_probs are "
    f"{distance:.0%} away in probability"
  )
  return numbers, text if beyond and np.max(np.abs(old)) < 1e-6 else ""


@check(
  "warning",
  explained_by=_AFTER,
  limit="mean(e^|Δ|) − 1 above 0.05, with |Δ| = |log π_old − log μ| up to 1, by 3 standard errors",
  source="NeMo-RL's guide expects token_mult_prob_error within 0.01 – 0.02, as we measure for "
  "bfloat16 logits",
  remedy="Compare precisions (float32 logits, 8-bit weights), kernels, expert routing and weight "
  "versions of the two engines; a correction such as corrections.mask_importance limits the harm.",
)
def mismatch(batch: Evidence) -> Result:
  """Sampler and trainer disagree about the same weights."""
  base = "old_log_probs" if "old_log_probs" in batch.logs else "log_probs"
  pair = batch.pair("sampler_log_probs", base)
  distance, beyond = beyond_precision(pair.difference)
  numbers = {"mean(e^|Δ|) − 1": distance, "largest |Δ|": float(np.max(np.abs(pair.difference)))}
  text = (
    f"sampler_log_probs are {distance:.0%} from {base} in probability, more than precision "
    f"explains; the largest difference is {numbers['largest |Δ|']:.2g} nats"
  )
  return numbers, text if beyond else ""


@check(
  "warning",
  explained_by=(*_AFTER, "stale"),
  limit="an effective sample size of 16 responses or more below 8% of them, or below 1.5",
  remedy="Ratios and weights of whole responses rest on a few of them: use token-level ones, or "
  "levels.sequence, which divides by the length; or take fewer steps on a batch.",
)
def few_responses(batch: Evidence) -> Result:
  """Few responses carry all the weight of response-level ratios."""
  name = batch.behaviour()
  pair = batch.pair(name)
  logs = np.bincount(pair.response, -pair.difference, minlength=batch.group.size)
  effective = effective_share(logs)
  weights = np.exp(logs - logs.max())
  largest = float(np.max(weights) / np.sum(weights))
  numbers = {"effective sample size": effective, "share of the largest": largest}
  few = logs.size >= 16 and effective < max(0.08, 1.5 / logs.size)
  text = (
    f"weighed by Π π/μ over each response, {logs.size:,} responses are worth "
    f"{effective * logs.size:.1f}: the largest has {largest:.0%} of the weight"
  )
  return numbers, text if few else ""


@check(
  "warning",
  policies=("ref_log_probs",),
  explained_by=("shifted",),
  limit="KL(π‖π_ref) above 0.5 nats per token, by 3 standard errors; or exactly 0 while log_probs "
  "have moved beyond precision",
  remedy="Exactly 0: the reference shares the policy's parameters; copy them before training. Far "
  "off: check that it is the right checkpoint, on the right tokens and temperature; else raise "
  "beta, or reset the reference on purpose.",
)
def reference(batch: Evidence, pair: Pair) -> Result:
  """The reference moves along, or is far away."""
  away = -pair.difference
  numbers = {"KL per token": float(np.mean(away)), "largest |Δ|": float(np.max(np.abs(away)))}
  if np.mean(away) - 3 * error(away) > 0.5:
    return numbers, f"log_probs are {np.mean(away):.2g} nats per token from ref_log_probs"
  moved = ""
  if numbers["largest |Δ|"] < 1e-6:
    others = [name for name in POLICIES[1:3] if name in batch.logs]
    moved = next((x for x in others if beyond_precision(batch.pair(x).difference)[1]), "")
  text = f"ref_log_probs equal log_probs, which have moved away from {moved}"
  return numbers, text if moved else ""
