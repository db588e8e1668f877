"""The soak: random objectives on random, extreme batches beside float64, and a long training run.

GPO_SOAK_STRUCTURES objectives, each compiled once, are run on DRAWS batches each. A failure names
its seed: GPO_SOAK_SEED=… GPO_SOAK_STRUCTURES=1 repeats that structure and its draws alone.
GPO_SOAK_STEPS sets the length of the training run. With `pytest -s`, both print figures.
"""

import gc
import os
import pathlib
import time
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gpo_jax as gpo

SEED = int(os.environ.get("GPO_SOAK_SEED", "0"))
STRUCTURES = int(os.environ.get("GPO_SOAK_STRUCTURES", "210"))
DRAWS = 48
CPU_SECONDS = 960 * STRUCTURES / 210  # 8 minutes on two idle cores; neighbours do not count
STEPS = int(os.environ.get("GPO_SOAK_STEPS", "300"))
LEAKING = 40  # updates whose states, 1.2 MB each, are kept, as a control
MEMORY = 24.0  # MiB: half of what the control keeps

# Slots, with ranges for the numbers bound to them; those in brackets may be absent.
EPSILON = {"epsilon_low": (0.001, 1.3), "[epsilon_high]": (0.001, 1.3)}
SURROGATES = {
  "clip": EPSILON | {"[max_ratio]": (2.4, 10)},
  "dual_clip": EPSILON | {"bound": (1.1, 5)},
  "cispo": {"high": (1.1, 8), "[low]": (0, 0.9)},
  "sapo": {"temperature_pos": (0.3, 2), "temperature_neg": (0.3, 2)},
  "reinforce": {},
  "importance_weighted": {},
  "dro": {"beta": (0.1, 2)},
}
LEVELS = {"token": {}, "sequence": {}, "sequence_token": {}, "sequence_sum": {}}
LEVELS["geometric"] = {"[clip]": (0.05, 1)}
STANDARDS = "standardize", "batch_standardize", "decoupled"
STANDARD = {"[ddof]": (0, 1), "[eps]": (0, 1e-2)}
ADVANTAGES = {
  "center": {},
  "standardize": STANDARD,
  "leave_one_out": {},
  "batch_standardize": STANDARD,
  "max_rl": {},
  "pass_at_k": {},
  "optimal_baseline": {},
  "decoupled": STANDARD,
}
WEIGHTINGS = {"token_mean": {}, "sequence_mean": {}, "sequence_sum": {}, "token_sum": {}}
WEIGHTINGS["constant_length"] = {"length": (1, 30)}
CORRECTIONS = {
  "truncate_importance": {"cap": (0.5, 5)},
  "mask_importance": {"low": (0, 0.9), "high": (1.1, 8)},
  "off_policy_sequence_mask": {"threshold": (0, 1)},
  "total_variation_mask": {"threshold": (0.01, 0.5)},
  "binary_kl_mask": {"threshold": (0.001, 0.5)},
  "vespo": {"k_pos": (0.5, 3), "lambda_pos": (0.5, 3), "k_neg": (0.5, 3), "lambda_neg": (0.5, 3)},
  "topr": {},
  "covariance_mask": {"fraction": (0, 0.5)},
}
SLOTS = {
  "surrogate": SURROGATES,
  "level": LEVELS,
  "advantage": ADVANTAGES,
  "weighting": WEIGHTINGS,
}
FLOATS = [np.float32, np.float32, ml_dtypes.bfloat16, np.float64]
VOCABULARY, HIDDEN = 7, 3
ROUNDINGS = 16  # products, quotients and elementary functions, of 2 roundings each, in one term

UNSURE = 1e90  # the error of what rounding may make anything

# The reference: the docstrings' formulas in float64. An error e travels with each number x: what
# rounding to u = 2^-24 (2^-53) leaves at most, to first order. `spread` lets it through a function
# by moving x by ±e, so that a branch or a mask which rounding may decide counts with its jump.


def spread(function, *pairs):
  base, error = function(*(x for x, _ in pairs)), 0.0
  for i, (x, e) in enumerate(pairs):
    others = [y for y, _ in pairs]
    moved = (function(*others[:i], y, *others[i + 1 :]) for y in (x - e, x + e))
    sides = [np.abs(y - base) for y in moved]
    error = error + np.minimum(sides, UNSURE).max(0)
  return base, error


def excess(x):
  series = sum(x**n / float(np.prod(np.arange(1.0, n + 1))) for n in range(2, 22))
  return np.where(np.abs(x) < 0.5, series, np.exp(x) - 1 - x)


def bounded(x):
  return np.clip(x, -20, 20)


def clip(x, a, epsilon_low=0.2, epsilon_high=None, max_ratio=np.inf):
  high = 1 + (epsilon_low if epsilon_high is None else epsilon_high)
  ratio, limited = np.exp(x), np.clip(np.exp(x), max(1 - epsilon_low, 0), high)
  capped, out = np.minimum(ratio, max_ratio), limited * a < np.minimum(ratio, max_ratio) * a
  return np.where(out, limited, capped) * a, np.where(out | (ratio > max_ratio), 0, ratio) * a


def dual_clip(x, a, bound=3.0, **epsilon):
  value, slope = clip(x, a, **epsilon)
  below = (a < 0) & (value < bound * a)
  return np.where(below, bound * a, value), np.where(below, 0, slope)


def sapo(x, a, temperature_pos=1.0, temperature_neg=1.05):
  t = np.where(a > 0, temperature_pos, temperature_neg)
  z = t * np.expm1(x)
  up, down = 1 / (1 + np.exp(-z)), np.exp(-np.maximum(z, 0)) / (1 + np.exp(-np.abs(z)))
  down = np.where(z > 0, down, 1 / (1 + np.exp(np.minimum(z, 0))))
  return 4 / t * up * a, 4 * up * down * np.exp(x) * a


def cispo(x, a, high=None, low=None):
  weight = np.clip(np.exp(x), low, high)
  return weight * x * a, weight * a


# Values and slopes: of the surrogates in log ρ, of the divergences in log π, where δ and d move.
SURROGATE = {
  "clip": clip,
  "dual_clip": dual_clip,
  "cispo": cispo,
  "sapo": sapo,
  "reinforce": lambda x, a: (x * a, a + 0 * x),
  "importance_weighted": lambda x, a: (np.exp(x) * a, np.exp(x) * a),
  "dro": lambda x, a, beta=None: (x * a - beta / 2 * x**2, a - beta * x),
}
DIVERGENCE = {
  "k1": lambda r, d: (r, 1 + 0 * r),
  "k2": lambda r, d: (r**2 / 2, r),
  "k3": lambda r, d: (excess(-r), -np.expm1(-r)),
  "absolute": lambda r, d: (np.abs(r), np.sign(r)),
  "straight_through": lambda r, d: (excess(-r), r),
  "unbiased": lambda r, d: (np.exp(d) * excess(-r), np.exp(d) * r),
  "chi2_minus_kl": lambda r, d: (np.exp(d) * excess(r), np.exp(d) * (excess(r) + np.expm1(r))),
  "forward_kl": lambda r, d: [np.exp(bounded(d - r)) * x for x in (excess(r), np.expm1(r))],
  "sequence_k3": lambda r, d: (excess(-r), -np.expm1(-r)),  # r of the response
  "sequence_unbiased": lambda r, d: (np.exp(d) * excess(-r), np.exp(d) * r),  # d up to the token
}


def of_group(name, r, u, e=0.0, ddof=1.0, eps=None, lengths=None):
  """Advantages of one group and their errors; e is the error of the rewards."""
  n, s = len(r), r - r.max()
  a, scale = s - s.mean(), (len(r) + 3) * u * np.max(np.abs(s))
  e = 2 * e + scale + 0 * a
  if name == "leave_one_out":
    a, e = (a * n / (n - 1), e * n / (n - 1)) if n > 1 else (0 * a, 0 * e)
  elif name in STANDARDS:
    eps = (1e-8 if name == "batch_standardize" else 1e-4) if eps is None else eps
    std = np.sqrt(np.sum(a**2) / max(n - ddof, 1))
    e_std = np.max(e) * np.sqrt(n / max(n - ddof, 1)) + 8 * u * std
    below = max(std + eps - e_std, 0)
    a = np.zeros(n) if not s.any() or std + eps == 0 else a / (std + eps)
    noise = UNSURE if below == 0 else (e + np.abs(a) * e_std) / max(below, 1e-300)
    e = np.where(e + e_std == 0, 0, noise) + 8 * u * np.abs(a)
  elif name == "max_rl":
    mean, e_mean = r.mean(), (n + 1) * u * np.abs(r).mean()
    a, unsure = (a / mean if mean > 0 else 0 * a), np.abs(mean) <= 2 * e_mean
    e = np.where(unsure, UNSURE, (e + np.abs(a) * e_mean) / np.abs(mean or 1) + 4 * u * np.abs(a))
    e = e if mean > 0 or unsure else 0 * e
  elif name == "pass_at_k":
    order = np.sort(s)[::-1]
    a = np.where((s == 0) & (n > 1) & (np.sum(s == 0) == 1), -order[min(1, n - 1)], 0)
    e = 2 * u * a
  elif name == "optimal_baseline":
    a = s - np.sum(lengths * s) / max(np.sum(lengths), 1)
  return a, e


def level(name, x, e, m, a, clip=0.4, u=0.0):
  """ℓ, its error, its derivative [R, to, from] and that one's error, of responses [R, L]."""
  n, each = m.sum(-1, keepdims=True), np.eye(m.shape[1])[None] * m[:, None]
  together, gate = m[:, :, None] * m[:, None] * 1.0, (1.0 + 0 * x, 0.0)
  if name == "token":
    return x, e, each, 0 * each
  if name == "geometric":

    def limited(x, a):
      inside = np.where(a > 0, x <= clip, x >= -clip)
      return np.stack([np.where(inside, x, np.where(a > 0, clip, -clip)), inside])

    (x, gate), (e, e_gate) = spread(limited, (x, e), a)
    x, e, gate = x * m, (e + u) * m, (gate, e_gate)
  size = np.sum(np.abs(x), -1, keepdims=True)
  total, error = np.sum(x, -1, keepdims=True), np.sum(e, -1, keepdims=True) + (n + 1) * u * size
  if name == "sequence_sum":
    return total * m, error * m, together, 0 * each
  if name == "sequence_token":
    return total / n * m, error / n * m, each, 0 * each
  share, e_gate = together / n[..., None], gate[1] + 0 * x
  return total / n * m, error / n * m, share * gate[0][:, None], share * e_gate[:, None]


def corrected(name, v, m, a, u, of=None, **k):
  """The factor [R, L] and its error."""
  adv, e_a = a

  def stat(name, x, y):
    return level(name, x - y, u * np.abs(x - y) + v["e"], m, a, u=u)[:2]

  mu = v["sampler"] if v["sampler"] is not None else v["old"]
  if name in ("truncate_importance", "mask_importance"):
    x, e = stat(of, v["old"], v["sampler"])
    if name == "truncate_importance":
      return spread(lambda x: np.minimum(np.exp(bounded(x)), k["cap"]), (x, e + 4 * u))
    kept = lambda y: y * ((y >= k["low"]) & (y <= k["high"]))
    return spread(lambda x: kept(np.exp(bounded(x))), (x, e + 4 * u))
  if name == "off_policy_sequence_mask":
    keep = lambda x, adv: 1.0 - ((adv < 0) & (x > k["threshold"]))
    return spread(keep, stat("sequence", mu, v["new"]), a)
  if name in ("vespo", "topr"):
    x, e = stat("sequence_sum", v["new"], v["old"])
    if name == "topr":
      taper = lambda x, adv: np.where(adv < 0, np.exp(np.clip(x, -20, 0)), 1.0)
      return spread(taper, (x, e + 4 * u), a)

    def phi(x, adv):
      power, scale = (np.where(adv < 0, k[n + "_neg"], k[n + "_pos"]) for n in ("k", "lambda"))
      return np.exp(power * bounded(x) - scale * np.expm1(bounded(x)))

    f, error = spread(phi, (x, e), a)
    return f, error + f * 24 * u * (np.abs(bounded(x)) + np.abs(np.expm1(bounded(x))))
  if name in ("total_variation_mask", "binary_kl_mask"):
    x, y = v["new"], mu
    tiny = np.finfo(np.float32 if u > 1e-10 else np.float64).tiny

    def keep(x, y, adv, slack):
      p, q, rest = np.exp(x), np.exp(y), [np.maximum(-np.expm1(z), tiny) for z in (x, y)]
      if name == "total_variation_mask":
        far = np.abs(p - q) + slack > k["threshold"]
      else:
        kl = rest[1] * (np.log(rest[1]) - np.log(rest[0])) - q * (x - y)
        far = kl + slack * (1 + np.abs(q * (x - y))) > k["threshold"]
      return 1.0 - (far & (((adv > 0) & (x > y)) | ((adv < 0) & (x < y))))

    return spread(keep, (x, v["e"] + u * np.abs(x)), (y, u * np.abs(y)), a, (0.0, 32 * u))
  count = max(m.sum(), 1)

  def deviation(x, e):
    rounding = (count + 3) * u * np.max(np.abs(x * m), initial=0)
    return x - np.sum(x * m) / count, e + np.max(e * m, initial=0) + rounding

  (x, e_x), (y, e_y) = deviation(v["new"], v["e"]), deviation(adv + 0 * m, e_a + 0 * m)
  e = np.abs(x) * e_y + np.abs(y) * e_x + e_x * e_y + 4 * u * np.abs(x * y)
  return dropped(x * y, e, m, 1 - k["fraction"], u, lambda s, limit: s <= limit)


def dropped(s, e, m, quantile, u, keep):
  values = np.sort(s[m])
  if not values.size:
    return 1.0 + 0 * s, 0 * s
  position = quantile * (values.size - 1)
  limit = np.interp(position, np.arange(values.size), values)
  wide = np.max(np.diff(values), initial=0) * 8 * u * values.size
  e_limit = wide + 4 * u * np.abs(limit) + np.max(e[m])
  return spread(lambda s, limit: 1.0 * keep(s, limit), (s, e), (limit, e_limit))


def weights(name, m, length=1.0):
  tokens, count = m.sum(-1, keepdims=True), max(len(m), 1)
  shares = {"sequence_mean": 1 / tokens / count, "sequence_sum": 1 / count, "token_sum": 1}
  shares |= {"token_mean": 1 / max(m.sum(), 1), "constant_length": 1 / count / length}
  return shares[name] * m


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


def advantages(s, a, k, found, u):
  places = [place for place, _ in found]
  batch, values, error = np.zeros(len(found), int), np.zeros(len(found)), np.zeros(len(found))
  groups = np.array([a["group_ids"][p] if "group_ids" in a else p[0] for p in places], int)

  def by_group(rewards, e, groups):
    out, k_of = np.zeros((2, len(found))), dict(k["advantage"])
    k_of.pop("weights", None)
    for group in set(groups):
      here = groups == group
      if "lengths" in k_of:
        k_of["lengths"] = np.array([k["advantage"]["lengths"][p] for p in places])[here]
      out[:, here] = of_group(s["advantage"], rewards[here], u, e[here], **k_of)
    return out

  if s["advantage"] != "decoupled":
    rewards = np.array([a["rewards"][p] for p in places], float)
    groups = batch if s["advantage"] == "batch_standardize" else groups
    return by_group(rewards, error, groups)
  for kind, share in zip(a["rewards"], k["advantage"]["weights"]):
    one, e = by_group(np.array([kind[p] for p in places], float), 0 * error, groups)
    values, error = values + share * one, error + np.abs(share) * (e + 4 * u * np.abs(one))
  return by_group(values, error, batch)


def expect(s, a, k, u, u_rewards):
  """Loss, gradient in log π and their errors, Σ|terms|, and the largest number met."""
  found = responses(s, a)
  width = max([len(t) for _, t in found], default=1)
  at, m = np.zeros((len(found), width), int), np.zeros((len(found), width), bool)
  for i, (_, tokens) in enumerate(found):
    at[i, : len(tokens)], m[i, : len(tokens)] = tokens, True
  names = ("new", "old", "ref", "sampler", "factor", "entropy", "e")
  v = {name: np.where(m, a[name].ravel()[at], 0) if name in a else None for name in names}
  moved, v["old"] = v["old"] is not None, v["new"] if v["old"] is None else v["old"]
  pair = tuple(x[:, None] for x in advantages(s, a, k, found, u_rewards))
  n, w = np.maximum(m.sum(-1, keepdims=True), 1), weights(s["weighting"], m, **k["weighting"])
  d = v["new"] - v["old"]
  e_d = (u * np.abs(d) + v["e"]) * moved
  x, e_x, jacobian, e_jacobian = level(s["level"], d, e_d, m, pair, u=u, **k["level"])

  # The surrogate, its slope and its factor; a clip compares exp(ℓ), which is rounded too.
  def surrogate(x, a):
    x, a = np.broadcast_arrays(bounded(x), a)
    return np.stack(SURROGATE[s["surrogate"]](x, a, **k["surrogate"]))

  clips = s["surrogate"] in ("clip", "dual_clip", "cispo")
  both, e_both = spread(surrogate, (x, e_x + 4 * u * clips), pair)
  parts = np.abs(both)
  if s["surrogate"] == "dro":
    parts = parts + k["surrogate"]["beta"] * np.stack([bounded(x) ** 2, np.abs(bounded(x))])
  f, e_f = np.ones(m.shape), np.zeros(m.shape)
  factors = [
    corrected(name, v, m, pair, u, s["levels"][name], **k[name]) for name in s["corrections"]
  ]
  factors += [(v["factor"], 0.0)] if "factor" in a else []
  if "entropy" in a:
    entropy = v["entropy"], 0 * v["entropy"]
    factors.append(dropped(*entropy, m, a["quantile"], u, lambda s, limit: s >= limit))
  for g, e in factors:
    f, e_f = f * g, np.abs(f) * e + np.abs(g) * e_f + e_f * e + 2 * u * np.abs(f * g)
  # A product may leave float32's range below before its last factors bring it back.
  tiny = 1e3 * np.finfo(np.float32).tiny * (1 + np.abs(pair[0])) * (1 + f)
  tiny = tiny * (1 + np.exp(bounded(x)))
  e_both = e_both * (f + e_f) + parts * (e_f + ROUNDINGS * u * f) + tiny
  (value, slope), (e_value, e_slope), parts = -w * f * both, w * e_both, w * f * parts
  sums = np.abs(jacobian) + e_jacobian
  e_sums = e_jacobian + (n[..., None] + 8) * u * np.abs(jacobian)
  gradient = np.einsum("rt,rts->rs", slope, jacobian)
  e_gradient = np.einsum("rt,rts->rs", e_slope, sums) + np.einsum("rt,rts->rs", parts[1], e_sums)
  most = max(np.max(np.abs(y), initial=0) for y in (both, f, f * both, pair[0]))

  name = s["divergence"]
  if name:
    r = v["new"] - v["ref"]
    e_r, beta = u * np.abs(r) + v["e"], w * k["beta"]
    if name in ("sequence_k3", "sequence_unbiased"):
      r, e_r = spread(bounded, (r, e_r))
      d, e_d = spread(bounded, (d, e_d))
    if name == "sequence_k3":
      e_r = np.sum((e_r + n * u * np.abs(r)) * m, -1, keepdims=True)
      r = np.sum(r, -1, keepdims=True) + 0 * r
    if name == "sequence_unbiased":
      e_d, d = np.cumsum(e_d + 2 * n * u * np.abs(d), -1), np.cumsum(d, -1)
    function = lambda r, d: np.stack(DIVERGENCE[name](bounded(r), bounded(d)))
    both, e_both = spread(function, (r, e_r + 0 * r), (d, e_d))
    more = beta * (np.abs(both) + np.stack([0 * r, np.abs(both[0]) * (name == "chi2_minus_kl")]))
    e_both = beta * e_both + ROUNDINGS * u * more
    value, e_value, parts = value + beta * both[0], e_value + e_both[0], parts + more
    sums = np.eye(width) + np.zeros((len(m), 1, 1))
    if name == "sequence_k3":
      sums = m[:, :, None] * m[:, None] * 1.0
    gradient += np.einsum("rt,rts->rs", beta * both[1], sums)
    e_gradient += np.einsum("rt,rts->rs", e_both[1] + n * u * more[1], sums)
    if name == "sequence_unbiased":  # earlier tokens move the later ones' weight
      earlier = np.tril(np.ones((width, width)), -1)
      gradient += (beta * both[0]) @ earlier * m
      e_gradient += (e_both[0] + (n + 8) * u * more[0]) @ earlier * m
    most = max(most, np.max(np.abs(both), initial=0))

  flat, e_flat = np.zeros((2, a["mask"].size))
  flat[at[m]], e_flat[at[m]] = gradient[m], e_gradient[m]
  absolute = np.sum(parts[0])
  loss = np.sum(value), np.sum(e_value) + m.sum() * u * absolute
  return *loss, flat.reshape(a["mask"].shape), e_flat.reshape(a["mask"].shape), absolute, most


def from_logits(s, a, k, u):
  """log π, its error, and what carries a gradient in log π on to the inputs."""
  here = a["mask"][..., None]
  x = [np.where(here, a["x"][0], 0), *a["x"][1:]]
  z, e = (x[0], 0 * x[0]) if s["kind"] == "logits" else (x[0] @ x[1].T, 0.0)
  if s["kind"] == "linear":
    z = z + (x[2] if s["bias"] else 0)
    size = np.abs(x[0]) @ np.abs(x[1]).T + (np.abs(x[2]) if s["bias"] else 0)
    e = (HIDDEN + 2) * u * size
  cap, slope, e_slope = k.get("softcap"), np.ones(z.shape), np.zeros(z.shape)
  if cap:
    t = np.tanh(z / cap)
    slope, e_slope = 1 - t**2, 2 * np.abs(t) * (1 - t**2) * (e / cap + u * np.abs(z / cap)) + 8 * u
    z, e = cap * t, (e + u * np.abs(z)) * slope + 6 * u * np.abs(cap * t)
  z, e = z / k["temperature"], (e + u * np.abs(z)) / k["temperature"]
  top = z.max(-1, keepdims=True)
  lse, size = top + np.log(np.sum(np.exp(z - top), -1, keepdims=True)), z.shape[-1]
  chosen = np.arange(size) == np.where(a["mask"], a["tokens"], 0)[..., None]
  p, widest = np.exp(z - lse), e.max(-1, keepdims=True) + (size + 8) * u + 2 * u * np.abs(lse)
  new = np.sum((z - lse) * chosen, -1)
  e_new = np.sum((e + 2 * u * np.abs(z) + widest) * chosen, -1)
  e_p = p * (e + widest + 2 * u * np.abs(z - lse) + 8 * u) + 1e-37

  def pull(g, e_g):
    g, e_g, per = g[..., None], e_g[..., None], 1 / k["temperature"]
    dz, sums = g * (chosen - p) * slope * per, (chosen + p) * per
    e_dz = (e_g * sums + np.abs(g) * (e_p * per + 8 * u * sums)) * slope
    e_dz = e_dz + np.abs(g) * sums * e_slope + 1e-37
    if s["kind"] == "logits":
      return [(dz, e_dz)]
    e_dz = e_dz + jnp.finfo(DTYPES(s, "x")).eps * np.abs(dz)  # rounded for the products
    dz, e_dz, h = (y.reshape(-1, y.shape[-1]) for y in (dz, e_dz, x[0]))
    e_sum = e_dz + (max(dz.shape) + 8) * u * np.abs(dz)
    pairs = [(dz @ x[1], e_sum @ np.abs(x[1])), (dz.T @ h, e_sum.T @ np.abs(h))]
    pairs.append((dz.sum(0), e_sum.sum(0)))
    return [(y.reshape(z.shape), e.reshape(z.shape)) for (y, e), z in zip(pairs, x)]

  return new, e_new, pull


# Random structures and batches.


def draw_structure(rng, **forced):
  pick = lambda options: list(options)[rng.integers(len(options))]
  often = lambda share: bool(rng.random() < share)
  s = {"kind": "log_probs" if often(0.7) else pick(["logits", "linear", "linear"])}
  for slot, options in SLOTS.items():
    s[slot] = pick(options)
  s["divergence"] = pick(DIVERGENCE) if often(0.7) else None
  s["corrections"] = tuple(pick(CORRECTIONS) for _ in range(pick([0, 0, 1, 1, 2])))
  s |= {"x64": often(0.15), "packed": often(0.3), "old": often(0.85), "sampler": often(0.5)}
  s |= {
    "factor": pick([None, None, "factor", "entropy"]),
    "grouped": often(0.3),
    "bias": often(0.5),
  }
  s |= forced
  s["grouped"] &= s["advantage"] not in ("batch_standardize", "decoupled")
  s["sampler"] |= any("importance" in name for name in s["corrections"])
  low = 1 + (s["advantage"] == "leave_one_out")
  s["responses"] = int(rng.integers(1, 5)), int(rng.integers(low, 6))
  length = int(rng.integers(1, 9)) if not s["packed"] else int(rng.integers(4, 16))
  s["shape"] = (s["responses"][:1] if s["packed"] else s["responses"]) + (length,)
  s["dtypes"] = {name: pick(FLOATS) for name in ("x", "others", "rewards")}
  s["mask"], s["map"] = pick([bool, np.int32, np.float32]), s["kind"] == "linear" or often(0.2)
  s["keys"] = {}
  for name in (*(s[slot] for slot in SLOTS), *s["corrections"]):
    ranges = next(table[name] for table in (*SLOTS.values(), CORRECTIONS) if name in table)
    s["keys"][name] = [key for key in ranges if "[" not in key or often(0.5)]
  s["levels"] = {name: pick(["token", "sequence", "sequence_sum"]) for name in s["corrections"]}
  s["softcap"], s["settings"] = often(0.3), {"compact": pick([None, True, False])}
  s["settings"] |= {"chunk_size": pick([None, 1, 3]), "tile_size": pick([None, 2, 5])}
  return s


def draw_batch(s, rng):
  """One batch, float64 numbers that its dtypes can hold, and the numbers of the objective."""
  shape, pick = s["shape"], lambda options: options[rng.integers(len(options))]
  held = lambda name, x: np.asarray(x).astype(DTYPES(s, name)).astype(float)
  garbage, a = pick([np.nan, np.inf, -np.inf, 1e30, 0.0]), {}
  mask = rng.random(shape) < pick([1.0, 0.7, 0.2])
  if pick([0, 1]):
    mask &= np.arange(shape[-1]) < rng.integers(0, shape[-1] + 1, (*shape[:-1], 1))
  mask[rng.random(shape[:-1]) < pick([0, 0.3])] = False  # empty rows
  mask[rng.random(shape[0]) < pick([0, 0, 0.3])] = False  # empty groups
  a["mask"] = mask
  if s["packed"]:
    ids = np.sort(rng.integers(1, s["responses"][1] + 1, shape), -1)
    a["segment_ids"] = np.where(mask, ids, rng.integers(-3, 9, shape))
  if s["grouped"]:
    a["group_ids"] = rng.integers(-2, 2, s["responses"])

  if s["kind"] == "log_probs":
    base = -rng.exponential(1.5, shape)
    near_one = rng.random(shape) < pick([0, 0, 0.5])
    base = np.where(near_one, pick([0, -1, -1]) * 10 ** -rng.uniform(3, 9, shape), base)
  else:
    size = (*shape, VOCABULARY) if s["kind"] == "logits" else (*shape, HIDDEN)
    x = [rng.normal(size=size) * pick([0.1, 1, 30])]
    if s["kind"] == "linear":
      x += [rng.normal(size=(VOCABULARY, HIDDEN)), *[rng.normal(size=VOCABULARY)] * s["bias"]]
    a["x"] = [held("x", y) for y in x]
    a["tokens"] = np.where(mask, rng.integers(0, VOCABULARY, shape), pick([-1, 99]))
    a["temperature"] = held("number", rng.uniform(0.5, 2))
    if s["softcap"]:
      a["softcap"] = held("number", rng.uniform(5, 30))
    base = from_logits(s, a, a, 0.0)[0]
    a["x"][0] = np.where(mask[..., None], a["x"][0], garbage)

  def drifted(name):
    x = base + rng.normal(size=shape) * pick([0, 1e-6, 1e-3, 0.3, 2])
    x = np.where(rng.random(shape) < pick([0, 0, 0.3]), x - pick([50, 1e4]), x)
    return np.where(mask, held(name, np.minimum(x, 0)), garbage)

  if s["kind"] == "log_probs":
    a["x"] = [drifted("x")]
  used = {"old": s["old"], "ref": s["divergence"], "sampler": s["sampler"]}
  a |= {name: drifted("others") for name, given in used.items() if given}
  if s["factor"]:
    data = rng.exponential(size=shape) * (rng.random(shape) < 0.8)
    a[s["factor"]] = np.where(mask, held("others", data), garbage)
    a["quantile"] = held("number", rng.uniform(0, 1))

  size = ((2,) if s["advantage"] == "decoupled" else ()) + s["responses"]
  rewards = pick([rng.normal(size=size), rng.integers(0, 2, size), rng.integers(0, 2, size) / 10])
  rewards = rewards * pick([1, 1, 1e30, 1e-30]) + pick([0, 0, 0, 1000])
  rewards = np.where(rng.random((*size[:-1], 1)) < pick([0, 0.5]), rewards[..., :1], rewards)
  some = np.zeros(s["responses"], bool)
  for place, _ in responses(s, a):
    some[place] = True
  a["rewards"] = np.where(some, held("rewards", rewards), garbage)

  k = {"beta": held("number", rng.uniform(0.001, 0.5)), "poisoned": False}
  if s["kind"] == "log_probs" and some.any() and rng.random() < 0.05:
    k["poisoned"], bad = True, [np.nan, np.inf, -np.inf][rng.integers(3)]
    arrays = [(a["x"][0], mask), (a["old"], mask)] if s["old"] else [(a["x"][0], mask)]
    arrays.append((a["rewards"], np.broadcast_to(some, size)))
    array, here = pick(arrays)
    array[tuple(rng.permutation(np.argwhere(here))[0])] = bad
  for slot, name in [*((slot, s[slot]) for slot in SLOTS), *((c, c) for c in s["corrections"])]:
    ranges = next(table[name] for table in (*SLOTS.values(), CORRECTIONS) if name in table)
    k[slot] = {x.strip("[]"): held("number", rng.uniform(*ranges[x])) for x in s["keys"][name]}
    if "ddof" in k[slot]:
      k[slot]["ddof"] = np.round(k[slot]["ddof"])
  if s["advantage"] == "optimal_baseline":
    k["advantage"]["lengths"] = rng.integers(0, 9, s["responses"]) * 1.0
  if s["advantage"] == "decoupled":
    k["advantage"]["weights"] = held("number", rng.uniform(-1, 2, 2))
  return a, k


def DTYPES(s, name):
  dtype = s["dtypes"].get(name, np.float32)
  return np.float32 if dtype == np.float64 and not s["x64"] else dtype


# The comparison.


def build(s, k):
  """The objective, its numbers from all batches."""
  slots = {}
  for slot in SLOTS:
    slots[slot] = partial(getattr(getattr(gpo, slot + "s"), s[slot]), **k[slot])
  corrections = []
  for name in s["corrections"]:
    more = {"level": getattr(gpo.levels, s["levels"][name])} if "importance" in name else {}
    corrections.append(partial(getattr(gpo.corrections, name), **k[name], **more))
  if s["divergence"]:
    slots |= {"divergence": getattr(gpo.divergences, s["divergence"]), "beta": k["beta"]}
  return gpo.Objective(**slots, corrections=tuple(corrections), allow_token_weighting=True)


def run_all(s, batches, traces):
  """All batches of a structure, in one compiled call."""
  a, k = jax.tree.map(lambda *x: np.stack(x), *batches)
  if s["grouped"] and "lengths" in k["advantage"]:
    k["advantage"]["lengths"] = k["advantage"]["lengths"].reshape(len(batches), -1)
  casts = {"x": "x", "rewards": "rewards", "mask": "mask", "old": "others", "ref": "others"}
  casts |= {"sampler": "others", "factor": "others", "entropy": "others"}
  for name in set(casts) & set(a):
    dtype = s["mask"] if name == "mask" else s["dtypes"][casts[name]]
    a[name] = jax.tree.map(lambda x: x.astype(dtype), a[name])

  def one(objective, a):
    traces.append(s)
    optional = {f"{name}_log_probs": a.get(name) for name in ("ref", "sampler")}
    optional |= {name: a.get(name) for name in ("segment_ids", "group_ids")}
    rollout = objective.prepare(a["rewards"], a["mask"], a.get("old"), **optional)
    if "factor" in a:
      rollout = rollout.replace(factor=a["factor"])
    if "entropy" in a:
      factor = gpo.corrections.entropy_mask(a["entropy"], rollout, quantile=a["quantile"])
      rollout = rollout.replace(factor=factor)

    def loss(x):
      head = {name: a.get(name) for name in ("temperature", "softcap") if name in a}
      if s["kind"] == "linear":
        head |= {"bias": x[2] if s["bias"] else None} | s["settings"]
        return gpo.linear_loss(objective, x[0], x[1], a["tokens"], rollout, **head)[0]
      if s["kind"] == "logits":
        where = a["mask"].astype(bool)[..., None]
        x = [gpo.token_log_probs(x[0], a["tokens"], where=where, **head)]
      return objective(x[0], rollout)[0]

    return jax.value_and_grad(loss)(a["x"])

  each = (lambda o, a: jax.lax.map(lambda x: one(*x), (o, a))) if s["map"] else jax.vmap(one)
  losses, gradients = jax.jit(each)(build(s, k), a)
  assert losses.dtype == (np.float64 if s["x64"] else np.float32)
  assert {g.dtype for g in gradients} == {np.dtype(DTYPES(s, "x"))}
  return np.asarray(losses), [np.asarray(g).astype(float) for g in gradients]


def judge(s, batch, loss, gradients):
  """The largest gap in terms of what rounding allows, and the loss's in terms of Σ|terms|."""
  a, k = dict(batch[0]), batch[1]
  if k["poisoned"]:
    return np.inf if np.isfinite(loss) else 0.0, 0.0, 0.0
  precision = lambda name: 2.0 ** (-53 if s["x64"] and s["dtypes"][name] == np.float64 else -24)
  u = 2.0 ** (-53 if s["x64"] else -24)
  if s["kind"] == "log_probs":
    a["new"], a["e"], pull = a["x"][0], np.zeros(s["shape"]), lambda g, e: [(g, e)]
  else:
    a["new"], a["e"], pull = from_logits(s, a, a, precision("x"))
  with np.errstate(all="ignore"):
    expected, e_loss, g, e_g, absolute, most = expect(s, a, k, u, precision("rewards"))
    if most > 1e37 and not s["x64"]:
      return None
    pairs = [(loss, expected, e_loss, 0.0)]
    epsilon = float(jnp.finfo(DTYPES(s, "x")).eps)
    pulled = pull(g, e_g + 2 * precision("x") * np.abs(g))
    pairs += [(x, y, e, epsilon) for x, (y, e) in zip(gradients, pulled)]
    gaps = []
    for actual, y, e, cast in pairs:
      gap = np.abs(actual - y) / (2 * e + cast * np.abs(y) + 1e-37)
      gap = np.where(np.isnan(gap), np.where(e > UNSURE / 1e40, 0, np.inf), gap)
      gaps.append(np.max(gap, initial=0))
  return max(gaps), np.abs(loss - expected) / (absolute or 1), e_loss / (absolute or 1)


def run(seed, traces, **forced):
  """One structure, its batches and what the package makes of them."""
  s = draw_structure(np.random.default_rng(seed), **forced)
  batches = [draw_batch(s, np.random.default_rng([seed, i])) for i in range(DRAWS)]
  jax.config.update("jax_enable_x64", s["x64"])
  try:
    losses, gradients = run_all(s, batches, traces)
  finally:
    jax.config.update("jax_enable_x64", False)
  return s, [(batch, losses[i], [g[i] for g in gradients]) for i, batch in enumerate(batches)]


def soak(seed, traces):
  s, results = run(seed, traces)
  return s, [judge(s, *result) for result in results]


# The controls: another reference is told from the right one.
def two_sided(x, a, epsilon_low=0.2, **_):
  return np.clip(np.exp(x), 1 - epsilon_low, 1 + epsilon_low) * a, np.exp(x) * a


def differentiated(x, a, **k):
  value, slope = cispo(x, a, **k)
  return value, slope * (1 + x)


WRONG = {
  "k3 reversed": ({"divergence": "k3"}, DIVERGENCE, lambda r, d: (excess(r), np.expm1(r))),
  "k3 with k2's slope": ({"divergence": "k3"}, DIVERGENCE, lambda r, d: (excess(-r), r)),
  "two-sided clip": ({"surrogate": "clip"}, SURROGATE, two_sided),
  "differentiated weight": ({"surrogate": "cispo"}, SURROGATE, differentiated),
  "mean of means": (
    {"weighting": "token_mean"},
    "weights",
    lambda _, m: RIGHT[0]("sequence_mean", m),
  ),
  "sum for mean": (
    {"level": "sequence"},
    "level",
    lambda _, *x, **k: RIGHT[1]("sequence_sum", *x, **k),
  ),
  "another ddof": (
    {"advantage": "standardize"},
    "of_group",
    lambda *x, ddof=1.0, **k: RIGHT[2](*x, ddof=1 - ddof, **k),
  ),
  "a bound of 19": ({"level": "sequence_sum"}, "bounded", lambda x: np.clip(x, -19, 19)),
}
RIGHT = weights, level, of_group


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reference_is_found(name, monkeypatch):
  forced, target, wrong = WRONG[name]
  results = [run(seed, [], **forced, kind="log_probs") for seed in range(SEED, SEED + 4)]
  verdicts = lambda: [judge(s, *result) for s, each in results for result in each]
  assert max(verdict[0] for verdict in verdicts() if verdict) <= 1
  table, key = (globals(), target) if isinstance(target, str) else (target, *forced.values())
  monkeypatch.setitem(table, key, wrong)
  found = np.mean([verdict[0] > 1 for verdict in verdicts() if verdict])
  print(f"{name}: found in {found:.0%}")
  assert found > 0.1


@pytest.mark.slow
def test_random_objectives_on_random_batches():
  begin, traces, verdicts, worst = time.process_time(), [], [], {}
  for seed in range(SEED, SEED + STRUCTURES):
    s, of_batches = soak(seed, traces)
    assert len(traces) == seed - SEED + 1  # one trace for all of its batches
    for i, verdict in enumerate(of_batches):
      verdicts.append(verdict)
      if verdict is not None:
        where = f"GPO_SOAK_SEED={seed} GPO_SOAK_STRUCTURES=1, batch {i}"
        assert verdict[0] <= 1, f"{where}: {verdict}, {s}"
        names = (*(s[slot] for slot in SLOTS), s["divergence"] or "none", s["kind"])
        for name in (*names, *s["corrections"]) if s["dtypes"]["x"] != ml_dtypes.bfloat16 else ():
          relative = verdict[1] if verdict[2] < 1e3 * 2.0 ** (-53 if s["x64"] else -24) else 0
          key = s["x64"], name
          worst[key] = np.maximum(worst.get(key, (0, 0)), (verdict[0], relative))
    assert time.process_time() - begin < CPU_SECONDS, f"{len(verdicts)} in time"
  tested = [verdict for verdict in verdicts if verdict is not None]
  for (x64, name), (gap, relative) in sorted(worst.items()):
    print(
      f"float{64 if x64 else 32} {name:20} {gap:.2f} of the bound; loss {relative:.1e} of Σ|terms|"
    )
  sharp = [np.mean([verdict[2] < limit for verdict in tested]) for limit in (1e-5, 1e-3)]
  print(f"{len(verdicts)} configurations, {len(tested)} within float32's range")
  print(f"bounds below 1e-5 and 1e-3 of Σ|terms|: {sharp[0]:.0%}, {sharp[1]:.0%}")
  assert len(tested) > 0.9 * len(verdicts)
  assert sharp[1] > 0.6


# A long training run.


def resident():
  """The process's memory in MiB, and the number of arrays that are alive."""
  gc.collect()
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(jax.live_arrays())


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_long_run_on_ever_staler_samples():
  """The demo's own update; its sampler is refreshed after 1, 2, 3, … updates."""
  pytest.importorskip("flax")
  pytest.importorskip("tqdm")
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    figures = train_on_stale_samples(STEPS)
  print(f"\n{figures}")
  (early, arrays), (late, arrays_late), (leaking, arrays_leaking) = figures["memory"]
  assert figures["compiled"] == 1
  assert arrays_late == arrays
  assert late - early < MEMORY
  assert figures["stalest"] > 1.5  # the ratios say that samples were stale
  assert leaking - late > MEMORY  # the control: states that are kept are seen
  assert arrays_leaking > arrays


def train_on_stale_samples(steps):
  import optax
  from flax import nnx

  import gpo_jax.demo.run as experiment
  from gpo_jax.demo import task, train
  from gpo_jax.demo.config import Config
  from gpo_jax.demo.policy import Policy

  config = Config(steps=steps, seed=SEED, warm_start_until=0.2)
  keys = jax.random.split(jax.random.key(config.seed), 4)
  problems, _ = task.split(keys[0])
  adam = optax.adam(config.supervised_rate)
  step = train.supervised_step(config.warm_start_batch, adam, problems)
  state = train.start(Policy(nnx.Rngs(keys[1])), adam)
  arm = experiment.Arm("warm start")
  warm = experiment.warm_start(arm, step, state, keys[2], config.warm_start_until)
  step, state = experiment.reinforcement("gpo", config, warm.policy, problems)

  @jax.jit
  def finite(tree):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))

  compiled, memory, stalest, rewards, kept = set(), [], 0.0, [], []
  sampler, age, patience, begin = state.sampler, 0, 1, time.perf_counter()
  for number in range(steps + LEAKING):
    state, metrics = step(state._replace(sampler=sampler), jax.random.fold_in(keys[3], number))
    assert finite((state, metrics)), (number, metrics)
    compiled.add(step._cache_size())
    stalest = max(stalest, float(metrics["ratio_max"]))
    rewards = [*rewards[-49:], float(metrics["reward"])]
    age += 1
    if age == patience:
      sampler, age, patience = state.policy, 0, patience + 1
    if number in (steps // 4, steps - 1):
      memory.append(resident())
    if number % 100 == 99:
      seconds = time.perf_counter() - begin
      figures = f"reward {np.mean(rewards):.2f}, ratio to {stalest:.1f}, every {patience}"
      print(number + 1, f"{seconds:.0f} s", figures, resident(), flush=True)
    if number >= steps:
      kept.append(state)
  memory.append(resident())
  return {
    "steps": steps,
    "memory": memory,
    "compiled": max(compiled),
    "stalest": stalest,
    "reward": float(np.mean(rewards)),
    "refreshed every": patience,
    "seconds": time.perf_counter() - begin,
  }
