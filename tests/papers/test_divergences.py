"""What each divergence estimates, in value and in gradient, by exact enumeration.

p is the current policy, q the reference, μ the sampler. On-policy means μ = p.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import divergences as div
from gpo_jax._numerics import exp_excess
from tests.support.quick import jit

sg = jax.lax.stop_gradient
pytestmark = pytest.mark.usefixtures("x64")


def close(x, y):
  return np.allclose(x, y, rtol=1e-9, atol=1e-11)


# --- one token -----------------------------------------------------------------------------------


def log_policies(seed):
  rng = np.random.default_rng(seed)
  old, ref = jax.nn.log_softmax(rng.normal(size=(2, 6)) * 0.6)
  return jnp.asarray(rng.normal(size=6) * 0.6), old, ref


@functools.partial(jit, static_argnums=0)
def estimate(divergence, logits, log_old, log_ref):
  """E over x from μ of the penalty, and of its gradient by autodiff."""

  def expectation(logits):
    log_p = jax.nn.log_softmax(logits)
    penalty = divergence(log_p - log_ref, log_p - log_old, None)
    return jnp.sum(jnp.exp(log_old) * penalty)

  return jax.value_and_grad(expectation)(logits)


def kl(log_a, log_b):
  return jnp.sum(jnp.exp(log_a) * (log_a - log_b))


@jit
def targets(logits, log_ref):
  """The quantities that estimators are unbiased for: value and gradient of each."""
  chi2 = lambda p: jnp.sum((jnp.exp(p) - jnp.exp(log_ref)) ** 2 / jnp.exp(log_ref))
  functions = {
    "KL(p,q)": lambda p: kl(p, log_ref),
    "KL(q,p)": lambda p: kl(log_ref, p),
    "2TV": lambda p: jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(log_ref))),
    "chi2-KL": lambda p: chi2(p) - kl(p, log_ref),
    "Ek2": lambda p: jnp.sum(jnp.exp(p) * (p - log_ref) ** 2 / 2),
    "E|d|": lambda p: jnp.sum(jnp.exp(p) * jnp.abs(p - log_ref)),
  }
  through = lambda f: jax.value_and_grad(lambda x: f(jax.nn.log_softmax(x)))(logits)
  return {name: through(f) for name, f in functions.items()} | {"0": (0.0, jnp.zeros(6))}


# name: (divergence, value on-policy, gradient on-policy, value off-policy, gradient off-policy);
# None means that it is none of the targets.
RATIO = lambda d: jnp.exp(d)
TABLE = {
  "k1": (div.k1, "KL(p,q)", "0", None, None),
  "absolute": (div.absolute, "E|d|", "2TV", None, None),
  "k2": (div.k2, "Ek2", "KL(p,q)", None, None),
  "k3": (div.k3, "KL(p,q)", "KL(q,p)", None, None),
  "straight_through": (div.straight_through, "KL(p,q)", "KL(p,q)", None, None),
  "ρ·k1": (lambda r, d, _: RATIO(d) * r, *["KL(p,q)"] * 4),
  "unbiased": (div.unbiased, *["KL(p,q)"] * 4),
  "ρ·k3 by autodiff": (lambda r, d, _: RATIO(d) * exp_excess(-r), *["KL(p,q)"] * 4),
  "sg(ρ)·k2": (lambda r, d, _: sg(RATIO(d)) * r**2 / 2, *["Ek2", "KL(p,q)"] * 2),
  "sg(ρ)·k3": (lambda r, d, _: sg(RATIO(d)) * exp_excess(-r), *["KL(p,q)", "KL(q,p)"] * 2),
  "ρ·k2": (lambda r, d, _: RATIO(d) * r**2 / 2, *["Ek2"] * 4),
  "chi2_minus_kl": (div.chi2_minus_kl, *["chi2-KL"] * 4),
  "forward_kl": (div.forward_kl, *["KL(q,p)"] * 4),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_what_one_token_estimates(name, on_policy, seed):
  logits, log_old, log_ref = log_policies(seed)
  divergence, *expected = TABLE[name]
  log_old = jax.nn.log_softmax(logits) if on_policy else log_old
  value, gradient = estimate(divergence, logits, log_old, log_ref)
  truth = targets(logits, log_ref)
  for measured, target, column in zip(
    (value, gradient), expected[:2] if on_policy else expected[2:], (0, 1)
  ):
    # Both ways: it is what the table says, and nothing else.
    agrees = {other for other in truth if close(measured, truth[other][column])}
    assert agrees == ({target} if target else set())


@pytest.mark.parametrize("seed", range(3))
def test_the_off_policy_gradients_that_have_another_name(seed):
  logits, log_old, log_ref = log_policies(seed)
  _, k1 = estimate(div.k1, logits, log_old, log_ref)
  assert close(k1, -jax.grad(lambda x: kl(log_old, jax.nn.log_softmax(x)))(logits))
  delta = jax.nn.log_softmax(logits) - log_ref
  scores = jax.jacobian(jax.nn.log_softmax)(logits)
  for divergence in (div.k2, div.straight_through):
    assert close(
      estimate(divergence, logits, log_old, log_ref)[1], (jnp.exp(log_old) * delta) @ scores
    )


def test_rho_k3_has_a_fraction_of_the_noise_of_rho_k1():
  logits, log_old, _ = log_policies(0)
  log_p = jax.nn.log_softmax(logits)
  log_ref = jax.nn.log_softmax(log_p + 0.02 * jnp.arange(6.0))
  spread = {}
  for name in ("ρ·k1", "unbiased"):
    per_sample = lambda x: TABLE[name][0](
      jax.nn.log_softmax(x) - log_ref, jax.nn.log_softmax(x) - log_old, None
    )
    gradients = jax.jacobian(per_sample)(logits)
    mean = (jnp.exp(log_old) @ gradients)[None]
    spread[name] = jnp.sqrt(jnp.sum(jnp.exp(log_old) @ (gradients - mean) ** 2))
  assert spread["ρ·k1"] > 10 * spread["unbiased"]


def test_unbiased_is_pointwise_the_product_in_value_and_gradient():
  delta, drift = jnp.linspace(-3.0, 3.0, 31), jnp.linspace(2.0, -2.0, 31)
  for ours, plain in ((div.unbiased, TABLE["ρ·k3 by autodiff"][0]),):
    a = jax.vmap(jax.value_and_grad(lambda x, r, d: ours(r + x, d + x, None)), (None, 0, 0))
    b = jax.vmap(jax.value_and_grad(lambda x, r, d: plain(r + x, d + x, None)), (None, 0, 0))
    for x, y in zip(a(0.0, delta, drift), b(0.0, delta, drift)):
      np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


# --- whole responses: vocabulary {0, 1, end}, at most 3 tokens
# -------------------------------------

END, LONGEST = 2, 3
STATES = [s for n in range(LONGEST) for s in itertools.product((0, 1), repeat=n)]


def responses():
  """Every response: ended ones, and the longest ones."""
  found = [(*s, END) for s in STATES]
  return found + [s for s in itertools.product((0, 1), repeat=LONGEST)]


RESPONSES = responses()
MASK = np.array([[t < len(r) for t in range(LONGEST)] for r in RESPONSES])
STATE = np.array(
  [[STATES.index(r[:t]) if t < len(r) else 0 for t in range(LONGEST)] for r in RESPONSES]
)
TOKEN = np.array([[r[t] if t < len(r) else 0 for t in range(LONGEST)] for r in RESPONSES])


def token_log_probs(logits):
  return jnp.where(MASK, jax.nn.log_softmax(logits)[STATE, TOKEN], jnp.nan)


def response_log_probs(logits):
  return jnp.sum(token_log_probs(logits), axis=-1, where=MASK)


def tables(seed):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(3, len(STATES), 3)) * 0.5)


def pack(x, fill):
  """Lays all responses in one row, one after another, with padding between."""
  return jnp.concatenate([jnp.asarray(x), jnp.full((len(RESPONSES), 1), fill)], axis=1).reshape(
    1, -1
  )


def with_exact_kl(kind, logits, ref, packed):
  """The divergence that knows both distributions, closed over."""
  kl = gpo.exact_kl(logits, ref)[STATE]
  kl = pack(kl, jnp.nan) if packed else kl
  if kind == "exact":
    return lambda *_: kl
  return lambda _, log_ratio, rollout: div.sequence_exact(kl, log_ratio, rollout)


@functools.partial(jit, static_argnames=("divergence", "packed"))
def sequence_estimate(divergence, logits, old, ref, packed=False):
  """E over responses from μ of Σ_t penalty_t, and its gradient, through an `Objective`."""
  shares = jnp.where(MASK, jnp.exp(response_log_probs(old))[:, None], 0)

  def expectation(logits):
    arrays = {"mask": MASK, "weights": shares, "ref_log_probs": token_log_probs(ref)}
    arrays["old_log_probs"] = token_log_probs(old)
    log_probs = token_log_probs(logits)
    if packed:
      ids = np.broadcast_to(np.arange(1, len(RESPONSES) + 1)[:, None], MASK.shape)
      arrays = {k: pack(v, False if k == "mask" else jnp.nan) for k, v in arrays.items()}
      arrays["segment_ids"] = pack(ids, 0)
      log_probs = pack(log_probs, jnp.nan)
    rollout = gpo.Rollout(advantages=jnp.zeros(log_probs.shape), **arrays)
    penalty = divergence
    if isinstance(divergence, str):
      penalty = with_exact_kl(divergence, logits, ref, packed)
    objective = gpo.deepseek_v32(beta=1.0).replace(divergence=penalty, corrections=())
    return objective(log_probs, rollout)[0]

  return jax.value_and_grad(expectation)(logits)


@jit
def true_sequence_kl(logits, ref):
  exact = lambda x: jnp.sum(
    jnp.exp(response_log_probs(x)) * (response_log_probs(x) - response_log_probs(ref))
  )
  return jax.value_and_grad(exact)(logits)


def total(x):
  return jnp.broadcast_to(jnp.sum(x, -1, keepdims=True), x.shape)


def once(x, rollout):
  """Counts a response's value at its first token only."""
  return jnp.where(jnp.arange(LONGEST)[None] == 0, x, 0)


def whole(ref_log_ratio, log_ratio, rollout):
  penalty = jnp.exp(total(log_ratio)) * exp_excess(-total(ref_log_ratio))
  return once(penalty, rollout)


def whole_ratio_token_k3(ref_log_ratio, log_ratio, rollout):
  return jnp.exp(total(log_ratio)) * exp_excess(-ref_log_ratio)


def sequence_ratio_token_k3(ref_log_ratio, log_ratio, rollout):
  return jnp.exp(gpo.levels.sequence(log_ratio, rollout)) * exp_excess(-ref_log_ratio)


def prefix_by_autodiff(ref_log_ratio, log_ratio, rollout):
  return jnp.exp(jnp.cumsum(log_ratio, -1)) * exp_excess(-ref_log_ratio)


# name: (divergence, exact value on-policy, gradient on, value off, gradient off)
SEQUENCES = {
  "sequence_unbiased": (div.sequence_unbiased, True, True, True, True),
  "prefix ratio by autodiff": (prefix_by_autodiff, True, True, True, True),
  "ratio of the response, k3 of the response": (whole, True, True, True, True),
  "unbiased, per token": (div.unbiased, True, False, False, False),
  "ratio of the response, k3 of tokens": (whole_ratio_token_k3, True, True, True, True),
  "mean ratio of the response, k3 of tokens": (sequence_ratio_token_k3, True, False, False, False),
  "k3": (div.k3, True, False, False, False),
  # Of the exact KL per token, the gradient on-policy is biased too: states are frozen at μ's.
  "exact, per token": ("exact", True, False, False, False),
  "sequence_exact": ("sequence_exact", True, True, True, True),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_what_whole_responses_estimate(name, on_policy, seed):
  logits, old, ref = tables(seed)
  divergence, *expected = SEQUENCES[name]
  value, gradient = sequence_estimate(divergence, logits, logits if on_policy else old, ref)
  exact_value, exact_gradient = true_sequence_kl(logits, ref)
  found = [close(value, exact_value), close(gradient, exact_gradient)]
  assert found == (expected[:2] if on_policy else expected[2:])


def test_the_token_estimator_freezes_the_states_of_the_sampler():
  logits, old, ref = tables(3)
  _, gradient = sequence_estimate(div.unbiased, logits, old, ref)
  visits = np.zeros(len(STATES))
  for weight, mask, states in zip(np.exp(response_log_probs(old)), MASK, STATE):
    np.add.at(visits, states[mask], weight)

  def frozen(x):
    log_p, log_q = jax.nn.log_softmax(x), jax.nn.log_softmax(ref)
    return visits @ jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

  assert close(gradient, jax.grad(frozen)(logits))


@pytest.mark.quick("unbiased", "sequence_exact")
@pytest.mark.parametrize(
  "divergence", [div.sequence_unbiased, div.unbiased, div.sequence_k3, "sequence_exact"]
)
def test_packed_rows_give_the_same(divergence):
  logits, old, ref = tables(4)
  for x, y in zip(
    sequence_estimate(divergence, logits, old, ref),
    sequence_estimate(divergence, logits, old, ref, packed=True),
  ):
    np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


def test_the_ratio_of_a_long_response_is_bounded():
  far = jnp.full(8, -15.0)  # e^120 has no float32
  rollout = gpo.Rollout(advantages=jnp.ones(1), mask=jnp.ones(8), weights=jnp.ones(8))
  value, slopes = jax.value_and_grad(lambda x: div.sequence_k3(x, None, rollout)[0])(far)
  np.testing.assert_allclose([value, *slopes], [np.exp(20), *[-np.exp(20)] * 8], rtol=1e-6)


# --- whole responses: surrogates
# ---------------------------------------------------------------------

REWARDS = np.random.default_rng(9).normal(size=len(RESPONSES))


def rollout_of(weights, old):
  return gpo.Rollout(
    advantages=jnp.asarray(REWARDS), mask=MASK, weights=weights, old_log_probs=token_log_probs(old)
  )


def surrogate_estimate(objective, logits, old):
  """E over responses from μ of Σ_t surrogate_t, negated, and its gradient."""
  shares = jnp.where(MASK, jnp.exp(response_log_probs(old))[:, None], 0)
  rollout = rollout_of(shares, old)
  return jax.value_and_grad(lambda x: -objective(token_log_probs(x), rollout)[0])(logits)


def policy_gradient(logits):
  return jax.grad(lambda x: jnp.exp(response_log_probs(x)) @ REWARDS)(logits)


@pytest.mark.slow
def test_luspo_on_policy_is_the_policy_gradient_and_gspo_is_not():
  logits, _, _ = tables(5)
  assert close(surrogate_estimate(gpo.luspo(), logits, logits)[1], policy_gradient(logits))
  scale = 1 / jnp.sum(jnp.asarray(MASK, float), -1, keepdims=True)
  old_shares = jnp.where(MASK, jnp.exp(response_log_probs(logits))[:, None] * scale, 0)
  rollout = rollout_of(old_shares, logits)
  gspo = jax.grad(lambda x: -gpo.gspo()(token_log_probs(x), rollout)[0])(logits)
  assert not close(gspo, policy_gradient(logits))


def test_gspo_weighs_responses_by_its_tilted_policy():
  logits, old, _ = tables(6)
  objective = gpo.gspo(epsilon_low=1e9, epsilon_high=1e9)
  lengths = MASK.sum(-1).astype(float)
  shares = jnp.where(MASK, (jnp.exp(response_log_probs(old)) / lengths)[:, None], 0)
  rollout = rollout_of(shares, old)
  value = -objective(token_log_probs(logits), rollout)[0]
  tilt = (1 - 1 / lengths) * response_log_probs(old) + response_log_probs(logits) / lengths
  np.testing.assert_allclose(value, jnp.exp(tilt) @ REWARDS, rtol=1e-12)


def test_reinforce_and_the_response_ratio_are_the_policy_gradient():
  logits, old, _ = tables(7)
  assert close(surrogate_estimate(gpo.rloo(), logits, logits)[1], policy_gradient(logits))
  whole_ratio = gpo.r1(epsilon_low=1e9, beta=None)
  lengths = MASK.sum(-1).astype(float)
  shares = jnp.where(MASK, (jnp.exp(response_log_probs(old)) / lengths)[:, None], 0)
  rollout = rollout_of(shares, old)
  gradient = jax.grad(lambda x: -whole_ratio(token_log_probs(x), rollout)[0])(logits)
  assert close(gradient, policy_gradient(logits))  # off-policy: the ratio corrects μ exactly


# --- gates, one token: p·gate·A·s
# --------------------------------------------------------------------

GATES = {
  "clip": (
    functools.partial(gpo.surrogates.clip, epsilon_low=0.2, epsilon_high=0.3),
    lambda rho, a: rho * ~(((a > 0) & (rho > 1.3)) | ((a < 0) & (rho < 0.8))),
  ),
  "dual_clip": (
    functools.partial(gpo.surrogates.dual_clip, epsilon_low=0.2, bound=2.0),
    lambda rho, a: rho * ~(((a > 0) & (rho > 1.2)) | ((a < 0) & ((rho < 0.8) | (rho > 2)))),
  ),
  "dual_clip below the clip": (
    functools.partial(gpo.surrogates.dual_clip, epsilon_low=0.2, epsilon_high=1.0, bound=1.5),
    lambda rho, a: rho * ~(((a > 0) & (rho > 2)) | ((a < 0) & ((rho < 0.8) | (rho > 1.5)))),
  ),
  "max_ratio": (
    functools.partial(gpo.surrogates.clip, epsilon_low=0.2, max_ratio=2.0),
    lambda rho, a: rho * ~(((a > 0) & (rho > 1.2)) | ((a < 0) & ((rho < 0.8) | (rho > 2)))),
  ),
  "max_ratio below the clip": (
    functools.partial(gpo.surrogates.clip, epsilon_low=0.2, epsilon_high=1.0, max_ratio=1.5),
    lambda rho, a: rho * ~(((a > 0) & (rho > 1.5)) | ((a < 0) & ((rho < 0.8) | (rho > 2)))),
  ),
  "cispo": (
    functools.partial(gpo.surrogates.cispo, low=0.5, high=1.5),
    lambda rho, a: np.clip(rho, 0.5, 1.5),
  ),
  "cispo, upper": (
    functools.partial(gpo.surrogates.cispo, high=1.5),
    lambda rho, a: np.minimum(rho, 1.5),
  ),
  "sapo": (
    gpo.surrogates.sapo,
    lambda rho, a: rho / np.cosh(np.where(a > 0, 1.0, 1.05) * (rho - 1) / 2) ** 2,
  ),
  "reinforce": (gpo.surrogates.reinforce, lambda rho, a: 1 + 0 * rho),
  "importance_weighted": (gpo.surrogates.importance_weighted, lambda rho, a: rho),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
  surrogate, gate = GATES[name]
  rho, advantages = (x.ravel() for x in np.meshgrid(np.linspace(0.05, 3.05, 121), [-1.5, 0.0, 2.0]))
  gradient = jit(jax.grad(lambda d: jnp.sum(surrogate(d, jnp.asarray(advantages)))))(np.log(rho))
  np.testing.assert_allclose(gradient, gate(rho, advantages) * advantages, rtol=1e-12, atol=1e-15)
  on_policy = jit(jax.vmap(jax.grad(surrogate), (None, 0)))(0.0, jnp.asarray(advantages))
  np.testing.assert_allclose(on_policy, advantages, rtol=1e-15)


def test_clipped_values_are_the_written_ones():
  rho, advantages = (x.ravel() for x in np.meshgrid(np.linspace(0.05, 4, 80), [-1.5, 0.0, 2.0]))
  log_ratio, advantages = np.log(rho), jnp.asarray(advantages)
  plain = np.minimum(rho * advantages, np.clip(rho, 0.8, 1.3) * advantages)
  value = gpo.surrogates.clip(log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.3)
  np.testing.assert_allclose(value, plain, rtol=1e-12)
  delta = np.minimum(np.minimum(rho, 2.0) * advantages, np.clip(rho, 0.8, 1.3) * advantages)
  value = gpo.surrogates.clip(
    log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.3, max_ratio=2.0
  )
  np.testing.assert_allclose(value, delta, rtol=1e-12)
  below = np.minimum(np.minimum(rho, 1.1) * advantages, np.clip(rho, 0.8, 1.3) * advantages)
  value = gpo.surrogates.clip(
    log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.3, max_ratio=1.1
  )
  np.testing.assert_allclose(value, below, rtol=1e-12)
  for bound in (2.5, 1.1):  # the lower one binds before the clip does
    dual = np.where(advantages < 0, np.maximum(plain, bound * advantages), plain)
    value = gpo.surrogates.dual_clip(
      log_ratio, advantages, epsilon_low=0.2, epsilon_high=0.3, bound=bound
    )
    np.testing.assert_allclose(value, dual, rtol=1e-12)
  wide = gpo.surrogates.dual_clip(np.log(4.0), 1.0, epsilon_high=5.0, bound=2.5)
  np.testing.assert_allclose(wide, 4.0, rtol=1e-6)  # no bound on good samples


@jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
@jax.grad
def slope_of_clip(log_ratio, advantage, epsilon):
  return gpo.surrogates.clip(log_ratio, advantage, epsilon_low=epsilon)


@jit
@functools.partial(jax.vmap, in_axes=(0, None, None))
@jax.grad
def slope_of_clipped_sequence(log_ratio, advantage, low):
  ones = jnp.ones(1)
  rollout = gpo.Rollout(advantages=advantage[None], mask=ones, weights=ones)
  return gpo.levels.clipped_sequence(log_ratio[None], rollout, low=low)[0]


@pytest.mark.parametrize("epsilon", [0.0, 3e-4, 0.1, 0.2, 0.28, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ties_keep_the_unclipped_gradient(epsilon, dtype):
  sides = jnp.asarray([1, -1, 0], dtype)
  c = jnp.asarray(0.4, dtype)
  for a in jnp.asarray([2, -2], dtype):
    gradient = slope_of_clip(jnp.log1p(sides * epsilon), a, jnp.asarray(epsilon, dtype))
    np.testing.assert_allclose(gradient, a * (1 + sides * epsilon), rtol=1e-6)
    np.testing.assert_array_equal(slope_of_clipped_sequence(sides * c, a, c), 1)
