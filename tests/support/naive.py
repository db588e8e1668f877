"""The docstrings' formulas, naively, in complex128, and what rounding may do to them.

Numbers are [noise, direction, response, token]. Imaginary parts carry the derivative in a direction
(a complex step), real parts are what a stop-gradient leaves. Each noise is one choice of rounding
errors, the first is none: how far the others get is what rounding may do, by whatever branch (Monte
Carlo arithmetic).
"""

import math
from functools import partial

import numpy as np

NOISES = 8


class Noise:
  def __init__(self, rng, unit):
    self.rng, self.unit = rng, unit
    self.tiny = np.finfo(np.float64 if unit < 1e-10 else np.float32).tiny

  def __call__(self, x, size=None, roundings=4):
    shape = (NOISES, *np.shape(x)[1:])
    errors = self.rng.choice([-1.0, 1.0], shape) * roundings * self.unit
    errors[0] = 0
    if size is not None:
      return x + errors * size
    return x.real * (1 + errors) + (1j * x.imag * (1 - errors) if np.iscomplexobj(x) else 0)


def frozen(x):
  return x.real


def bounded(x):
  """Cut to ±20, with the slope at the cut."""
  return np.clip(x.real, -20, 20) + (1j * x.imag if np.iscomplexobj(x) else 0)


def smaller(x, y):
  return np.where(x.real <= np.real(y), x, y)


def larger(x, y):
  return np.where(x.real >= np.real(y), x, y)


def k3(x):
  """e^−x + x − 1, near 0 by its series."""
  small = np.where(np.abs(x) < 0.3, x, 0)
  series = sum((-small) ** n / math.factorial(n) for n in range(2, 16))
  return np.where(np.abs(x) < 0.3, series, np.exp(-x) + x - 1)


# Surrogates of log ρ and A.


def clip(x, a, epsilon_low=0.2, epsilon_high=None, max_ratio=np.inf):
  high = 1 + (epsilon_low if epsilon_high is None else epsilon_high)
  limited = larger(smaller(np.exp(x), high), max(1 - epsilon_low, 0))
  return smaller(smaller(np.exp(x), max_ratio) * a, limited * a)


def dual_clip(x, a, bound=3.0, **epsilon):
  return np.where(a < 0, larger(clip(x, a, **epsilon), bound * a), clip(x, a, **epsilon))


def cispo(x, a, high=None, low=None):
  return np.clip(np.exp(frozen(x)), low, high) * x * a


def sapo(x, a, temperature_pos=1.0, temperature_neg=1.05):
  t = np.where(a > 0, temperature_pos, temperature_neg)
  return 4 / t / (1 + np.exp(-t * np.expm1(x))) * a


SURROGATES = {
  "clip": clip,
  "dual_clip": dual_clip,
  "cispo": cispo,
  "sapo": sapo,
  "reinforce": lambda x, a: x * a,
  "importance_weighted": lambda x, a: np.exp(x) * a,
  "dro": lambda x, a, beta=None: x * a - beta / 2 * x**2,
}

# Levels of log-ratios, divergences of r = log π − log π_ref and d = log ρ, weights of tokens.


def each_mean(x, m):
  return np.sum(x * m, -1, keepdims=True) / m.sum(-1, keepdims=True) + 0 * x


def clipped_sequence(x, m, a, low=0.4, high=None):
  return each_mean(np.where(a > 0, smaller(x, low if high is None else high), larger(x, -low)), m)


LEVELS = {
  "token": lambda x, m, a: x,
  "sequence": lambda x, m, a: each_mean(x, m),
  "sequence_token": lambda x, m, a: frozen(each_mean(x, m)) + x - frozen(x),
  "sequence_product": lambda x, m, a: each_mean(x, m) * m.sum(-1, keepdims=True),
  "clipped_sequence": clipped_sequence,
}
DIVERGENCES = {
  "k1": lambda r, d, m: r,
  "k2": lambda r, d, m: r**2 / 2,
  "k3": lambda r, d, m: k3(r),
  "absolute": lambda r, d, m: r * np.sign(r.real),
  "straight_through": lambda r, d, m: frozen(k3(r)) + r**2 / 2 - frozen(r**2 / 2),
  "unbiased": lambda r, d, m: np.exp(d) * k3(r),
  "chi2_minus_kl": lambda r, d, m: np.exp(d) * k3(-r),
  "forward_kl": lambda r, d, m: np.exp(frozen(bounded(d - r))) * k3(-r),
  "sequence_k3": lambda r, d, m: k3(bounded(LEVELS["sequence_product"](r, m, None))),
  "sequence_unbiased": lambda r, d, m: np.exp(bounded(np.cumsum(d * m, -1))) * k3(r),
}
WEIGHTINGS = {
  "token_mean": lambda m: m / m.sum(),
  "sequence_mean": lambda m: m / m.sum(-1, keepdims=True) / len(m),
  "sequence_sum": lambda m: m / len(m),
  "token_sum": lambda m: 1.0 * m,
  "constant_length": lambda m, length: m / len(m) / length,
}

# Advantages of the rewards of one group, [noise, response].


def center(r, noise):
  s = noise(r - r.max(-1, keepdims=True))
  return noise(s - s.mean(-1, keepdims=True), np.abs(s).max(-1, keepdims=True))


def standardize(r, noise, ddof=1.0, eps=1e-4):
  a = center(r, noise)
  std = np.sqrt(np.sum(a**2, -1, keepdims=True) / max(r.shape[-1] - ddof, 1))
  return np.where(np.ptp(r[0]) == 0, 0, a / np.where(std + eps == 0, 1, std + eps))


def max_rl(r, noise):
  mean = noise(r.mean(-1, keepdims=True), np.abs(r).mean(-1, keepdims=True))
  return np.where(mean > 0, center(r, noise) / np.where(mean > 0, mean, 1), 0)


def pass_at_k(r, noise):
  best, second = (np.sort(r, -1)[:, [-n]] if r.shape[-1] > 1 else r for n in (1, 2))
  return np.where(r == best, best - second, 0)


def optimal_baseline(r, noise, lengths):
  s = noise(r - r.max(-1, keepdims=True))
  lengths = lengths if np.any(lengths) else np.ones(lengths.shape)
  baseline = np.sum(lengths * s, -1, keepdims=True) / np.sum(lengths)
  return noise(s - baseline, np.abs(s).max(-1, keepdims=True))


ADVANTAGES = {
  "center": center,
  "standardize": standardize,
  "leave_one_out": lambda r, noise: center(r, noise) * r.shape[-1] / max(r.shape[-1] - 1, 1),
  "batch_standardize": lambda r, noise, eps=1e-8, **k: standardize(r, noise, eps=eps, **k),
  "max_rl": max_rl,
  "pass_at_k": pass_at_k,
  "optimal_baseline": optimal_baseline,
  "decoupled": standardize,
}

# Corrections: factors of tokens from numbers v.old, v.new, v.sampler, v.behaviour (the sampler's or
# the old ones), advantages a and a statistic of log-ratios `stat(level, x)`.


def truncate_importance(v, stat, level, cap, floor=0.0):
  return smaller(larger(np.exp(bounded(stat(level, v["old"] - v["sampler"]))), floor), cap)


def mask_importance(v, stat, level, low, high):
  weight = np.exp(bounded(stat(level, v["old"] - v["sampler"])))
  return np.where((weight >= low) & (weight <= high), weight, 0)


def reject(v, stat, level, high, low=-np.inf):
  value = stat(level, v["noise"](k3(bounded(v["sampler"] - v["old"]))))
  return np.where((value >= low) & (value <= high), 1, 0)


def off_policy_sequence_mask(v, stat, level, threshold):
  drift = stat("sequence", v["behaviour"] - v["new"])
  return np.where((v["a"] < 0) & (drift > threshold), 0, 1)


def probability_mask(distance):
  def mask(v, stat, level, low, high=None):
    new, old = v["new"], v["behaviour"]
    moved, high = distance(new, old, v["noise"]), low if high is None else high
    rose = (v["a"] > 0) & (new > old) & (moved > high)
    return np.where(rose | ((v["a"] < 0) & (new < old) & (moved > low)), 0, 1)

  return mask


def total_variation(x, y, noise):
  return noise(np.abs(np.exp(x) - np.exp(y)), 8)


def binary_kl(x, y, noise):
  no_x, no_y = (np.maximum(-np.expm1(z), noise.tiny) for z in (x, y))
  kl = np.exp(y) * (y - x) + no_y * (np.log(no_y) - np.log(no_x))
  return noise(kl, 8 * (1 + np.abs(np.exp(y) * (y - x))))


def vespo(v, stat, level, **k):
  x = bounded(stat("sequence_product", v["new"] - v["old"]))
  power, scale = (np.where(v["a"] < 0, k[f"{n}_neg"], k[f"{n}_pos"]) for n in ("k", "lambda"))
  return np.exp(v["noise"](power * x) - v["noise"](scale * np.expm1(x)))


def topr(v, stat, level):
  taper = np.exp(np.clip(stat("sequence_product", v["new"] - v["old"]), -20, 0))
  return np.where(v["a"] < 0, taper, 1)


def quantile(x, m, share, noise):
  values = np.sort(x[:, :, m], -1)
  position = share * (m.sum() - 1)
  low, high = (values[..., [int(f(position))]] for f in (np.floor, np.ceil))
  limit = low + (high - low) * (position % 1)
  return noise(limit, (m.sum() * (high - low) + np.abs(limit)))[..., None]


def covariance_mask(v, stat, level, fraction):
  m, noise = v["m"], v["noise"]
  a = v["a"] + 0 * v["new"]
  deviation = lambda x: noise(
    x - np.mean(x[:, :, m], -1)[..., None, None], np.abs(x * m).max((2, 3), keepdims=True)
  )
  covariance = deviation(v["new"]) * deviation(a)
  return np.where(covariance > quantile(covariance, m, 1 - fraction, noise), 0, 1)


CORRECTIONS = {
  "truncate_importance": truncate_importance,
  "mask_importance": mask_importance,
  "reject": reject,
  "off_policy_sequence_mask": off_policy_sequence_mask,
  "total_variation_mask": probability_mask(total_variation),
  "binary_kl_mask": probability_mask(binary_kl),
  "vespo": vespo,
  "topr": topr,
  "covariance_mask": covariance_mask,
}
SLOTS = {
  "surrogate": SURROGATES,
  "level": LEVELS,
  "advantage": ADVANTAGES,
  "weighting": WEIGHTINGS,
}
EPSILON = {"epsilon_low": (0.001, 1.3), "[epsilon_high]": (0.001, 1.3)}
STANDARD = {"[ddof]": (0, 1), "[eps]": (0, 1e-2)}
RANGES = {  # of the numbers bound to slots; those in brackets may be absent
  "clip": EPSILON | {"[max_ratio]": (1, 10)},
  "dual_clip": EPSILON | {"bound": (1.1, 5)},
  "cispo": {"high": (1.1, 8), "[low]": (0, 0.9)},
  "sapo": {"temperature_pos": (0.3, 2), "temperature_neg": (0.3, 2)},
  "dro": {"beta": (0.1, 2)},
  "clipped_sequence": {"[low]": (0.05, 1), "[high]": (0.05, 1)},
  "standardize": STANDARD,
  "batch_standardize": STANDARD,
  "decoupled": STANDARD,
  "constant_length": {"length": (1, 30)},
  "truncate_importance": {"cap": (0.5, 5), "[floor]": (0, 0.5)},
  "mask_importance": {"low": (0, 0.9), "high": (1.1, 8)},
  "reject": {"high": (0.001, 1), "[low]": (0, 0.01)},
  "off_policy_sequence_mask": {"threshold": (0, 1)},
  "total_variation_mask": {"low": (0.01, 0.5), "[high]": (0.01, 0.5)},
  "binary_kl_mask": {"low": (0.001, 0.5), "[high]": (0.001, 0.5)},
  "vespo": {"k_pos": (0.5, 3), "lambda_pos": (0.5, 3), "k_neg": (0.5, 3), "lambda_neg": (0.5, 3)},
  "covariance_mask": {"fraction": (0, 0.5)},
}


def responses(s, a):
  """Each response's place among the rewards, and its active tokens."""
  found = []
  for place in np.ndindex(s["responses"]):
    here = np.zeros(a["mask"].shape, bool)
    if s["packed"]:
      here[place[0]] = a["mask"][place[0]] & (a["segment_ids"][place[0]] == place[1] + 1)
    else:
      here[place] = a["mask"][place]
    if here.any():
      found.append((place, np.flatnonzero(here)))
  return found


def advantages(s, a, k, places, noise):
  """[noise, 1, response, 1]"""
  groups = np.array([a["group_ids"][p] if "group_ids" in a else p[0] for p in places])
  batch, k = np.zeros(len(places)), dict(k["advantage"])
  weights, lengths = k.pop("weights", [1.0]), k.pop("lengths", None)
  kinds = a["rewards"] if s["advantage"] == "decoupled" else a["rewards"][None]

  def by_group(rewards, groups):
    out = np.zeros((NOISES, len(places)))
    for group in set(groups):
      here = groups == group
      if lengths is not None:
        k["lengths"] = np.array([lengths[p] for p in places])[here]
      out[:, here] = ADVANTAGES[s["advantage"]](rewards[:, here], noise, **k)
    return out

  out = 0
  for weight, kind in zip(weights, kinds, strict=True):
    rewards = np.array([kind[p] for p in places], float) + np.zeros((NOISES, 1))
    out = out + noise(weight * by_group(rewards, batch if "batch" in s["advantage"] else groups))
  return (by_group(out, batch) if s["advantage"] == "decoupled" else out)[:, None, :, None]


def log_probs(s, a, x, noise, cast):
  """log π, [noise, direction, token], of log-probabilities, [logits] or [hidden, W, bias]."""
  if s["kind"] == "log_probs":
    return x[0].reshape(*x[0].shape[:2], -1)
  z, size = x[0].reshape(*x[0].shape[:2], -1, x[0].shape[-1]), 0
  if s["kind"] == "linear":
    matrix, bias = np.swapaxes(x[1], -1, -2), x[2][:, :, None] if s["bias"] else 0
    z, size = z @ matrix + bias, np.abs(z) @ np.abs(matrix) + np.abs(bias)
  z = noise(z, size)
  if "softcap" in a:
    t = noise(np.tanh(z.real / a["softcap"]))
    z = a["softcap"] * t + 1j * (1 - t**2) * z.imag
  z = noise(z / a["temperature"])
  z = z.real + 1j * z.imag * cast(np.ones(z.shape))  # its gradient is rounded for the products
  z = noise(z - z.real.max(-1, keepdims=True), np.abs(z).max(-1, keepdims=True))
  chosen = np.arange(z.shape[-1]) == np.where(a["mask"], a["tokens"], 0).reshape(-1, 1)
  return noise(noise(np.sum(z * chosen, -1)) - noise(np.log(np.sum(np.exp(z), -1))), 1)


def expect(s, a, k, x, units):
  """The terms of the loss, [noise, direction, response, token]; and what may be lost below."""
  rng = np.random.default_rng(0)
  noise, cast = (Noise(rng, unit) for unit in units)
  found = responses(s, a)
  width = max([len(t) for _, t in found], default=1)
  at, m = np.zeros((len(found), width), int), np.zeros((len(found), width), bool)
  for i, (_, tokens) in enumerate(found):
    at[i, : len(tokens)], m[i, : len(tokens)] = tokens, True
  new = np.where(m, log_probs(s, a, x, noise, cast)[:, :, at], 0)
  old, ref, sampler, factor, entropy = (
    np.where(m, a[name].ravel()[at], 0)[None, None] if name in a else None
    for name in ("old", "ref", "sampler", "factor", "entropy")
  )
  adv = advantages(s, a, k, [place for place, _ in found], noise)
  old = frozen(new) if old is None else old

  def stat(level, x):
    x = noise(x)
    return noise(LEVELS[level](x, m, adv), LEVELS[level](np.abs(x), m, adv), m.shape[1] + 4)

  d = noise(new - old)
  level = partial(LEVELS[s["level"]], m=m, a=adv, **k["level"])
  log_ratio = bounded(noise(level(d), level(np.abs(d)) + ("clip" in s["surrogate"]), width + 4))
  surrogate = noise(SURROGATES[s["surrogate"]](log_ratio, adv, **k["surrogate"]), None, 16)
  v = {"new": frozen(new)[:, :1], "old": old[:, :1], "sampler": sampler, "a": adv, "m": m}
  v |= {"behaviour": v["old"] if sampler is None else sampler, "noise": noise}
  factors = [
    CORRECTIONS[name](v, stat, level=s["levels"][name], **k[name]) for name in s["corrections"]
  ]
  if factor is not None:
    factors.append(factor)
  if entropy is not None:
    factors.append(np.where(entropy < quantile(entropy, m, a["quantile"], noise), 0, 1))
  factor = noise(np.prod(np.broadcast_arrays(np.ones((1, 1, *m.shape)), *factors), 0), None, 16)
  weight = WEIGHTINGS[s["weighting"]](m, **k["weighting"])
  terms = -weight * factor * surrogate
  if s["divergence"]:
    r, d = bounded(noise(new - ref)), bounded(d)
    penalty = DIVERGENCES[s["divergence"]](r, d, m)
    terms = terms + weight * k["beta"] * noise(penalty, None, 16 + width)
  # A product may leave the type's range below before its last factors bring it back.
  largest = [np.max(np.abs(y), initial=1) for y in (adv, factor, np.exp(log_ratio.real), weight)]
  return terms * m, 1e-34 * np.prod(largest)
