"""Claims of the README, the pages and the docstrings that no other test would miss."""

import inspect
import math
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from examples.demo.config import Config
from gpo_jax import _linear, advantages, corrections, divergences, levels, log_probs, weightings
from tests import test_divergences as enumeration
from tests.batches import PRESETS, batch, relative_error, value_and_grad
from tests.test_log_probs import temporaries

BATCH = batch()
LOG_PROBS = jnp.asarray(BATCH.log_probs)
ROOT = pathlib.Path(__file__).parent.parent


def run(objective, **changes):
  return value_and_grad(objective, LOG_PROBS, BATCH.prepare(objective, **changes))


def response(advantage, *values):
  """One response's log-probabilities, and its rollout, in which all others are 0."""
  x = jnp.array(values)
  rollout = gpo.Rollout(
    advantages=jnp.array(advantage),
    mask=jnp.ones_like(x),
    weights=jnp.ones_like(x),
    old_log_probs=jnp.zeros_like(x),
    ref_log_probs=jnp.zeros_like(x),
  )
  return x, rollout


def text_of(page):
  """A page of the documentation, its lines joined."""
  return " ".join((ROOT / page).read_text().split())


# --- advantages ----------------------------------------------------------------------------------


def test_pass_at_k_gives_nothing_to_a_shared_first_place():
  np.testing.assert_array_equal(advantages.pass_at_k([2.0, 2.0, 1.0]), 0)


def test_max_rl_climbs_the_logarithm_of_the_chance_of_success():
  size, success = 300, 0.3
  slope = 0.0
  for k in range(size + 1):
    chance = math.comb(size, k) * success**k * (1 - success) ** (size - k)
    rewards = np.array([1.0] * k + [0.0] * (size - k), np.float32)
    score = np.where(rewards == 1, 1 / success, -1 / (1 - success))
    slope += chance * np.mean(advantages.max_rl(rewards) * score)
  np.testing.assert_allclose(slope, 1 / success, rtol=1e-5)


def test_groups_by_id_hold_64_values_per_sample_at_a_time():
  samples = 4096
  standardize = partial(advantages.by_group, advantages.standardize)
  memory = temporaries(lambda r: standardize(r, jnp.arange(samples) // 8), (samples,))
  assert memory < 8 * 4 * 64 * samples


def test_groups_by_id_of_sharded_rewards_are_not_sharded():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
  rewards = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
  value = advantages.by_group(advantages.center, rewards, jnp.arange(8))
  assert not rewards.sharding.is_fully_replicated
  assert value.sharding.is_fully_replicated


# --- levels --------------------------------------------------------------------------------------


def test_geometric_clips_an_advantage_of_0_like_a_negative_one():
  np.testing.assert_allclose(levels.geometric(*response(0.0, 1.0, -1.0)), 0.3, rtol=1e-6)
  np.testing.assert_allclose(levels.geometric(*response(-1.0, 1.0, -1.0)), 0.3, rtol=1e-6)
  np.testing.assert_allclose(levels.geometric(*response(1.0, 1.0, -1.0)), -0.3, rtol=1e-6)


def test_a_level_averages_first_and_is_bounded_afterwards():
  _, terms = gpo.gspo()(*response(1.0, 40.0, -20.0))
  np.testing.assert_allclose(terms.log_ratio, 10, rtol=1e-6)
  np.testing.assert_allclose(terms.token_log_ratio, [20, -20], rtol=1e-6)


def test_a_levels_number_has_a_gradient(x64):
  data = batch(dtype=np.float64)
  rollout = data.prepare(gpo.gmpo())
  loss = lambda clip: gpo.gmpo(clip=clip)(data.log_probs, rollout)[0]
  slope = jax.grad(loss)(0.25)
  numeric = (loss(0.25 + 1e-6) - loss(0.25 - 1e-6)) / 2e-6
  np.testing.assert_allclose(slope, numeric, rtol=1e-6)
  assert slope != 0


# --- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("weighting", "exact"),
  [
    (weightings.token_mean, False),
    (weightings.sequence_mean, False),
    (weightings.token_sum, True),
    (weightings.sequence_sum, True),
    (partial(weightings.constant_length, length=1.0), True),
  ],
)
def test_sequence_unbiased_is_exact_where_weights_do_not_depend_on_lengths(weighting, exact, x64):
  logits, old, ref = enumeration.tables(0)
  mask = jnp.asarray(enumeration.MASK)
  weights = jax.vmap(weighting)(mask[:, None])[:, 0]  # each response is a batch of its own
  rollout = gpo.Rollout(
    advantages=jnp.zeros(len(mask)),
    mask=mask,
    weights=weights * jnp.exp(enumeration.response_log_probs(old))[:, None],
    old_log_probs=enumeration.token_log_probs(old),
    ref_log_probs=enumeration.token_log_probs(ref),
  )
  objective = gpo.gpo(beta=1.0).replace(divergence=divergences.sequence_unbiased)
  loss = lambda logits: objective(enumeration.token_log_probs(logits), rollout)[0]
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  true_value, true_gradient = enumeration.true_sequence_kl(logits, ref)
  assert enumeration.close(value, true_value) == exact
  assert enumeration.close(gradient, true_gradient) == exact


# --- corrections ---------------------------------------------------------------------------------

CORRECTIONS = [
  function
  for name, function in inspect.getmembers(corrections, inspect.isfunction)
  if function.__module__ == corrections.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda correction: correction.__name__)
@pytest.mark.parametrize("changes", [{}, {"old_log_probs": None}], ids=["stale", "on-policy"])
def test_a_correction_has_no_gradient(correction, changes):
  needed = "threshold" in inspect.signature(correction).parameters
  settings = {"threshold": 0.1} if needed else {}
  rollout = BATCH.prepare(gpo.dapo(), **changes)
  total = lambda x: jnp.sum(correction(x, rollout, **settings))
  np.testing.assert_array_equal(jax.grad(total)(LOG_PROBS), 0)


def test_the_weights_of_the_sampler_are_bounded():
  x, rollout = response(1.0, 0.0)
  rollout = rollout.replace(sampler_log_probs=jnp.array([-900.0]))
  weight = corrections.mask_importance(x, rollout, high=np.inf)
  np.testing.assert_allclose(weight, np.exp(20), rtol=1e-5)


@pytest.mark.parametrize(("advantage", "peak"), [(1.0, 2 / 3), (-1.0, 3 / 2)])
def test_vespo_is_highest_at_k_over_lambda(advantage, peak):
  ratios = [0.97 * peak, peak, 1.03 * peak]
  below, top, above = (corrections.vespo(*response(advantage, math.log(w)))[0] for w in ratios)
  assert top > below
  assert top > above


@pytest.mark.parametrize("ratio", [0.2, 0.5, 2.0, 5.0])
def test_vespo_fades_bad_responses_sooner_below_1_and_good_ones_sooner_above(ratio):
  good, bad = (corrections.vespo(*response(a, math.log(ratio)))[0] for a in (1.0, -1.0))
  assert bad < good if ratio < 1 else good < bad


# --- log-probabilities ---------------------------------------------------------------------------

VOCABULARY, WIDTH = 7, 4
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(*BATCH.mask.shape, WIDTH)), jnp.float32)
UNEMBEDDING = jnp.asarray(RNG.normal(size=(VOCABULARY, WIDTH)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, VOCABULARY, BATCH.mask.shape))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_log_probabilities_are_at_most_0(scale):
  hidden = scale * HIDDEN
  outputs = gpo.linear_token_log_probs(hidden, UNEMBEDDING, TOKENS, tile_size=2)
  assert (outputs.log_probs <= 0).all()
  assert (gpo.token_log_probs(hidden @ UNEMBEDDING.T, TOKENS) <= 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_entropy_and_exact_kl_of_half_precision_are_float32(dtype):
  hidden, unembedding = HIDDEN.astype(dtype), UNEMBEDDING.astype(dtype)
  assert gpo.token_entropy(hidden).dtype == jnp.float32
  assert gpo.exact_kl(hidden, hidden).dtype == jnp.float32
  outputs = gpo.linear_token_log_probs(hidden, unembedding, TOKENS)
  assert outputs.entropy.dtype == jnp.float32


def test_exact_kl_is_infinite_where_the_reference_excludes_a_token():
  assert gpo.exact_kl([[0.0, 0.0]], [[0.0, -np.inf]]) == np.inf


def test_linear_exact_kl_has_no_gradient_to_the_reference():
  def total(ref_hidden, ref_unembedding, ref_bias):
    kl = gpo.linear_exact_kl(HIDDEN, UNEMBEDDING, ref_hidden, ref_unembedding, ref_bias=ref_bias)
    return jnp.sum(kl)

  reference = (2 * HIDDEN, UNEMBEDDING[::-1], jnp.arange(float(VOCABULARY)))
  for gradient in jax.grad(total, argnums=(0, 1, 2))(*reference):
    np.testing.assert_array_equal(gradient, 0)


def test_linear_exact_kl_holds_several_chunks_of_logits():
  tokens, vocabulary, width = 1024, 8192, 8

  def memory(chunk_size):
    kl = partial(gpo.linear_exact_kl, chunk_size=chunk_size)
    total = lambda hidden, w: jnp.sum(kl(hidden, w, 2 * hidden, w))
    shapes = ((1, tokens, width), (vocabulary, width))
    return temporaries(jax.value_and_grad(total, argnums=(0, 1)), *shapes)

  several = 8 * 4 * 32 * vocabulary
  assert memory(chunk_size=32) < several
  assert memory(chunk_size=tokens) > several


@pytest.mark.parametrize(
  ("backend", "expected"), [("cpu", (512, 1024, True)), ("gpu", (512, 5000, False))]
)
def test_the_default_tiling_depends_on_the_backend(backend, expected, monkeypatch):
  hidden, head = log_probs._as_head(HIDDEN, jnp.zeros((5000, WIDTH)), None, None, 1.0)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  tiling = log_probs._tiling(hidden, head, chunk_size=None, tile_size=None, compact=None)
  assert tiling == expected


@pytest.mark.parametrize(
  "mask",
  [BATCH.mask, np.zeros_like(BATCH.mask), np.ones_like(BATCH.mask)],
  ids=["some", "none", "all"],
)
def test_compact_chunks_are_as_many_as_the_active_tokens_fill(mask):
  tiling = _linear.Tiling(chunk_size=5, tile_size=VOCABULARY, compact=True)
  assert _linear._Chunks(jnp.asarray(mask), tiling).count == math.ceil(mask.sum() / 5)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_terms_of_linear_loss_carry_no_gradient(name):
  objective = PRESETS[name]
  rollout = BATCH.prepare(objective)

  def of_terms(hidden):
    _, terms = gpo.linear_loss(objective, hidden, UNEMBEDDING, TOKENS, rollout)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(terms))

  np.testing.assert_array_equal(jax.grad(of_terms)(HIDDEN), 0)


# --- objective -----------------------------------------------------------------------------------


def test_weights_of_means_sum_to_1_and_of_an_empty_batch_to_0():
  for weighting in (weightings.token_mean, weightings.sequence_mean):
    np.testing.assert_allclose(jnp.sum(weighting(BATCH.mask)), 1, rtol=1e-6)
    np.testing.assert_array_equal(weighting(np.zeros_like(BATCH.mask)), 0)


def test_an_id_that_comes_back_is_one_response_to_advantages_and_two_to_weights_and_levels():
  rollout = gpo.grpo().prepare([[1.0, 0.0]], [[1, 1, 1]], segment_ids=[[1, 2, 1]])
  first, second = advantages.standardize([1.0, 0.0])
  np.testing.assert_allclose(rollout.advantages, [[first, second, first]], rtol=1e-6)
  np.testing.assert_allclose(rollout.weights, 1 / 3, rtol=1e-6)
  log_ratio = jnp.array([[0.1, 0.2, 0.4]])
  np.testing.assert_allclose(levels.sequence(log_ratio, rollout), log_ratio, rtol=1e-6)


def test_advantages_may_be_of_responses_or_of_tokens():
  objective = gpo.dapo()
  rollout = BATCH.prepare(objective)
  expected = value_and_grad(objective, LOG_PROBS, rollout)[1]
  of_tokens = jnp.broadcast_to(rollout.advantages, BATCH.mask.shape)
  for same in (of_tokens[..., 0], of_tokens[..., :1], of_tokens):
    gradient = value_and_grad(objective, LOG_PROBS, rollout.replace(advantages=same))[1]
    assert relative_error(gradient, expected) < 1e-6


def test_any_number_of_axes_may_come_before_the_samples():
  objective = gpo.grpo(beta=0.3)
  split = lambda x: x.reshape(2, 2, *x.shape[1:])
  rollout = jax.tree.map(split, BATCH.prepare(objective))
  gradient = value_and_grad(objective, split(LOG_PROBS), rollout)[1]
  expected = run(objective)[1]
  assert relative_error(gradient.reshape(expected.shape), expected) < 1e-6


def test_a_slot_sees_bools_for_a_mask_and_zeros_in_the_padding():
  def of_everything(ref_log_ratio, log_ratio, rollout):
    assert rollout.mask.dtype == bool
    fields = [x for x in vars(rollout).values() if x is not None and x is not rollout.mask]
    return sum(jnp.abs(x) for x in (ref_log_ratio, log_ratio, *fields))

  dirty = jnp.where(BATCH.mask, LOG_PROBS, jnp.nan)
  names = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
  objective = gpo.grpo().replace(divergence=of_everything)
  arrays = dict.fromkeys(names, dirty) | {"mask": BATCH.mask.astype(int)}
  rollout = BATCH.prepare(objective, **arrays)
  rollout = rollout.replace(advantages=dirty, factor=dirty, weights=dirty)
  _, terms = objective(dirty, rollout)
  np.testing.assert_array_equal(terms.divergence[~BATCH.mask], 0)


def test_a_factor_in_the_rollout_has_no_gradient():
  rollout = BATCH.prepare(gpo.dapo())
  loss = lambda factor: gpo.dapo()(LOG_PROBS, rollout.replace(factor=factor))[0]
  np.testing.assert_array_equal(jax.grad(loss)(LOG_PROBS), 0)


def test_a_term_of_ones_own_by_the_weights_is_weighted_as_the_loss_is():
  objective = gpo.grpo(beta=0.3)
  rollout = BATCH.prepare(objective)

  def own_term(log_probs):
    k3 = divergences.k3(log_probs - BATCH.ref_log_probs, None, None)
    return 0.3 * jnp.sum(rollout.weights * k3, where=rollout.mask)

  gradient = run(gpo.grpo(beta=None))[1] + jax.grad(own_term)(LOG_PROBS)
  assert relative_error(gradient, run(objective)[1]) < 1e-5


def test_with_x64_weights_and_loss_are_float64_and_the_gradient_is_of_its_inputs_dtype(x64):
  objective = gpo.grpo()
  rollout = BATCH.prepare(objective)
  value, gradient = value_and_grad(objective, LOG_PROBS, rollout)
  assert rollout.weights.dtype == value.dtype == jnp.float64
  assert gradient.dtype == jnp.float32


@pytest.mark.parametrize("name", ["grpo", "cispo", "gmpo", "dppo", "topr"])
@pytest.mark.parametrize("distance", [-3.0, 3.0])
def test_what_a_level_a_correction_or_cispo_cuts_off_is_not_counted_as_clipped(name, distance):
  objective, stale = PRESETS[name], LOG_PROBS - distance
  rollout = BATCH.prepare(objective, old_log_probs=stale, sampler_log_probs=stale)
  metrics = gpo.summarize(objective(LOG_PROBS, rollout)[1], rollout)
  if name == "grpo":  # the control, whose surrogate clips
    assert metrics["clip_fraction"] > 0.2
  else:
    assert metrics["clip_fraction"] == 0
  if name == "dppo":
    assert metrics["dropped_fraction"] > 0.2


# --- documentation pages -------------------------------------------------------------------------


def test_the_objective_for_trls_rloo_is_ours_on_policy():
  trl = gpo.r1(beta=None).replace(advantage=advantages.leave_one_out)
  gradients = [run(o, old_log_probs=LOG_PROBS)[1] for o in (trl, gpo.rloo())]
  assert relative_error(*gradients) < 1e-5


def test_the_expressions_on_the_page_on_migrating_fit_their_slots():
  page = (ROOT / "docs/migrating.md").read_text()
  expressions = re.findall(r"`((?:partial\(|gpo\.|lambda r)[^`]*)`", page)
  assert len(expressions) > 20
  known = {"partial": partial, "gpo": gpo, "jnp": jnp, "mask": BATCH.mask, "epsilon_high": 4.0}
  for expression in expressions:
    made = eval(expression.replace("…", "2.0"), vars(gpo) | known)
    if isinstance(made, partial):
      module = made.func.__module__.removeprefix("gpo_jax.")
      slot = {"corrections": (made,)} if module == "corrections" else {module[:-1]: made}
      made = gpo.dapo().replace(**slot)
    elif not isinstance(made, gpo.Objective):
      made = gpo.dapo().replace(advantage=made)
    assert isinstance(made, gpo.Objective), expression


def test_the_defaults_of_mask_importance_are_those_on_the_page_on_migrating():
  parameters = inspect.signature(corrections.mask_importance).parameters
  low, high, level = (parameters[name].default for name in ("low", "high", "level"))
  assert (low, high, level) == (0.5, 5.0, levels.token)
  assert f"here {low}, {high} and the token's level" in text_of("docs/migrating.md")


def test_bfloat16_rounds_as_the_page_on_numerics_says():
  def largest_rounding_error(start):
    x = np.linspace(start * 1.1, start, 10_001)
    return np.max(np.abs(x - x.astype(jnp.bfloat16).astype(float)))

  page = text_of("docs/numerics.md")
  info = jnp.finfo(jnp.bfloat16)
  below, above = 1 - float(info.epsneg), 1 + float(info.eps)
  assert (below, above) == (1 - 1 / 256, 1 + 2 / 256)
  assert f"The numbers next to 1 are {below:.3f} and {above:.3f}" in page
  at_1, at_4 = largest_rounding_error(-1.0), largest_rounding_error(-4.0)
  np.testing.assert_allclose([at_1, at_4], [1 / 256, 1 / 64], rtol=1e-2)
  assert f"by up to {at_1:.3f} at −1 and {at_4:.3f} at −4" in page


def test_the_demos_recipe_is_the_one_in_the_readme():
  recipe = f"{Config().steps} updates of {Config().prompts} prompts × {Config().samples} samples"
  assert recipe in text_of("README.md")
