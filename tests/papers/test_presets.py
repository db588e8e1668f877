"""Every preset against its paper: value, gradient, branches, invariants, and wrong papers."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support import reference
from tests.support.quick import jit

PRESETS = gpo.presets.PRESETS
REQUIRED = {"dr_grpo": {"length": 7.0}}
# Their loss has log ρ in the place of log π: the same gradient, and another constant.
CONSTANT_DIFFERS = {"cispo", "rloo", "vespo", "topr", "gpg", "max_rl"}
SEEDS = (0, 1, 2)
SHAPE = (8, 4, 6)
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}
KINK = 1e-6

# One other value for every keyword, chosen so that it changes what these inputs give.
OTHER = {
  "beta": 0.3,
  "length": 11.0,
  "epsilon_low": 0.1,
  "epsilon_high": 0.5,
  "high": 2.0,
  "low": 0.5,
  "temperature_pos": 1.7,
  "temperature_neg": 0.6,
  "threshold": 0.1,
  "dppo.low": 0.1,
  "dppo.high": 0.05,
  "k_pos": 1.3,
  "lambda_pos": 0.9,
  "k_neg": 0.7,
  "lambda_neg": 1.1,
}
KEYWORDS = [(name, key) for name in PRESETS for key in inspect.signature(PRESETS[name]).parameters]
WITH_BETA = [name for name, key in KEYWORDS if key == "beta" and name != "distill"]
OF_REWARDS = [name for name in PRESETS if name not in ("ppo", "distill")]


def other(name, key):
  return OTHER.get(f"{name}.{key}", OTHER[key])


every_preset = pytest.mark.parametrize("name", PRESETS)
every_preset_of_rewards = pytest.mark.parametrize("name", OF_REWARDS)
traces = []


def loss_of(objective, log_probs, rollout):
  traces.append(None)
  return objective(log_probs, rollout)[0]


compiled = jit(jax.value_and_grad(loss_of, argnums=1))


def make(name, **hyperparameters):
  return PRESETS[name](**(REQUIRED.get(name, {}) | hyperparameters))


def draw(seed, policy="off", dtype=np.float64, shape=SHAPE):
  """Samples of every awkward kind, and the current log-probabilities.

  Of the eight groups one has 0/1 rewards, one equal rewards, one an empty row whose reward would be
  seen if it counted, one a single response, one none. Every group has responses that have hardly
  moved, some, and a lot. Old log-probabilities are absent for policy "none", the current for "on".
  """
  rng = np.random.default_rng(seed)
  new = np.log(rng.uniform(0.05, 0.95, shape))
  moves = np.tile([3e-4, 0.3, 1.0, 1.0][-shape[1] :], (shape[0], 1))
  moves = rng.permuted(moves, axis=1)[..., None]
  drift = 1.5 * rng.normal(size=(*shape[:2], 1))
  old = np.minimum(new + moves * (rng.normal(size=shape) + drift), -1e-3)
  ref = np.minimum(new + 0.5 * rng.normal(size=shape), -1e-3)
  sampler = np.minimum(old + 0.3 * rng.normal(size=shape), -1e-3)
  rewards = rng.normal(size=shape[:2])
  mask = np.arange(shape[2]) < rng.integers(2, shape[2] + 1, shape[:2])[..., None]
  mask[0, :, 1] = False
  if shape == SHAPE:
    rewards[1] = [0, 1, 0, 0]
    rewards[2] = 0.1
    rewards[3, 2], mask[3, 2] = 1e3, False
    mask[4, 1:] = False
    mask[5] = False
  if policy != "off":
    old = new if policy == "on" else None
    sampler = None
  elif seed == SEEDS[-1]:
    sampler = None
  arrays = [None if x is None else x.astype(dtype) for x in (rewards, old, ref, sampler, new)]
  rewards, old, ref, sampler, new = arrays
  return reference.Batch(rewards, mask, old, ref, sampler), new


def prepare(objective, batch):
  needs_ref = objective.divergence is not None
  rewards, advantages = batch.rewards, None
  if objective.advantage is None:
    rewards, advantages = None, reference.advantages_of(batch, reference.standardized)
  return objective.prepare(
    rewards,
    batch.mask,
    batch.old,
    advantages=advantages,
    ref_log_probs=batch.ref if needs_ref else None,
    sampler_log_probs=batch.sampler,
  )


def evaluate(objective, batch, log_probs):
  loss, gradient = compiled(objective, jnp.asarray(log_probs), prepare(objective, batch))
  return np.asarray(loss), np.asarray(gradient)


def widen(array):
  return array if array is None or array.dtype == bool else array.astype(float)


def expect(name, batch, log_probs, **hyperparameters):
  """What the paper says, in float64, with our constant."""
  loss = getattr(reference, name)
  hyperparameters = REQUIRED.get(name, {}) | hyperparameters
  batch, log_probs = reference.Batch(*map(widen, batch)), widen(log_probs)
  value, gradient = reference.gradient(loss, batch, log_probs, **hyperparameters)
  if name in CONSTANT_DIFFERS:
    old = log_probs if batch.old is None else batch.old
    value -= complex(loss(batch, old, log_probs, **hyperparameters)).real
  return value, gradient


def gradient_gap(actual, expected):
  """The largest disagreement of two gradients, relative to the largest gradient expected."""
  size = np.max(np.abs(expected[1]))
  assert size > 0
  return np.max(np.abs(actual[1] - expected[1])) / size


def gap(actual, expected):
  """The larger of the gradients' disagreement and the losses', or NaN."""
  size = max(np.max(np.abs(expected[1])), abs(expected[0]))
  return np.maximum(abs(actual[0] - expected[0]) / size, gradient_gap(actual, expected))


@pytest.fixture
def branches():
  reference.BRANCHES.clear()
  yield reference.BRANCHES
  reference.BRANCHES.clear()


def assert_away_from_kinks(branches):
  for what, distances in branches.items():
    assert np.min(np.abs(distances)) > KINK, what


def assert_taken_both_ways(branches):
  """Every comparison went both ways, and both limits of a clip left some between them."""
  for what, distances in branches.items():
    assert min(distances) < 0 < max(distances), what
    lower = branches.get(what.replace("upper", "lower"))
    if "upper" in what and lower:
      assert any(up < 0 < low for up, low in zip(distances, lower, strict=True)), what


def test_every_preset_has_a_reference_and_every_keyword_another_value():
  assert len(PRESETS) >= 21
  for name in PRESETS:
    assert callable(getattr(reference, name)), name
    assert getattr(gpo, name) is PRESETS[name]
    keys = inspect.signature(PRESETS[name]).parameters
    assert set(inspect.signature(getattr(reference, name)).parameters) - set(keys) == {
      "batch",
      "log_probs",
      "frozen",
    }
  assert {key for _, key in KEYWORDS} == {key.split(".")[-1] for key in OTHER}


# 1. The paper's value and gradient.


@every_preset
def test_off_policy_in_float64(name, x64, branches):
  for seed in SEEDS:
    batch, log_probs = draw(seed)
    expected = expect(name, batch, log_probs)
    assert gap(evaluate(make(name), batch, log_probs), expected) < TOLERANCE[np.float64]
  assert_away_from_kinks(branches)
  assert_taken_both_ways(branches)


@pytest.mark.quick("deepseek_v32", "gspo", "gpg", "gmpo", "cispo", "vespo")
@every_preset
def test_off_policy_in_float32(name, branches):
  for seed in SEEDS[:2]:
    batch, log_probs = draw(seed, dtype=np.float32)
    expected = expect(name, batch, log_probs)
    actual = evaluate(make(name), batch, log_probs)
    assert actual[0].dtype == actual[1].dtype == np.float32
    assert gap(actual, expected) < TOLERANCE[np.float32]
  assert_away_from_kinks(branches)


@pytest.mark.parametrize("policy", ["none", "on"])
@every_preset
def test_on_policy(name, policy, x64):
  batch, log_probs = draw(3, policy)
  expected = expect(name, batch, log_probs)
  assert gap(evaluate(make(name), batch, log_probs), expected) < TOLERANCE[np.float64]


@every_preset_of_rewards
def test_groups_of_one(name, x64):
  batch, log_probs = draw(4, shape=(5, 1, 6))
  objective = make(name)
  if name == "reinforce_plus_plus":  # whose statistics are over the batch
    actual, expected = evaluate(objective, batch, log_probs), expect(name, batch, log_probs)
    assert gap(actual, expected) < TOLERANCE[np.float64]
    return
  with pytest.raises(ValueError, match=r"groups of at least 2; got \[5, 1\], groups of one"):
    prepare(objective, batch)


@every_preset_of_rewards
def test_equal_rewards_teach_exactly_nothing(name):
  mask = np.ones((4, 7, 3), bool)
  mask[0, :4] = False
  constants = np.array([0.1, 1 / 3, 0.7, 1e6 + 0.1], np.float32)
  for constant in constants:
    for value in (constants[:, None], constant):
      rewards = np.broadcast_to(value, (4, 7))
      if name != "reinforce_plus_plus" or value is constant:
        assert not np.any(make(name).prepare(rewards, mask).advantages)


def test_the_specification_is_the_preset_of_its_name(x64):
  batch, log_probs = draw(0)
  objective = gpo.gpo()
  rollout = prepare(objective, batch)
  advantages = np.broadcast_to(rollout.advantages, batch.mask.shape)
  probabilities = [np.exp(x[batch.mask]) for x in (log_probs - batch.old, log_probs, batch.ref)]
  ratios, current, ref = probabilities
  expected = -gpo.gpo_objective(ratios, advantages[batch.mask], current, ref)
  np.testing.assert_allclose(objective(log_probs, rollout)[0], expected, rtol=1e-13)


# 2. Hyperparameters.


@pytest.mark.parametrize(("name", "key"), KEYWORDS)
def test_every_keyword(name, key, x64, branches):
  changed = 0
  for seed in SEEDS:
    batch, log_probs = draw(seed)
    keyword = {key: other(name, key)}
    expected = expect(name, batch, log_probs, **keyword)
    actual = evaluate(make(name, **keyword), batch, log_probs)
    assert gap(actual, expected) < TOLERANCE[np.float64]
    changed = max(changed, gap(evaluate(make(name), batch, log_probs), expected))
  assert changed > 1e-6
  assert_away_from_kinks(branches)
  assert_taken_both_ways(branches)


@pytest.mark.parametrize("epsilon", [1.0, 1.5, 10.0])
@pytest.mark.parametrize(
  "name", ["gpo", "grpo", "dr_grpo", "reinforce_plus_plus", "deepseek_v32", "r1"]
)
def test_a_clip_as_wide_as_one_has_no_lower_limit(name, epsilon, x64):
  """R1 was trained with ε = 10: 1 − ε is no ratio, 1 + ε still is a limit."""
  batch, log_probs = draw(0)
  expected = expect(name, batch, log_probs, epsilon_low=epsilon)
  assert (
    gap(evaluate(make(name, epsilon_low=epsilon), batch, log_probs), expected)
    < TOLERANCE[np.float64]
  )


@pytest.mark.parametrize("name", WITH_BETA)
def test_without_beta(name, x64):
  batch, log_probs = draw(0)
  expected = expect(name, batch, log_probs, beta=None)
  actual = evaluate(make(name, beta=None), batch._replace(ref=None), log_probs)
  assert gap(actual, expected) < TOLERANCE[np.float64]
  assert gap(evaluate(make(name), batch, log_probs), expected) > 1e-6
  same = evaluate(make(name).replace(divergence=None, beta=None), batch, log_probs)
  np.testing.assert_array_equal(same[1], actual[1])


# 3. Masked positions.


@every_preset
def test_garbage_in_masked_positions_is_invisible(name):
  batch, log_probs = draw(0, dtype=np.float32)
  objective = make(name)
  clean = evaluate(objective, batch, log_probs)
  assert np.isfinite(clean[0])
  assert clean[1][batch.mask].any()
  assert not clean[1][~batch.mask].any()
  rewards = np.where(batch.mask.any(-1), batch.rewards, np.nan)
  for garbage in (np.nan, np.inf, -np.inf, 1e30):
    dirty = [np.where(batch.mask, x, np.float32(garbage)) for x in (log_probs, *batch[2:])]
    batch_of_garbage = batch._replace(
      rewards=rewards, **dict(zip(("old", "ref", "sampler"), dirty[1:], strict=True))
    )
    assert not np.array_equal(dirty[0], log_probs)
    actual = evaluate(objective, batch_of_garbage, dirty[0])
    for ours, cleans in zip(actual, clean, strict=True):
      assert ours.tobytes() == cleans.tobytes(), garbage


# 4. On-policy, every surrogate is REINFORCE.


def surrogate_gradient(objective, policy, seed=0, **slots):
  batch, log_probs = draw(seed, policy)
  objective = objective.replace(divergence=None, beta=None, **slots)
  return evaluate(objective, batch, log_probs)[1]


@pytest.mark.parametrize("policy", ["none", "on"])
@every_preset
def test_on_policy_is_reinforce(name, policy, x64):
  objective = make(name)
  batch, _ = draw(0, policy)
  actual = surrogate_gradient(objective, policy)
  reinforce = surrogate_gradient(
    objective,
    policy,
    surrogate=gpo.surrogates.reinforce,
    level=gpo.levels.token,
    corrections=(),
  )
  # The ratio of a whole response moves with every token, and none of its L is divided out again.
  lengths = batch.mask.sum(-1, keepdims=True) if name == "r1" else 1
  size = np.max(np.abs(actual))
  np.testing.assert_allclose(actual, reinforce * lengths, rtol=0, atol=1e-14 * size)
  rollout = prepare(objective, batch)
  explicit = -np.asarray(rollout.weights) * np.asarray(rollout.advantages) * lengths
  np.testing.assert_allclose(actual, explicit, rtol=0, atol=1e-14 * size)
  assert size > 0


@pytest.mark.parametrize("policy", ["none", "on"])
def test_on_policy_levels_agree(policy, x64):
  expected = surrogate_gradient(make("grpo"), policy)
  for name in ("gspo", "gspo_token", "gmpo", "sapo"):
    actual = surrogate_gradient(make(name), policy)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14 * np.max(np.abs(expected)))
  batch, _ = draw(0)
  lengths = batch.mask.sum(-1, keepdims=True)
  assert len(set(lengths[batch.mask.any(-1)].ravel())) > 2
  for name in ("r1", "luspo"):
    actual = surrogate_gradient(make(name), policy)
    np.testing.assert_allclose(
      actual, expected * lengths, rtol=0, atol=1e-14 * np.max(np.abs(expected * lengths))
    )


def test_off_policy_is_not_reinforce(x64):
  """The control of the reduction: off-policy only the REINFORCE family still equals it."""
  for name in set(PRESETS) - {"rloo", "gpg", "max_rl"}:
    slots = {
      "surrogate": gpo.surrogates.reinforce,
      "level": gpo.levels.token,
      "corrections": (),
    }
    expected = surrogate_gradient(make(name), "off", **slots)
    difference = surrogate_gradient(make(name), "off") - expected
    assert np.max(np.abs(difference)) > 1e-2 * np.max(np.abs(expected)), name


# 5. Relations between presets.


@pytest.mark.parametrize("seed", SEEDS)
def test_gspo_token_is_gspo_where_a_response_has_one_advantage(seed, x64):
  batch, log_probs = draw(seed)
  wide = {"epsilon_low": 0.2, "epsilon_high": 0.3}
  for keywords in ({}, wide):
    gspo, token = (make(name, **keywords) for name in ("gspo", "gspo_token"))
    expected = evaluate(gspo, batch, log_probs)
    assert gap(evaluate(token, batch, log_probs), expected) < 1e-14
  # With advantages that differ from token to token it is not.
  rollout = prepare(gspo, batch)
  steps = np.arange(1.0, 1 + SHAPE[2]).reshape(1, 1, -1)
  rollout = rollout.replace(advantages=rollout.advantages * steps)
  results = [compiled(objective, jnp.asarray(log_probs), rollout)[1] for objective in (gspo, token)]
  assert np.max(np.abs(results[0] - results[1])) > 1e-2 * np.max(np.abs(results[0]))


@pytest.mark.parametrize("policy", ["none", "on"])
def test_luspo_on_policy_is_the_policy_gradient(policy, x64):
  batch, log_probs = draw(0, policy)
  advantages = reference.advantages_of(batch, reference.standardized)
  responses = np.sum(batch.mask.any(-1))
  expected = np.where(batch.mask, -advantages[..., None] / responses, 0)
  actual = evaluate(make("luspo"), batch, log_probs)[1]
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)


def test_luspo_is_gspo_times_length(x64):
  batch, log_probs = draw(0)
  gspo, luspo = (evaluate(make(name), batch, log_probs)[1] for name in ("gspo", "luspo"))
  np.testing.assert_allclose(luspo, gspo * batch.mask.sum(-1, keepdims=True), rtol=1e-12)


# 6. Controls: a wrong paper does not agree.


def forget_stop_gradient(name):
  loss = getattr(reference, name)
  return lambda batch, log_probs, _, **keywords: loss(batch, log_probs, log_probs, **keywords)


def everyone(batch):
  prompts, samples, _ = batch.mask.shape
  return [[(p, i) for i in range(samples)] for p in range(prompts)]


def arithmetic_ratio(tokens):
  return reference.mean([reference.exp(token.new - token.old) for token in tokens])


def summed_ratio(tokens):
  return reference.exp(sum(token.new - token.old for token in tokens))


def two_sided(ratio, advantage, low, high):
  """clip(ρ)A, without the minimum."""
  value = reference.real(ratio)
  return (ratio if low < value < high else low if value < high else high) * advantage


@functools.cache
def right(name, seed):
  return expect(name, *draw(seed))


k3 = reference.k3
WRONG = {
  "limits swapped": ("dapo", {}, {"epsilon_low": 0.28, "epsilon_high": 0.2}),
  "limits of a token": ("gspo", {}, {"epsilon_low": 0.2, "epsilon_high": 0.28}),
  "no minimum": ("grpo", {"clipped": two_sided}, {}),
  "mean of means": ("dapo", {"token_mean": reference.mean_of_means}, {}),
  "mean over tokens": ("grpo", {"mean_of_means": reference.token_mean}, {}),
  "mean for sum": ("rloo", {"mean_of_sums": reference.mean_of_means}, {}),
  "ddof 0": ("grpo", {"DDOF": 0}, {}),
  "ddof 0, batch": ("reinforce_plus_plus", {"DDOF": 0}, {}),
  "another eps": ("grpo", {"EPS": 1e-6}, {}),
  "not divided by std": ("grpo", {"standardized": reference.centered}, {}),
  "divided by std": ("dr_grpo", {"centered": reference.standardized}, {}),
  "itself in the baseline": ("rloo", {"leave_one_out": reference.centered}, {}),
  "empty rows in the groups": ("grpo", {"present": everyone}, {}),
  "k3 reversed": ("grpo", {"k3": lambda new, ref: k3(ref, new)}, {}),
  "k3 reversed, v32": ("deepseek_v32", {"k3": lambda new, ref: k3(ref, new)}, {"beta": 0.001}),
  "k3 reversed, r1": ("r1", {"k3": lambda new, ref: k3(ref, new)}, {}),
  "1/ρ": ("grpo", {"ratio_of": lambda token: reference.exp(token.old - token.new)}, {}),
  "1/ρ, distill": ("distill", {"ratio_of": lambda token: reference.exp(token.old - token.new)}, {}),
  "k3 reversed, distill": ("distill", {"k3": lambda new, ref: k3(ref, new)}, {}),
  "no minimum, ppo": ("ppo", {"clipped": two_sided}, {}),
  "mean of means, ppo": ("ppo", {"token_mean": reference.mean_of_means}, {}),
  "1/ρ, dppo": ("dppo", {"ratio_of": lambda token: reference.exp(token.old - token.new)}, {}),
  "ratio not divided by length": ("gspo", {"geometric_ratio": summed_ratio}, {}),
  "arithmetic mean": ("luspo", {"geometric_ratio": arithmetic_ratio}, {}),
  "relative limit": ("cispo", {}, {"high": 5.0}),
  "signs swapped": ("sapo", {}, {"temperature_pos": 1.05, "temperature_neg": 1.0}),
  "kernels swapped": (
    "vespo",
    {},
    {"k_pos": 3.0, "lambda_pos": 2.0, "k_neg": 2.0, "lambda_neg": 3.0},
  ),
  "differentiated weight": ("cispo", {"cispo": forget_stop_gradient("cispo")}, {}),
  "differentiated kernel": ("vespo", {"vespo": forget_stop_gradient("vespo")}, {}),
  "differentiated taper": ("topr", {"topr": forget_stop_gradient("topr")}, {}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reference_disagrees(wrong, x64, monkeypatch):
  name, patches, hyperparameters = WRONG[wrong]
  samples = [draw(seed) for seed in SEEDS]
  actual = [evaluate(make(name), *sample) for sample in samples]
  for ours, seed in zip(actual, SEEDS):
    assert gap(ours, right(name, seed)) < TOLERANCE[np.float64]
  for attribute, value in patches.items():
    monkeypatch.setattr(reference, attribute, value)
  wrongs = [expect(name, *sample, **hyperparameters) for sample in samples]
  assert max(gradient_gap(ours, wrong) for ours, wrong in zip(actual, wrongs)) > 1e-6


@pytest.mark.parametrize("name", ["deepseek_v32", "dppo"])
def test_the_masks_are_of_the_sampler(name, x64):
  """The control of the masks: measured from log π_old they are others."""
  gaps = []
  for seed in SEEDS:
    batch, log_probs = draw(seed)
    without = expect(name, batch._replace(sampler=None), log_probs)
    gaps.append(gradient_gap(evaluate(make(name), batch, log_probs), without))
  assert max(gaps) > 1e-2


# 7. Compilation.

KINDS = [
  float,
  np.float64,
  np.float32,
  np.asarray,
  jnp.asarray,
  lambda value: jnp.asarray(value, jnp.float32),
  lambda value: int(value + 1),
  lambda value: np.int32(value + 1),
  lambda value: jnp.asarray(int(value + 1)),
]


@every_preset
def test_one_trace_for_all_values(name):
  batch, log_probs = draw(0, dtype=np.float32)
  keys = inspect.signature(PRESETS[name]).parameters
  none = [key for key, p in keys.items() if p.default is None]
  start = {key: 0.1 for key in none}
  objective = make(name, **start)
  rollout = prepare(objective, batch)
  losses = {float(compiled(objective, log_probs, rollout)[0])}
  before = len(traces)
  for key in keys:
    for kind in KINDS:
      loss, _ = compiled(make(name, **start | {key: kind(other(name, key))}), log_probs, rollout)
      assert np.isfinite(loss)
      losses.add(float(loss))
  assert len(traces) == before
  assert len(losses) > len(keys)


# 8. As objects.


@every_preset
def test_pickle_repr_and_replace(name):
  batch, log_probs = draw(0, dtype=np.float32)
  objective = make(name)
  rollout = prepare(objective, batch)
  loss, gradient = compiled(objective, log_probs, rollout)
  copy = pickle.loads(pickle.dumps(objective))
  again, gradient_again = compiled(copy, log_probs, rollout)
  assert loss == again
  np.testing.assert_array_equal(gradient, gradient_again)
  assert jax.tree.structure(copy) == jax.tree.structure(objective)
  assert repr(copy) == repr(objective)

  text = repr(objective)
  assert text.startswith("Objective(surrogate=")
  assert "\n" not in text
  for slot in ("surrogate", "level", "weighting", *(("advantage",) if objective.advantage else ())):
    assert f"{slot}={getattr(objective, slot).func.__name__}" in text
  for unreadable in ("<", "0x", "array", "Partial", "None"):
    assert unreadable not in text
  for key, parameter in inspect.signature(PRESETS[name]).parameters.items():
    value = REQUIRED.get(name, {}).get(key, parameter.default)
    assert value is None or f"{value:.6g}" in text

  other = objective.replace(weighting=gpo.weightings.sequence_sum)
  assert other.weighting.func is gpo.weightings.sequence_sum
  assert other.surrogate.func is objective.surrogate.func
  assert repr(objective) == text
