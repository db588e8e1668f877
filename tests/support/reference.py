"""The papers' losses as plain float64 loops, written without the package that they test.

A loss is differentiated in `log_probs`; `frozen` holds the same numbers and stands wherever a paper
stops the gradient. Derivatives are complex steps: no step size, no cancellation, and exact to
rounding. Every comparison that decides a branch goes through `above`, which remembers how far the
two sides were apart: so a test knows which branches it took, and that no input sat on a kink.
"""

import cmath
import collections
import math
from typing import NamedTuple

import numpy as np

# Papers leave these open: the variance's denominator is G − DDOF, EPS is added to the deviation.
DDOF, EPS, BATCH_EPS = 1, 1e-4, 1e-8

BRANCHES = collections.defaultdict(list)


class Batch(NamedTuple):
  rewards: np.ndarray  # [P, G]
  mask: np.ndarray  # [P, G, T]
  old: np.ndarray | None = None  # log π_old; None: the current policy
  ref: np.ndarray | None = None  # log π_ref
  sampler: np.ndarray | None = None  # log μ; None: log π_old


class Token(NamedTuple):
  new: complex  # log π, differentiated
  frozen: float  # log π, not differentiated
  old: float
  ref: float
  sampler: float


class Response(NamedTuple):
  advantage: float
  tokens: list


def gradient(loss, batch, log_probs, **hyperparameters):
  """The loss and its gradient in log_probs; along a last axis, each active token is moved once."""
  value = loss(batch, log_probs, log_probs, **hyperparameters)
  moved = np.repeat(log_probs[..., None].astype(complex), batch.mask.sum(), axis=-1)
  moved[batch.mask] += 1e-30j * np.eye(batch.mask.sum())
  result = np.zeros(log_probs.shape)
  result[batch.mask] = np.imag(loss(batch, moved, log_probs, **hyperparameters)) / 1e-30
  return real(value), result


def real(value):
  """The real part, which every move leaves as it is."""
  return float(np.ravel(value)[0].real) if isinstance(value, np.ndarray) else complex(value).real


def exp(x):
  return np.exp(x) if isinstance(x, np.ndarray) else cmath.exp(x)


def above(what, value, limit, advantage=None):
  """Whether value > limit, remembered under a name, apart for good and bad samples."""
  distance = real(value) - limit
  if advantage is None:
    BRANCHES[what].append(distance)
  elif advantage != 0:
    BRANCHES[f"{what}, A {'>' if advantage > 0 else '<'} 0"].append(distance)
  return distance > 0


def smaller(a, b):
  return a if real(a) <= real(b) else b


def responses(batch, advantages, log_probs, frozen):
  """All responses that have an active token."""
  new, now = (x.tolist() if x.ndim == 3 else x for x in (log_probs, frozen))
  old = now if batch.old is None else batch.old.tolist()
  ref = None if batch.ref is None else batch.ref.tolist()
  sampler = old if batch.sampler is None else batch.sampler.tolist()
  prompts, samples, length = batch.mask.shape
  result = []
  for p in range(prompts):
    for i in range(samples):
      tokens = []
      for t in range(length):
        if batch.mask[p, i, t]:
          log_ref = None if ref is None else ref[p][i][t]
          tokens.append(Token(new[p][i][t], now[p][i][t], old[p][i][t], log_ref, sampler[p][i][t]))
      if tokens:
        result.append(Response(float(advantages[p, i]), tokens))
  return result


# Advantages: the rewards of one group, in a list, to their advantages.


def mean(values):
  total = 0.0
  for value in values:
    total += value
  return total / len(values)


def centered(rewards):
  return [reward - mean(rewards) for reward in rewards]


def standardized(rewards, eps=None):
  square = 0.0
  for reward in rewards:
    square += (reward - mean(rewards)) ** 2
  std = math.sqrt(square / (len(rewards) - DDOF))
  return [(reward - mean(rewards)) / (std + (EPS if eps is None else eps)) for reward in rewards]


def leave_one_out(rewards):
  result = []
  for i, reward in enumerate(rewards):
    others = [other for j, other in enumerate(rewards) if j != i]
    result.append(reward - mean(others))
  return result


def over_mean(rewards):
  if not above("mean reward over 0", mean(rewards), 0):
    return [0.0 for _ in rewards]
  return [(reward - mean(rewards)) / mean(rewards) for reward in rewards]


def present(batch):
  """The samples that count, group by group: those with an active token."""
  prompts, samples, _ = batch.mask.shape
  return [[(p, i) for i in range(samples) if batch.mask[p, i].any()] for p in range(prompts)]


def advantages_of(batch, formula, groups=None):
  """Advantages by group; 0 for responses left out, and where all rewards are equal."""
  result = np.zeros(batch.rewards.shape)
  for group in present(batch) if groups is None else groups:
    rewards = [float(batch.rewards[index]) for index in group]
    if rewards and max(rewards) != min(rewards):
      for index, advantage in zip(group, formula(rewards), strict=True):
        result[index] = advantage
  return result


# What papers share.


def limits(epsilon_low, epsilon_high):
  """1 − ε_low and 1 + ε_high, or ε_low on both sides."""
  return 1 - epsilon_low, 1 + (epsilon_low if epsilon_high is None else epsilon_high)


def clipped(ratio, advantage, low, high):
  """min(ρA, clip(ρ, low, high) A)."""
  bounded = ratio
  if above("ratio over its upper limit", ratio, high, advantage):
    bounded = high
  if not above("ratio over its lower limit", ratio, low, advantage):
    bounded = low
  return smaller(ratio * advantage, bounded * advantage)


def k3(new, ref):
  """r − log r − 1 with r = π_ref/π."""
  return exp(ref - new) - (ref - new) - 1


def ratio_of(token):
  """π/π_old."""
  return exp(token.new - token.old)


def geometric_ratio(tokens):
  """(Π_t π/π_old)^(1/L)."""
  total = 0
  for token in tokens:
    total += token.new - token.old
  return exp(total / len(tokens))


def frozen_response_ratio(tokens):
  """Π_t π/π_old, not differentiated."""
  total = 0
  for token in tokens:
    total += token.frozen - token.old
  return exp(total)


def token_mean(each):
  """1/Σ|o_i| Σ_i Σ_t over lists of token values, one list per response."""
  total, count = 0, 0
  for values in each:
    for value in values:
      total += value
      count += 1
  return total / max(count, 1)


def mean_of_means(each):
  """1/N Σ_i 1/|o_i| Σ_t."""
  total = 0
  for values in each:
    inner = 0
    for value in values:
      inner += value
    total += inner / len(values)
  return total / max(len(each), 1)


def mean_of_sums(each):
  """1/N Σ_i Σ_t."""
  total = 0
  for values in each:
    for value in values:
      total += value
  return total / max(len(each), 1)


# The papers. Every loss is −J.


def gpo(batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=None, beta=0.01):
  """J = mean(min(ρA, clip(ρ)A)) − β mean(ρ(r − log r − 1)), r = π/π_ref, over tokens."""
  surrogates, penalties = [], []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    surrogates.append([])
    penalties.append([])
    for token in tokens:
      surrogates[-1].append(clipped(ratio_of(token), advantage, *limits(epsilon_low, epsilon_high)))
      if beta is not None:
        log_r = token.new - token.ref
        penalties[-1].append(ratio_of(token) * (exp(log_r) - log_r - 1))
  return -token_mean(surrogates) + (0 if beta is None else beta * token_mean(penalties))


def grpo(batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=None, beta=0.04):
  """arXiv:2402.03300, Eq. 3 and 4."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    each.append([])
    for token in tokens:
      value = clipped(ratio_of(token), advantage, *limits(epsilon_low, epsilon_high))
      if beta is not None:
        value -= beta * k3(token.new, token.ref)
      each[-1].append(value)
  return -mean_of_means(each)


def dr_grpo(batch, log_probs, frozen, *, length, epsilon_low=0.2, epsilon_high=None):
  """arXiv:2503.20783: no 1/std, and a constant in the place of 1/|o_i|."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, centered), log_probs, frozen):
    each.append(
      [clipped(ratio_of(t), advantage, *limits(epsilon_low, epsilon_high)) for t in tokens]
    )
  return -mean_of_sums(each) / length


def dapo(batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=0.28):
  """arXiv:2503.14476, Eq. 8."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    low, high = limits(epsilon_low, epsilon_high)
    each.append([clipped(ratio_of(token), advantage, low, high) for token in tokens])
  return -token_mean(each)


def ppo(batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=None):
  """arXiv:1707.06347, Eq. 7, of tokens; advantages are given."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    low, high = limits(epsilon_low, epsilon_high)
    each.append([clipped(ratio_of(token), advantage, low, high) for token in tokens])
  return -token_mean(each)


def distill(batch, log_probs, frozen, *, beta=1.0):
  """arXiv:2306.13649 with the reverse KL, by arXiv:2512.02556, Eq. 7; advantages may be given."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    ratios = [(ratio_of(token), token) for token in tokens]
    each.append([ratio * (advantage - beta * k3(t.new, t.ref)) for ratio, t in ratios])
  return -token_mean(each)


def gspo(batch, log_probs, frozen, *, epsilon_low=3e-4, epsilon_high=4e-4):
  """arXiv:2507.18071, Eq. 5 to 7: J = 1/G Σ_i min(s_i A_i, clip(s_i) A_i)."""
  total, count = 0, 0
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    total += clipped(geometric_ratio(tokens), advantage, *limits(epsilon_low, epsilon_high))
    count += 1
  return -total / max(count, 1)


def gspo_token(batch, log_probs, frozen, *, epsilon_low=3e-4, epsilon_high=4e-4):
  """arXiv:2507.18071, Eq. 13 and 14: s_it = sg(s_i) π/sg(π)."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    ratio = frozen_response_ratio(tokens) ** (1 / len(tokens))
    each.append([])
    for token in tokens:
      moving = ratio * exp(token.new - token.frozen)
      each[-1].append(clipped(moving, advantage, *limits(epsilon_low, epsilon_high)))
  return -mean_of_means(each)


def cispo(batch, log_probs, frozen, *, high=4.0, low=None):
  """arXiv:2506.13585, Eq. 4 and 5: sg(clip(ρ)) A log π."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    each.append([])
    for token in tokens:
      weight = exp(token.frozen - token.old)
      if above("weight over its upper limit", weight, high, advantage):
        weight = high
      if low is not None and not above("weight over its lower limit", weight, low, advantage):
        weight = low
      each[-1].append(weight * advantage * token.new)
  return -token_mean(each)


def sapo(batch, log_probs, frozen, *, temperature_pos=1.0, temperature_neg=1.05):
  """arXiv:2511.20347: f(ρ) = (4/τ) σ(τ(ρ − 1)), τ by the sign of A."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    temperature = temperature_pos if advantage > 0 else temperature_neg
    each.append([])
    for token in tokens:
      sigmoid = 1 / (1 + exp(-temperature * (ratio_of(token) - 1)))
      each[-1].append(4 / temperature * sigmoid * advantage)
  return -mean_of_means(each)


def gmpo(batch, log_probs, frozen, *, epsilon_low=0.4, epsilon_high=None):
  """arXiv:2507.20673: A_i (Π_t of clipped ratios)^(1/|o_i|), clipped in log space."""
  high = epsilon_low if epsilon_high is None else epsilon_high
  total, count = 0, 0
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    sign = 1 if advantage > 0 else -1
    log_sum = 0
    for token in tokens:
      log_ratio = token.new - token.old
      bounded = log_ratio
      if above("log-ratio over its upper limit", log_ratio, high, advantage):
        bounded = high
      if not above("log-ratio over its lower limit", log_ratio, -epsilon_low, advantage):
        bounded = -epsilon_low
      log_sum += sign * smaller(sign * log_ratio, sign * bounded)
    total += advantage * exp(log_sum / len(tokens))
    count += 1
  return -total / max(count, 1)


def rloo(batch, log_probs, frozen):
  """arXiv:2402.14740: 1/k Σ_i (R_i − mean of the others) log π(y_i)."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, leave_one_out), log_probs, frozen):
    each.append([advantage * token.new for token in tokens])
  return -mean_of_sums(each)


def reinforce_plus_plus(batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=None):
  """arXiv:2501.03262: rewards standardised over the batch, PPO's clip, over tokens."""
  everyone = [index for group in present(batch) for index in group]
  advantages = advantages_of(batch, lambda x: standardized(x, BATCH_EPS), [everyone])
  each = []
  for advantage, tokens in responses(batch, advantages, log_probs, frozen):
    each.append(
      [clipped(ratio_of(t), advantage, *limits(epsilon_low, epsilon_high)) for t in tokens]
    )
  return -token_mean(each)


def deepseek_v32(
  batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=None, beta=0.001, threshold=0.5
):
  """arXiv:2512.02556, Eq. 7 to 9: ρ·k3, and a mask of drifted bad responses."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, centered), log_probs, frozen):
    drift = mean([token.sampler - token.frozen for token in tokens])
    keep = 1
    if above("drift over the threshold", drift, threshold, advantage) and advantage < 0:
      keep = 0
    each.append([])
    for token in tokens:
      ratio = ratio_of(token)
      value = keep * clipped(ratio, advantage, *limits(epsilon_low, epsilon_high))
      if beta is not None:
        value -= beta * ratio * k3(token.new, token.ref)
      each[-1].append(value)
  return -mean_of_means(each)


def r1(batch, log_probs, frozen, *, epsilon_low=0.2, epsilon_high=None, beta=0.001):
  """arXiv:2501.12948: ratio and k3 of whole outputs, no 1/|o_i|."""
  total, count = 0, 0
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    log_new, log_old = sum(token.new for token in tokens), sum(token.old for token in tokens)
    value = clipped(exp(log_new - log_old), advantage, *limits(epsilon_low, epsilon_high))
    if beta is not None:
      value -= beta * k3(log_new, sum(token.ref for token in tokens))
    total += value
    count += 1
  return -total / max(count, 1)


def vespo(batch, log_probs, frozen, *, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0):
  """arXiv:2602.10693: sg(φ(W)) A log π, φ(W) = W^k exp(λ(1 − W)); over tokens, as in TRL."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    weight = frozen_response_ratio(tokens)
    k, scale = (k_pos, lambda_pos) if advantage >= 0 else (k_neg, lambda_neg)
    kernel = weight**k * exp(scale * (1 - weight))
    each.append([kernel * advantage * token.new for token in tokens])
  return -token_mean(each)


def luspo(batch, log_probs, frozen, *, epsilon_low=3e-4, epsilon_high=4e-4):
  """arXiv:2602.05261: GSPO's term of a response, times its length."""
  total, count = 0, 0
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    value = clipped(geometric_ratio(tokens), advantage, *limits(epsilon_low, epsilon_high))
    total += len(tokens) * value
    count += 1
  return -total / max(count, 1)


def dppo(batch, log_probs, frozen, *, low=0.2, high=None):
  """arXiv:2602.04879, binary total variation: M ρ A, M = 0 where π left μ too far."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, standardized), log_probs, frozen):
    each.append([])
    for token in tokens:
      moved = exp(token.frozen) - exp(token.sampler)
      rose = above("rise over the threshold", moved, low if high is None else high, advantage)
      fell = above("fall over the threshold", -moved, low, advantage)
      keep = 0 if (advantage > 0 and rose) or (advantage < 0 and fell) else 1
      each[-1].append(keep * ratio_of(token) * advantage)
  return -token_mean(each)


def topr(batch, log_probs, frozen):
  """arXiv:2503.14286: A log π of good responses, sg(clip(ρ, 0, 1)) A log π of bad ones."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, centered), log_probs, frozen):
    weight = frozen_response_ratio(tokens)
    if above("response ratio over 1", weight, 1, advantage) or advantage >= 0:
      weight = 1
    each.append([weight * advantage * token.new for token in tokens])
  return -mean_of_sums(each)


def gpg(batch, log_probs, frozen):
  """arXiv:2504.02546: A log π, over tokens."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, centered), log_probs, frozen):
    each.append([advantage * token.new for token in tokens])
  return -token_mean(each)


def max_rl(batch, log_probs, frozen):
  """arXiv:2602.02710: 1/N Σ_i (R_i − mean)/mean · log π(y_i)."""
  each = []
  for advantage, tokens in responses(batch, advantages_of(batch, over_mean), log_probs, frozen):
    each.append([advantage * token.new for token in tokens])
  return -mean_of_sums(each)
