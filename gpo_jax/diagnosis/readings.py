"""Log-probabilities that are something else: of another place, temperature or support."""

import numpy as np

from gpo_jax._numerics import MAX_LOG_RATIO
from gpo_jax.diagnosis.checks import MEASURED, Result, check
from gpo_jax.diagnosis.evidence import POLICIES, TOLERANCE, Evidence, Pair, UnknownError
from gpo_jax.diagnosis.statistics import score


@check(
  "error",
  policies=POLICIES[1:],
  limit="mean |Δ| at a lag of ±1 below 0.7 of that at 0, by 5 standard errors",
  source="a paired t-test over tokens; " + MEASURED,
  remedy="Logits at position t predict token t + 1: take logits[:, :-1] and tokens[:, 1:] in both, "
  "and cut the prompt off at the same place.",
)
def shifted(batch: Evidence, pair: Pair) -> Result:
  """Log-probabilities one position off."""
  means = {}
  for lag in (-1, 0, 1):
    apart = pair.apart(lag)
    if np.isnan(apart).all():
      raise UnknownError("no two neighbouring tokens")
    means[lag] = float(np.nanmean(apart))
  numbers = {f"mean |Δ| at lag {lag:+d}": mean for lag, mean in means.items()}
  if not (lag := pair.lag()):
    return numbers, ""
  side, where = ("early", "on") if lag > 0 else ("late", "back")
  return numbers, (
    f"{pair.name} are one position {side}: on average {means[0]:.2g} nats from {pair.base} at the "
    f"same position, {means[lag]:.2g} one position {where}"
  )


@check(
  "error",
  limit="any NaN, infinite or positive value; 0 at more than 1 token in 1,000, or another constant "
  "at more than 1 in 20, 0.5 nats from another policy",
  source="a log-probability is finite and at most 0; " + MEASURED,
  remedy="Ask the engine for the sampled token's log-probability at every position. Where it has "
  "none, put the trainer's there (old_log_probs, or log_probs): the token's weight is then 1.",
)
def placeholder(batch: Evidence) -> Result:
  """Values in place of log-probabilities."""
  numbers, texts = {}, []
  for name, logs in batch.logs.items():
    finite = np.isfinite(logs)
    kinds = {
      "NaN": np.sum(np.isnan(logs)),
      "infinite": np.sum(np.isinf(logs)),
      "positive": np.sum(logs[finite] > TOLERANCE),
    }
    if name in batch.constants:
      value, count = batch.constants[name]
      kinds[f"exactly {value:g}"] = count
    numbers |= {f"{name} {kind}": float(count) for kind, count in kinds.items()}
    texts += [f"{name} is {k} at {n:,} of {logs.size:,} tokens" for k, n in kinds.items() if n]
  return numbers, "; ".join(texts)


@check(
  "error",
  policies=("old_log_probs", "sampler_log_probs"),
  explained_by=("shifted",),
  limit="mean(π/μ) below 0.998 by 5 standard errors, with log μ − log π of one sign: at its 5% "
  "quantile not below −0.3 times its 95% quantile",
  source="E_μ[π/μ] is the mass that π has on μ's support, 1 if that is all; " + MEASURED,
  remedy="Sample with top_p=1 and top_k off, or pass the ids that the sampler kept as support= to "
  "token_log_probs, or linear_token_log_probs.",
)
def support(batch: Evidence, pair: Pair) -> Result:
  """The sampler renormalised over a part of the vocabulary."""
  ratio = np.exp(np.clip(-pair.difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
  low, high = np.quantile(pair.difference, [0.05, 0.95])
  numbers = {
    "mass kept": float(np.mean(ratio)),
    "standard errors": score(1 - ratio),
    "5% quantile of Δ": float(low),
    "95% quantile of Δ": float(high),
  }
  cut = np.mean(ratio) < 0.998 and score(1 - ratio) > 5 and -low < 0.3 * high
  text = (
    f"{pair.name} are renormalised over a part of the vocabulary that holds "
    f"{np.mean(ratio):.1%} of the probability: they are above {pair.base}, hardly ever below"
  )
  return numbers, text if cut else ""


@check(
  "error",
  policies=("old_log_probs", "sampler_log_probs"),
  explained_by=("shifted", "support"),
  limit="Δ of one sign at 90% of the tokens that both find likelier than 1/2, or spreads that "
  "differ by 4% while 6% of Δ is explained by either policy; by 5 standard errors; an implied "
  "temperature more than 5% from 1, on that side",
  source="the sign test, as temperature moves all likely tokens one way; the Pitman–Morgan test of "
  "equal variances; " + MEASURED,
  remedy="Pass the sampler's temperature to whatever computes the trainer's log-probabilities: "
  "token_log_probs(…, temperature=), Head(…, temperature=). Engines may report log-probabilities "
  "before or after temperature: find out which. Many steps on a batch may also sharpen the policy.",
)
def temperature(batch: Evidence, pair: Pair) -> Result:
  """One policy is the other at another temperature."""
  pair = pair.where(np.abs(pair.difference) < MAX_LOG_RATIO)
  if not (np.unique(pair.values).size > 1 < np.unique(pair.base_values).size):
    raise UnknownError("all log-probabilities are the same")
  values, base = pair.values - pair.values.mean(), pair.base_values - pair.base_values.mean()
  apart = values - base
  if not apart.any():
    return {"spread": 1.0}, ""
  spread = float(np.std(values) / np.std(base))
  # Training moves π against its own log-probability or the sampler's; temperature against both.
  explained = min(np.corrcoef(apart, x)[0, 1] ** 2 for x in (values, base))
  standard = score(values**2 - base**2)
  likely = np.minimum(pair.values, pair.base_values) > np.log(0.5)
  signs = np.sign(pair.difference[likely & (np.abs(pair.difference) > 1e-3)])
  one_way = abs(signs.sum()) > max(5 * np.sqrt(signs.size), 0.8 * signs.size)
  spreads = abs(np.log(spread)) > 0.04 and abs(standard) > 5 and explained > 0.06
  numbers = {"spread": spread, "standard errors": standard, "explained": float(explained)}
  if signs.size:
    numbers["likely tokens made likelier"] = float(np.mean(signs > 0))
  if not (one_way or spreads):
    return numbers, ""
  numbers["temperature"] = implied = _temperature(pair)
  sharper = signs.sum() > 0 if one_way else spread > 1
  if not (implied < np.inf and abs(np.log(implied)) > 0.05 and (implied < 1) == sharper):
    return numbers, ""
  return numbers, (
    f"{pair.name} are those of temperature {implied:.2f} where {pair.base} are at 1: likely tokens "
    f"are {'likelier' if sharper else 'less likely'}, all others the reverse"
  )


def _temperature(pair: Pair) -> float:
  """Estimates T in log q = log p / T − log Z, from tokens sampled from q or from p.

  If they are from q, E[1 − p/q] = 0 in every state, whatever its Z. So with x = log p and
  Δ = log q − log p, E[Δ (1 − p/q)] = (1/T − 1) E[x (1 − p/q)]; likewise with q/p if they are from
  p. The right one of the two has a mean ratio of 1, the other a larger one.
  """
  ratios = [np.exp(np.clip(sign * pair.difference, -5, 5)) for sign in (-1, 1)]
  instrument = 1 - min(ratios, key=np.mean)
  moved, scale = np.mean(pair.difference * instrument), np.mean(pair.base_values * instrument)
  inverse = 1 + moved / scale if scale else 0.0
  return float(1 / inverse) if inverse > 0 else np.inf
