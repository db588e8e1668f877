"""The soak: random objectives on random, extreme batches beside float64, and a long training run.

GPO_SOAK_STRUCTURES objectives, each compiled once, are run on BATCHES batches each. A failure names
its seed: GPO_SOAK_SEED=… GPO_SOAK_STRUCTURES=1 repeats that structure and its batches alone.
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
from tests.support import naive

SEED = int(os.environ.get("GPO_SOAK_SEED", "0"))
STRUCTURES = int(os.environ.get("GPO_SOAK_STRUCTURES", "210"))
BATCHES = 48
CPU_SECONDS = 960 * STRUCTURES / 210  # 8 minutes on two idle cores; neighbours do not count
STEPS = int(os.environ.get("GPO_SOAK_STEPS", "300"))
LEAKING = 100  # updates whose states, 1.2 MB each, are kept, as a control
MEMORY = 24.0  # MiB: the control keeps 120, of which some fits in memory that was freed before
VOCABULARY, HIDDEN = 7, 3
DIRECTIONS = 6  # in which gradients are compared

# Random structures and batches.


def pick(rng, options):
  options = list(options)
  return options[rng.integers(len(options))]


def draw_structure(rng, **forced):
  often = lambda share: bool(rng.random() < share)
  s = {"kind": "log_probs" if often(0.7) else pick(rng, ["logits", "linear", "linear"])}
  s |= {slot: pick(rng, options) for slot, options in naive.SLOTS.items()}
  s["divergence"] = pick(rng, naive.DIVERGENCES) if often(0.7) else None
  s["corrections"] = tuple(pick(rng, naive.CORRECTIONS) for _ in range(pick(rng, [0, 0, 1, 1, 2])))
  s |= {"x64": often(0.15), "packed": often(0.3), "old": often(0.85), "sampler": often(0.5)}
  s |= {"grouped": often(0.3), "bias": often(0.5), "softcap": often(0.3)}
  s["more"] = pick(rng, [None, None, "factor", "entropy"])
  s |= forced
  s["grouped"] &= s["advantage"] != "batch_standardize"
  s["sampler"] |= any("importance" in name or name == "reject" for name in s["corrections"])
  s["old"] |= s["sampler"] and bool({"vespo", "topr"} & set(s["corrections"]))
  s["responses"] = int(rng.integers(1, 5)), int(rng.integers(2, 6))
  length = int(rng.integers(4, 16) if s["packed"] else rng.integers(1, 9))
  s["shape"] = (s["responses"][:1] if s["packed"] else s["responses"]) + (length,)
  types = [np.float64] if s["x64"] else [np.float32, np.float32, ml_dtypes.bfloat16]
  s["types"] = {name: pick(rng, types) for name in ("x", "others", "rewards")}
  s["mask"] = pick(rng, [bool, np.int32, np.float32])
  names = (*(s[slot] for slot in naive.SLOTS), *s["corrections"])
  s["keys"] = {x: [y for y in naive.RANGES.get(x, ()) if "[" not in y or often(0.5)] for x in names}
  s["levels"] = {x: pick(rng, ["token", "sequence", "sequence_product"]) for x in s["corrections"]}
  s["settings"] = {"chunk_size": pick(rng, [None, 1, 3]), "tile_size": pick(rng, [None, 2, 5])}
  return s


def draw_batch(s, rng):
  """One batch, float64 numbers that its types can hold, and the numbers of the objective."""
  shape, some = s["shape"], lambda options: pick(rng, options)
  held = lambda name, x: np.asarray(x).astype(s["types"].get(name, np.float32)).astype(float)
  garbage = some([np.nan, np.inf, -np.inf, 1e30, 0.0])
  mask = rng.random(shape) < some([1.0, 0.7, 0.2])
  mask[rng.random(shape[:-1]) < some([0, 0.3])] = False  # empty rows
  mask[rng.random(shape[0]) < some([0, 0, 0.3])] = False  # empty groups
  a = {"mask": mask}
  if s["packed"]:
    ids = np.sort(rng.integers(1, s["responses"][1] + 1, shape), -1)
    a["segment_ids"] = np.where(mask, ids, rng.integers(-3, 9, shape))
  if s["grouped"]:
    a["group_ids"] = rng.integers(-2, 2, s["responses"])

  base = np.minimum(-rng.exponential(1.5, shape) * some([1, 1, 1e-6]), 0)
  if s["kind"] != "log_probs":
    last = VOCABULARY if s["kind"] == "logits" else HIDDEN
    x = [rng.normal(size=(*shape, last)) * some([0.1, 1, 30])]
    if s["kind"] == "linear":
      x += [rng.normal(size=(VOCABULARY, HIDDEN)), *[rng.normal(size=VOCABULARY)] * s["bias"]]
    a["x"] = [held("x", y) for y in x]
    a["tokens"] = np.where(mask, rng.integers(0, VOCABULARY, shape), some([-1, 99]))
    a["temperature"] = held("number", rng.uniform(0.5, 2))
    if s["softcap"]:
      a["softcap"] = held("number", rng.uniform(5, 30))
    exact = naive.Noise(rng, 0)
    base = naive.log_probs(s, a, [y[None, None] for y in a["x"]], exact, exact)
    base = base[0, 0].real.reshape(shape)
    a["x"][0] = np.where(mask[..., None], a["x"][0], garbage)

  def drifted(name):
    x = base + rng.normal(size=shape) * some([0, 1e-6, 1e-3, 0.3, 2])
    x = np.where(rng.random(shape) < some([0, 0, 0.3]), x - some([50, 1e4]), x)
    return np.where(mask, held(name, np.minimum(x, 0)), garbage)

  if s["kind"] == "log_probs":
    a["x"] = [drifted("x")]
  used = {"old": s["old"], "ref": s["divergence"], "sampler": s["sampler"]}
  a |= {name: drifted("others") for name, given in used.items() if given}
  if s["more"]:
    data = rng.exponential(size=shape) * (rng.random(shape) < 0.8)
    a[s["more"]] = np.where(mask, held("others", data), garbage)
    a["quantile"] = held("number", rng.uniform(0, 1))

  size = ((2,) if s["advantage"] == "decoupled" else ()) + s["responses"]
  rewards = some([rng.normal(size=size), rng.integers(0, 2, size), rng.integers(0, 2, size) / 10])
  rewards = rewards * some([1, 1, 1e20, 1e-20]) + some([0, 0, 0, 1000])
  rewards = np.where(rng.random((*size[:-1], 1)) < some([0, 0.5]), rewards[..., :1], rewards)
  there = np.zeros(s["responses"], bool)
  for place, _ in naive.responses(s, a):
    there[place] = True
  a["rewards"] = np.where(there, held("rewards", rewards), garbage)

  k = {"beta": held("number", rng.uniform(0.001, 0.5))}
  chosen = {slot: s[slot] for slot in naive.SLOTS} | dict(zip(s["corrections"], s["corrections"]))
  for slot, name in chosen.items():
    numbers = {x.strip("[]"): rng.uniform(*naive.RANGES[name][x]) for x in s["keys"][name]}
    k[slot] = {x: held("number", np.round(y) if x == "ddof" else y) for x, y in numbers.items()}
  if s["advantage"] == "optimal_baseline":
    k["advantage"]["lengths"] = rng.integers(0, 9, s["responses"]) * 1.0
  if s["advantage"] == "decoupled":
    k["advantage"]["weights"] = held("number", rng.uniform(-1, 2, 2))
  return a, k


# The comparison.


def build(s, k):
  """The objective, with the numbers of one batch."""
  slots = {x: partial(getattr(getattr(gpo, x + "s"), s[x]), **k[x]) for x in naive.SLOTS}
  corrections = []
  for name in s["corrections"]:
    more = (
      {"level": getattr(gpo.levels, s["levels"][name])}
      if "importance" in name or name == "reject"
      else {}
    )
    corrections.append(partial(getattr(gpo.corrections, name), **k[name], **more))
  if s["divergence"]:
    slots |= {"divergence": getattr(gpo.divergences, s["divergence"]), "beta": k["beta"]}
  return gpo.Objective(**slots, corrections=tuple(corrections), allow_token_weighting=True)


def run_all(s, batches, traces):
  """Losses and gradients of all batches of a structure, in one compiled call."""
  a, k = jax.tree.map(lambda *x: np.stack(x), *batches)
  if s["grouped"] and "lengths" in k["advantage"]:
    k["advantage"]["lengths"] = k["advantage"]["lengths"].reshape(len(batches), -1)
  kinds = {"x": "x", "rewards": "rewards"}
  kinds |= dict.fromkeys(("old", "ref", "sampler", "factor", "entropy"), "others")
  for name in set(kinds) & set(a):
    a[name] = jax.tree.map(lambda x: x.astype(s["types"][kinds[name]]), a[name])
  a["mask"] = a["mask"].astype(s["mask"])

  def one(both):
    k, a = both
    traces.append(s)
    objective = build(s, k)
    optional = {f"{name}_log_probs": a.get(name) for name in ("ref", "sampler")}
    optional |= {name: a.get(name) for name in ("segment_ids", "group_ids")}
    rollout = objective.prepare(a["rewards"], a["mask"], a.get("old"), **optional)
    if "factor" in a:
      rollout = rollout.replace(factor=a["factor"])
    if "entropy" in a:
      factor = gpo.corrections.entropy_mask(a["entropy"], rollout, quantile=a["quantile"])
      rollout = rollout.replace(factor=factor)

    def loss(x):
      numbers = {name: a[name] for name in ("temperature", "softcap") if name in a}
      if s["kind"] == "linear":
        head = gpo.Head(x[1], x[2] if s["bias"] else None, **numbers)
        tiling = gpo.Tiling(**s["settings"])
        return gpo.linear_loss(objective, x[0], head, a["tokens"], rollout, tiling=tiling)[0]
      if s["kind"] == "logits":
        support = a["mask"].astype(bool)[..., None]
        x = [gpo.token_log_probs(x[0], a["tokens"], support=support, **numbers)]
      return objective(x[0], rollout)[0]

    return jax.value_and_grad(loss)(a["x"])

  losses, gradients = jax.jit(partial(jax.lax.map, one))((k, a))
  assert losses.dtype == (np.float64 if s["x64"] else np.float32)
  assert {g.dtype for g in gradients} == {np.dtype(s["types"]["x"])}
  return np.asarray(losses), [np.asarray(g).astype(float) for g in gradients]


def judge(s, batch, loss, gradients):
  """The largest gap as a share of what rounding allows, and what it allows of Σ|terms|."""
  (a, k), rng = batch, np.random.default_rng(1)
  unit = 2.0 ** (-53 if s["x64"] else -24)
  cast = float(jnp.finfo(s["types"]["x"]).eps)
  extra = [-1] * (a["x"][0].ndim - a["mask"].ndim)
  active = np.broadcast_to(np.expand_dims(a["mask"], extra), a["x"][0].shape)
  x = [np.where(active, a["x"][0], 0), *a["x"][1:]]
  assert not np.any(gradients[0][~active])
  if not active.any():
    return float(loss != 0), 0.0
  density = rng.choice([3 / x[0].size, 1], DIRECTIONS)
  along = [
    rng.normal(size=(DIRECTIONS, *y.shape)) * (density > rng.random((DIRECTIONS, *y.shape)).T).T
    for y in x
  ]
  along[0] = along[0] * active
  moved = [(y + 1e-30j * v)[None] for y, v in zip(x, along, strict=True)]
  with np.errstate(all="ignore"):
    terms, lost = naive.expect(s, a, k, moved, (unit, cast if s["kind"] == "linear" else unit))
  sums = terms.sum((2, 3))
  sizes = np.abs(terms.real).sum((2, 3)), np.abs(terms.imag).sum((2, 3)) / 1e-30
  found = [(loss, sums[:, 0].real, sizes[0][0, 0], 0)]
  for i in range(DIRECTIONS):
    products = np.concatenate([np.ravel(g * v[i]) for g, v in zip(gradients, along, strict=True)])
    more = cast * np.abs(products).sum()
    found.append((products.sum(), sums[:, i].imag / 1e-30, sizes[1][0, i], more))
  gaps, shares = [], []
  for got, expected, size, more in found:
    allowed = 16 * np.max(np.abs(expected - expected[0])) + 32 * unit * size + more + lost
    gaps.append(np.abs(got - expected[0]) / allowed)
    shares.append(float(allowed) / max(float(size), 1e-300))
  return np.max(gaps), shares[0]


def run(seed, traces, **forced):
  """One structure, its batches and what the package makes of them."""
  s = draw_structure(np.random.default_rng(seed), **forced)
  batches = [draw_batch(s, np.random.default_rng([seed, i])) for i in range(BATCHES)]
  with jax.enable_x64(s["x64"]):
    losses, gradients = run_all(s, batches, traces)
  return s, [(batch, losses[i], [g[i] for g in gradients]) for i, batch in enumerate(batches)]


# The controls: another reference is told from the right one.
WRONG = {
  "k3 reversed": ("divergence", "k3", lambda r, d, m: naive.k3(-r)),
  "k3 with k2's slope": ("divergence", "k3", naive.DIVERGENCES["straight_through"]),
  "no clip": ("surrogate", "clip", lambda x, a, **k: np.exp(x) * a),
  "differentiated weight": ("surrogate", "cispo", lambda x, a, **k: naive.cispo(x, a, **k) * x),
  "mean of means": ("weighting", "token_mean", naive.WEIGHTINGS["sequence_mean"]),
  "sum for mean": ("level", "sequence", naive.LEVELS["sequence_product"]),
  "another ddof": (
    "advantage",
    "standardize",
    lambda r, noise, ddof=1.0, **k: naive.standardize(r, noise, ddof=1 - ddof, **k),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reference_is_found(name, monkeypatch):
  slot, right, wrong = WRONG[name]
  forced = {slot: right, "kind": "log_probs"}
  results = [run(seed, [], **forced) for seed in range(SEED, SEED + 4)]
  gaps = lambda: np.array([judge(s, *result)[0] for s, each in results for result in each])
  assert np.all(gaps() <= 1)
  monkeypatch.setitem((naive.SLOTS | {"divergence": naive.DIVERGENCES})[slot], right, wrong)
  found = np.mean(gaps() > 1)
  print(f"{name}: found in {found:.0%}")
  assert found > 0.1


@pytest.mark.slow
def test_random_objectives_on_random_batches():
  begin, traces, verdicts = time.process_time(), [], []
  for seed in range(SEED, SEED + STRUCTURES):
    s, results = run(seed, traces)
    assert len(traces) == seed - SEED + 1  # one trace for all of its batches
    for i, result in enumerate(results):
      gap, share = judge(s, *result)
      where = f"GPO_SOAK_SEED={seed} GPO_SOAK_STRUCTURES=1, batch {i}"
      assert gap <= 1, f"{where}: {gap} of what rounding allows, {s}"
      verdicts.append((gap, share))
    assert time.process_time() - begin < CPU_SECONDS, f"{len(verdicts)} in time"
  gaps, shares = np.array(verdicts).T
  sharp = [np.mean(shares < limit) for limit in (1e-5, 1e-3)]
  print(f"\n{len(gaps)} configurations; gaps up to {gaps.max():.2f} of what rounding allows,")
  print(f"which is below 1e-5 and 1e-3 of Σ|terms| in {sharp[0]:.0%} and {sharp[1]:.0%}")
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
  assert arrays_late <= arrays
  assert late - early < MEMORY
  assert figures["stalest"] > 1.5  # the ratios say that samples were stale
  assert leaking - late > MEMORY  # the control: states that are kept are seen
  assert arrays_leaking > arrays


def train_on_stale_samples(steps):
  import optax
  from flax import nnx

  import examples.demo.run as experiment
  from examples.demo import task, train
  from examples.demo.config import Config
  from examples.demo.policy import Policy

  config = Config(steps=steps, seed=SEED, warm_start_until=0.2)
  keys = jax.random.split(jax.random.key(config.seed), 4)
  problems, _ = task.split(keys[0])
  adam = optax.adam(config.supervised_rate)
  step = train.supervised_step(config.warm_start_batch, adam, problems)
  state = train.start(Policy(nnx.Rngs(keys[1])), adam)
  arm = experiment.Arm("warm start")
  warm = experiment.warm_start(arm, step, state, keys[2], config.warm_start_until)
  step, state = experiment.rl_arm("gpo", config, warm.policy, problems)

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
