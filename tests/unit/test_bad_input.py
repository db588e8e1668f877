"""Bad and odd input at every public entry: a right answer, or an error that says what to do."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import Rollout, advantages, corrections, divergences, levels, surrogates, weightings
from tests.support.batches import NEEDED


@pytest.fixture(autouse=True)
def _as_users_have_it():
  """Without this suite's strictness: what is refused here, the package refuses by itself."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


# --- every entry with a right call
# In every array the first place counts; the last one does not where there is a mask.

RNG = np.random.default_rng(0)


def draw(*shape, sign=-1):
  """Numbers that every float dtype holds exactly."""
  return (sign * RNG.integers(1, 16, shape) / 8).astype(np.float32)


OBJECTIVE = gpo.deepseek_v32(beta=0.5)  # it reads every array of a rollout
MASK = np.array([[[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]], bool)
IDS = np.array([[1, 1, 2, 2, 3, 0], [1, 2, 2, 0, 0, 0]])
REWARDS, TOKENS = np.array([[1.0, 0.25, 0.5]], np.float32), RNG.integers(0, 5, MASK.shape)
NAMES = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
LOG_PROBS, PACKED_LOG_PROBS = draw(*MASK.shape), draw(*IDS.shape)
PLAIN = {"rewards": REWARDS, "mask": MASK} | {name: draw(*MASK.shape) for name in NAMES}
PACKED = {"rewards": draw(2, 3), "mask": IDS > 0, "segment_ids": IDS, "group_ids": IDS[:, ::2] // 2}
PACKED |= {name: draw(*IDS.shape) for name in NAMES}
ROLLOUT = OBJECTIVE.prepare(**PLAIN)
FIELDS = {k: np.asarray(v) for k, v in vars(ROLLOUT).items() if v is not None}
FIELDS |= {"factor": draw(*MASK.shape, sign=1), "segment_ids": np.ones(MASK.shape, int)}
FIELDS |= {"log_probs": LOG_PROBS}
SAMPLES = {name: draw(3, sign=1) for name in ("ratios", "advantages", "pi_current", "pi_ref")}
WHERE = np.array([[1, 1, 1], [1, 1, 0]], bool)
LOGITS = {"logits": draw(2, 5), "support": np.array([1, 1, 1, 1, 0], bool)}
STATES = {"hidden": draw(1, 3, 4, 2), "unembedding": draw(5, 2), "bias": draw(5)}
KL = STATES | {"ref_" + name: draw(*value.shape) for name, value in STATES.items()}
LINEAR = STATES | {"tokens": TOKENS}


def of_head(function):
  """Makes a function of a head one of its arrays."""

  def call(unembedding, bias=None, temperature=1.0, softcap=None, **given):
    return function(head=gpo.Head(unembedding, bias, softcap, temperature), **given)

  return call


def divergence(ref_unembedding, ref_bias=None, **given):
  return of_head(functools.partial(gpo.linear_divergence, gpo.vocabulary.kl))(
    ref_head=gpo.Head(ref_unembedding, ref_bias), **given
  )


def as_rollout(mask):
  return Rollout(advantages=REWARDS, mask=mask, weights=mask)


BY_REWARDS = {"rewards": draw(2, 3), "where": WHERE}
BY_MASK = {"mask": IDS > 0, "segment_ids": IDS}

# fmt: off
ENTRIES = {
  "gpo_objective": (gpo.gpo_objective, SAMPLES),
  "gpo_value_and_grad": (gpo.gpo_value_and_grad, SAMPLES),
  "gpo_objective_per_group": (
    gpo.gpo_objective_per_group, {name: np.tile(x, (2, 1)) for name, x in SAMPLES.items()}
  ),
  "gpo_loss": (gpo.gpo_loss, SAMPLES | {"where": WHERE[1]}),
  "token_log_probs": (gpo.token_log_probs, LOGITS | {"tokens": np.array([0, 3])}),
  "token_entropy": (gpo.token_entropy, LOGITS),
  "exact_kl": (gpo.exact_kl, LOGITS | {"ref_logits": draw(2, 5)}),
  "linear_token_log_probs": (of_head(gpo.linear_token_log_probs), LINEAR | {"mask": MASK}),
  "linear_loss": (
    of_head(lambda **x: gpo.linear_loss(OBJECTIVE, rollout=ROLLOUT, **x)[0]), LINEAR
  ),
  "linear_divergence": (divergence, KL | {"mask": MASK}),
  "prepare": (lambda **x: OBJECTIVE(LOG_PROBS, OBJECTIVE.prepare(**x))[0], PLAIN),
  "prepare packed": (lambda **x: OBJECTIVE(PACKED_LOG_PROBS, OBJECTIVE.prepare(**x))[0], PACKED),
  "objective": (lambda log_probs, **x: OBJECTIVE(log_probs, Rollout(**x))[0], FIELDS),
  "by_group": (
    functools.partial(advantages.by_group, advantages.center),
    BY_REWARDS | {"group_ids": IDS[:, ::2]},
  ),
  "optimal_baseline": (advantages.optimal_baseline, BY_REWARDS | {"lengths": draw(2, 3, sign=1)}),
  "decoupled": (
    advantages.decoupled,
    {"rewards": draw(2, 2, 3), "where": WHERE, "weights": draw(2, sign=1)},
  ),
  "generalized": (
    advantages.generalized, {"rewards": draw(2, 6), "values": draw(2, 6)} | BY_MASK
  ),
  "constant_length": (functools.partial(weightings.constant_length, length=8), BY_MASK),
  "entropy_mask": (
    lambda entropy, mask: corrections.entropy_mask(entropy, as_rollout(mask)),
    {"entropy": -LOG_PROBS, "mask": MASK},
  ),
  "covariance_mask": (
    lambda log_probs, mask: corrections.covariance_mask(
      log_probs, as_rollout(mask), fraction=0.3
    ),
    {"log_probs": LOG_PROBS, "mask": MASK},
  ),
}
for name in ("center", "standardize", "leave_one_out", "batch_standardize", "max_rl", "pass_at_k"):
  ENTRIES[name] = (getattr(advantages, name), BY_REWARDS)
for name in ("token_mean", "sequence_mean", "sequence_sum", "token_sum"):
  ENTRIES[name] = (getattr(weightings, name), BY_MASK)
# fmt: on

# Arguments that may be None, and what else of an argument is right.
OPTIONAL = {"old_log_probs", "sampler_log_probs", "segment_ids", "group_ids", "factor", "where"}
OPTIONAL |= {"bias", "ref_bias", ("decoupled", "weights"), ("linear_divergence", "mask"), "support"}
OPTIONAL |= {("prepare", "rewards"), ("prepare packed", "rewards")}  # advantages may be given
OPTIONAL |= {("linear_token_log_probs", "mask"), "ref_log_probs"}  # refused by its divergence
SEVERAL = {(name, "tokens") for name in ("token_log_probs", "linear_token_log_probs")}
BROADCASTS = {(name, "support") for name in ("token_log_probs", "token_entropy", "exact_kl")}
NO_PLACE_MASKED = {"unembedding", "bias", "ref_unembedding", "ref_bias", ("decoupled", "weights")}
DIFFERENTIABLE = ("gpo_loss", "token_log_probs", "token_entropy", "exact_kl", "linear_loss")
DIFFERENTIABLE += ("linear_token_log_probs", "linear_divergence", "prepare", "prepare packed")
DIFFERENTIABLE += ("objective",)
BANS = {"logits", "ref_logits", "hidden", "ref_hidden", *NO_PLACE_MASKED}  # −inf, or makes it
ENTRY = pytest.mark.parametrize("entry", ENTRIES)
ARGUMENTS = pytest.mark.parametrize(
  ("entry", "name"), [(entry, name) for entry, (_, given) in ENTRIES.items() for name in given]
)
is_mask = ("mask", "where", "support").__contains__
is_ids = ("tokens", "segment_ids", "group_ids").__contains__


@functools.cache
def compiled(entry):
  """The answer, and the gradient of its sum in all floats."""

  def run(given):
    floats = {k: x for k, x in given.items() if x.dtype == np.float32}
    answer = lambda floats: ENTRIES[entry][0](**given | floats)
    total = lambda floats: sum(jnp.sum(x) for x in jax.tree.leaves(answer(floats)))
    return answer(floats), jax.grad(total)(floats) if entry in DIFFERENTIABLE else None

  return jax.jit(run)


def right(entry):
  return compiled(entry)(ENTRIES[entry][1])[0]


def traced(function, given):
  """Traces a call whose arrays are not known, as in a user's compiled step."""
  arrays = {k: v for k, v in given.items() if isinstance(v, np.ndarray)}
  return jax.eval_shape(lambda arrays: function(**given | arrays), arrays)


# --- what is refused, in every argument

NOT_NUMBERS = [
  "ab", ["a", "b"], np.array([1j, 1]), [1.0, None], [[1.0], [1.0, 2.0]], {"a": 1}, [2**70, 1],
  np.zeros(2, jax.dtypes.float0), jax.random.split(jax.random.key(0), 2),
  np.array([1, 2], "datetime64[s]"), np.ma.array([1, 2], mask=[0, 1]),
]  # fmt: skip


@ARGUMENTS
def test_what_holds_no_numbers_is_refused_by_name(entry, name):
  function, given = ENTRIES[entry]
  none = [] if {name, (entry, name)} & OPTIONAL else [None]
  for value in NOT_NUMBERS + none:
    with pytest.raises(ValueError, match=rf"^{name} (must|needs)"):
      pytest.fail(f"{value!r}: {function(**given | {name: value})}")


@ARGUMENTS
def test_wrong_shapes_are_refused_by_name_while_tracing(entry, name):
  function, given = ENTRIES[entry]
  value = given[name]
  scalar = () if (entry, name) in BROADCASTS else (value.reshape(-1)[:1].reshape(()),)
  deeper = () if (entry, name) in SEVERAL else (value[..., None],)
  for wrong in (*deeper, value[..., :-1], value[None][:, :0], *scalar):
    shape = str(list(wrong.shape))[-5 if entry == "decoupled" else 0 :]  # it names one kind
    with pytest.raises(ValueError, match=rf"{name}.*{re.escape(shape)}"):
      pytest.fail(f"{wrong.shape}: {traced(function, given | {name: wrong})}")


@ENTRY
def test_empty_arrays_are_refused_and_leave_no_state(entry):
  function, given = ENTRIES[entry]
  for axis in (0, -1):
    empty = {k: v.take([], axis) for k, v in given.items()}
    with pytest.raises(
      ValueError, match="at least 1|not empty|must have|must be one|needs weights"
    ):
      pytest.fail(f"{traced(function, empty)}")
  assert jax.tree.map(jnp.shape, traced(function, given)) == jax.tree.map(jnp.shape, right(entry))


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if "prepare" not in entry])
def test_missing_and_superfluous_arguments_are_python_s_errors(entry):
  function, given = ENTRIES[entry]
  first = next(iter(given))
  with pytest.raises(TypeError, match=f"missing.*'{first}'"):
    function(**{name: value for name, value in given.items() if name != first})
  with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
    function(**given, gamma=0.9)


# --- numbers

OF_SAMPLES = ("gpo_objective", "gpo_value_and_grad", "gpo_objective_per_group", "gpo_loss")
OF_LOGITS = ("token_log_probs", "token_entropy", "exact_kl", "linear_token_log_probs")
OF_LOGITS += ("linear_loss", "linear_divergence")
SETTINGS = [(entry, name) for entry in OF_SAMPLES for name in ("epsilon", "beta")]
SETTINGS += [(entry, name) for entry in OF_LOGITS for name in ("temperature", "softcap")]
PRESETS = ("gpo", "dr_grpo", "dapo", "cispo", "sapo", "deepseek_v32", "vespo", "dppo")
PRESET_SETTINGS = [(n, k) for n in PRESETS for k in inspect.signature(getattr(gpo, n)).parameters]
loss_of = jax.jit(lambda objective: objective(LOG_PROBS, objective.prepare(**PLAIN))[0])
MAY_BE_NONE = ("softcap", "beta", "low", "epsilon_high")


@pytest.mark.parametrize(("entry", "name"), SETTINGS + PRESET_SETTINGS)
def test_settings_are_numbers_and_a_nan_is_loud(entry, name):
  def call(value):
    if (entry, name) in SETTINGS:
      function, given = ENTRIES[entry]
      return function(**given, **{name: value})
    return loss_of(getattr(gpo, entry)(**NEEDED.get(entry, {}) | {name: value}))

  none = [] if name in MAY_BE_NONE or (entry, name) == ("dppo", "high") else [None]
  for bad in ("0.2", 1j, [0.1, 0.2], {}, *none):
    with pytest.raises(ValueError, match=rf"^{name}\w* .*must (be a|hold)|^{name}\w* must"):
      pytest.fail(f"{bad}: {call(bad)}")
  if (entry, name) in SETTINGS and name in ("epsilon", "beta"):  # the others have ranges
    assert np.isnan(np.concatenate([np.ravel(x) for x in jax.tree.leaves(call(np.nan))])).any()


# --- what is odd but right

ODD = {  # floats, masks, ids
  "lists": (np.ndarray.tolist,) * 3,
  "strided, read-only": (lambda x: np.broadcast_to(x.repeat(2, -1)[..., ::2], x.shape),) * 3,
  "float16": (np.float16, np.uint8, np.uint8),
  "bfloat16": (lambda x: x.astype(jnp.bfloat16), np.float32, np.int8),
  "float64": (np.float64, np.int64, np.uint32),
}


@ENTRY
@pytest.mark.parametrize("kind", ODD)
def test_odd_arrays_give_the_same_answer(entry, kind):
  function, given = ENTRIES[entry]
  convert = {n: ODD[kind][1 if is_mask(n) else 2 if is_ids(n) else 0] for n in given}
  if entry == "objective" and "float16" in kind:
    convert["advantages"] = convert["weights"] = np.array  # which it does not hold exactly
  found = jax.tree.leaves(function(**{name: convert[name](x) for name, x in given.items()}))
  for x, y in zip(found, jax.tree.leaves(right(entry)), strict=True):
    rounding = 1e-2 if x.dtype != y.dtype else 2e-6  # a gradient has its argument's dtype
    np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=rounding, atol=1e-7)


step = jax.jit(lambda x, given: OBJECTIVE(x, OBJECTIVE.prepare(**given))[0])
by_group = advantages.by_group
ONES = Rollout(advantages=1.0, mask=jnp.ones(2), weights=jnp.ones(2))
# fmt: off
RIGHT = {
  "rewards of integers": (lambda: advantages.center([3, 1]), [1, -1]),
  "rewards of bools": (lambda: advantages.center([True, False]), [0.5, -0.5]),
  "4098 rows": (
    lambda: step(LOG_PROBS.repeat(1366, 0), {k: v.repeat(1366, 0) for k, v in PLAIN.items()}),
    lambda: right("prepare"),
  ),
  "4096 rewards by id": (
    lambda: by_group(advantages.center, np.arange(4096) % 2, np.arange(4096) // 2),
    np.tile([-0.5, 0.5], 2048),
  ),
  "one distribution": (lambda: gpo.token_log_probs([0, 0], 1), -np.log(2)),
  "scalars in a surrogate": (lambda: surrogates.clip(1, 2), 2.4),
  "integers in a divergence": (lambda: divergences.k3(jnp.array([1]), None, None), [np.exp(-1)]),
  "a level's mask of numbers": (lambda: levels.sequence(jnp.array([1.0, 3]), ONES), [2, 2]),
  "a masked token of -100": (
    lambda: of_head(gpo.linear_token_log_probs)(
      **STATES, mask=MASK, tokens=np.where(MASK, TOKENS, -100)
    ).log_probs,
    lambda: right("linear_token_log_probs").log_probs,
  ),
  "settings of any kind": (
    lambda: gpo.gpo_objective(**SAMPLES, epsilon=np.float16(0.5), beta=True),
    lambda: gpo.gpo_objective(**SAMPLES, epsilon=0.5, beta=1.0),
  ),
  "NumPy's integer": (
    lambda: of_head(gpo.linear_token_log_probs)(
      **LINEAR, tiling=gpo.Tiling(chunk_size=np.int64(2))
    ).log_probs,
    lambda: of_head(gpo.linear_token_log_probs)(**LINEAR).log_probs,
  ),
}
# fmt: on


@pytest.mark.parametrize("name", RIGHT)
def test_odd_input_has_the_right_answer(name):
  found, expected = (x() if callable(x) else x for x in RIGHT[name])
  np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- NaN and infinity, at every place


@pytest.mark.parametrize(
  ("entry", "name"),
  [(e, n) for e, (_, x) in ENTRIES.items() for n in x if x[n].dtype == np.float32],
)
def test_what_is_not_finite_is_loud_where_it_counts_and_invisible_where_it_does_not(entry, name):
  function, given = compiled(entry), ENTRIES[entry][1]
  masked = {"mask", "where"} & given.keys() and not {name, (entry, name)} & NO_PLACE_MASKED
  for bad in (np.nan,) if name in BANS else (np.nan, np.inf, -np.inf):
    first, last = given[name].copy(), given[name].copy()
    first.flat[0] = last.flat[-1] = bad
    found = jax.tree.leaves(function(given | {name: first})[0])
    assert not all(np.isfinite(x).all() for x in found), bad
    if masked:
      found = function(given | {name: last})
      jax.tree.map(np.testing.assert_array_equal, found, function(given))


# --- calls that mean something else

# fmt: off
PAIR = np.array([1.0, 0.0])
WRONG = {
  "traced numbers and None": (
    lambda: jax.jit(lambda x: gpo.gpo_objective([x, None], PAIR, PAIR, PAIR))(1.0), "ratios must"
  ),
  "traced numbers and arrays": (
    lambda: jax.jit(lambda x: gpo.gpo_objective([x, PAIR], PAIR, PAIR, PAIR))(1.0), "ratios must"
  ),
  "packed rows without ids": (
    lambda: OBJECTIVE.prepare(PACKED["rewards"], PACKED["mask"]),
    r"rewards must have one value per response, \[2\] .*got rewards \[2, 3\].*segment_ids",
  ),
  "ids without rewards of segments": (
    lambda: OBJECTIVE.prepare(REWARDS, MASK, segment_ids=np.ones(MASK.shape, int)),
    r"rewards must .*\[1, 3, S\].*got rewards \[1, 3\]",
  ),
  "ids that come back": (
    lambda: OBJECTIVE.prepare(np.ones((1, 3)), MASK[:, :1], segment_ids=[[[1, 2, 1, 7]]]),
    r"segment_ids must .*got 1 at \[0, 0, 2\], where at least 2 is",
  ),
  "ids from 0": (
    lambda: OBJECTIVE.prepare(np.ones((1, 3)), MASK[:, :1], segment_ids=[[[0, 0, 1, 1]]]),
    r"segment_ids must .*got 0 at \[0, 0, 0\], where at least 1 is",
  ),
  "a preset not called": (
    lambda: gpo.linear_loss(gpo.grpo, STATES["hidden"], STATES["unembedding"], TOKENS, ROLLOUT),
    "objective must be an Objective",
  ),
  "a preset not called, in a loss": (
    lambda: gpo.as_loss(gpo.grpo, lambda x: x)(LOG_PROBS, ROLLOUT), "objective must be an Objective"
  ),
  "no policy": (lambda: gpo.as_loss(OBJECTIVE, None), "policy must be a function"),
  "a policy that returns logits": (
    lambda: gpo.as_loss(OBJECTIVE, lambda x: x[..., None])(LOG_PROBS, ROLLOUT),
    r"log_probs must have the shape of mask; .*log_probs \[1, 3, 4, 1\]",
  ),
  "no chunk of a KL": (
    lambda: divergence(**KL, tiling=gpo.Tiling(chunk_size=0)), "chunk_size must be"
  ),
  "no advantage": (lambda: by_group(None, PAIR, [0, 0]), "advantage must be a function"),
  "a name": (lambda: by_group("center", PAIR, [0, 0]), "advantage must be a function"),
  "no group": (lambda: by_group(advantages.center, PAIR, None), "group_ids must"),
  "no kinds of reward": (lambda: advantages.decoupled(np.ones((0, 1, 3))), "rewards"),
  "no length": (lambda: weightings.constant_length(MASK, length=None), "length must"),
  "text for eps": (lambda: advantages.standardize(PAIR, eps="1e-4"), "eps must"),
}
# fmt: on


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_says_what_to_do(name):
  call, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    pytest.fail(f"{call()}")


# --- tracers and float0


@pytest.mark.slow
def test_a_leaked_tracer_is_jax_s_error_and_nothing_here_leaks_one():
  kept = []
  jax.jit(lambda x: kept.append(x) or x)(LOG_PROBS)
  for call in (
    lambda x: OBJECTIVE(x, ROLLOUT),
    lambda x: OBJECTIVE.prepare(REWARDS, x),
    lambda x: gpo.grpo(beta=x[0, 0, 0]),
    lambda x: gpo.token_log_probs(x, TOKENS[..., 0]),
  ):
    with pytest.raises(jax.errors.UnexpectedTracerError):
      call(kept[0])
  with jax.checking_leaks():
    for entry in ("prepare", "linear_loss", "by_group"):
      traced(*ENTRIES[entry])


@pytest.mark.parametrize("entry", ["objective", "linear_token_log_probs"])
def test_integers_and_bools_have_gradients_of_float0(entry):
  function, given = ENTRIES[entry]
  total = lambda given: sum(jnp.sum(x) for x in jax.tree.leaves(function(**given)))
  gradients = jax.grad(total, allow_int=True)(given)
  for name, gradient in gradients.items():
    assert (gradient.dtype == jax.dtypes.float0) == (is_mask(name) or is_ids(name))
