"""Losses, log-probabilities and divergences from hidden states are those of the full logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support import linear
from tests.support.batches import PRESETS
from tests.support.linear import (
  BIAS,
  HIDDEN,
  MASK,
  SETTINGS,
  TOKENS,
  UNEMBEDDING,
  assert_same,
  from_hidden,
  from_logits,
  near,
  step,
)

SOME = gpo.Tiling(50, 20)
run = step(from_hidden, tiling=SOME)


@pytest.mark.quick("deepseek_v32", "dppo")
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_loss_terms_and_gradients_of_the_full_logits(name):
  objective, rollout = PRESETS[name], near(name)
  found = run(objective, HIDDEN, UNEMBEDDING, BIAS, rollout, TOKENS)
  wanted = linear.expected(name)
  (loss, (terms, entropy)), (wanted_loss, (wanted_terms, wanted_entropy)) = found[0], wanted[0]
  assert_same(found[1], wanted[1], 2e-5)
  # The loss is a sum whose terms may cancel: its digits are relative to their size.
  size = np.sum(np.abs(np.asarray(rollout.weights) * np.where(MASK, wanted_terms.loss, 0)))
  assert abs(loss - wanted_loss) < 1e-6 * size
  keep = functools.partial(jax.tree.map, lambda x: jnp.where(MASK, x, 0))
  terms = terms.replace(entropy=None) if hasattr(terms, "replace") else terms
  for field in ("loss", "gate", "log_ratio", "divergence", "factor"):
    x, y = keep((getattr(terms, field), getattr(wanted_terms, field)))
    assert_same(x, y, 2e-5)
  assert_same(entropy, keep(wanted_entropy))
  assert np.any(wanted[1][1])


def test_entropy_is_a_metric():
  objective, rollout = PRESETS["grpo"], near("grpo")
  _, (terms, entropy) = run(objective, HIDDEN, UNEMBEDDING, BIAS, rollout, TOKENS)[0]
  metrics = gpo.summarize(terms, rollout)
  np.testing.assert_allclose(metrics["entropy"], entropy[MASK].mean(), rtol=1e-5)
  terms = linear.expected("grpo")[0][1][0]
  assert "entropy" not in gpo.summarize(terms, rollout)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("garbage", [(np.nan, -100), (np.inf, 10**6), (3e38, 3)], ids=str)
def test_what_is_masked_is_invisible_bit_for_bit(name, garbage):
  objective, rollout = PRESETS[name], near(name)
  wanted = run(objective, HIDDEN, UNEMBEDDING, BIAS, rollout, TOKENS)
  hidden = jnp.where(MASK[..., None], HIDDEN, garbage[0])
  found = run(objective, hidden, UNEMBEDDING, BIAS, rollout, jnp.where(MASK, TOKENS, garbage[1]))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert not np.any(np.asarray(found[1][1])[~MASK])


@pytest.mark.usefixtures("x64")
def test_what_is_masked_is_invisible_in_float64_too():
  hidden, unembedding, bias, tokens = linear.draw(dtype=jnp.float64)

  @linear.jit
  def value_and_grad(hidden, tokens):
    def loss(*state):
      head = gpo.Head(*state[1:])
      x = gpo.linear_token_log_probs(state[0], head, tokens, mask=MASK, tiling=SOME)
      divergence = functools.partial(gpo.linear_divergence, gpo.vocabulary.kl, mask=MASK)
      return jnp.sum(x.log_probs + x.entropy**2 + divergence(state[0], head, hidden * 2, head))

    return jax.value_and_grad(loss, (0, 1, 2))(hidden, unembedding, bias)

  wanted = value_and_grad(hidden, tokens)
  for garbage in (np.nan, np.inf, 1e300):
    dirty = jnp.where(MASK[..., None], hidden, garbage)
    found = value_and_grad(dirty, jnp.where(MASK, tokens, -100))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
  assert wanted[0].dtype == wanted[1][1].dtype == jnp.float64


@pytest.mark.parametrize("garbage", [0.0, np.nan], ids=["numbers", "nan"])
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_an_empty_batch_has_no_loss_and_no_gradient(name, garbage):
  rollout = jax.tree.map(jnp.asarray, near(name)).replace(mask=jnp.zeros_like(MASK))
  hidden = HIDDEN + garbage
  (loss, _), gradients = run(PRESETS[name], hidden, UNEMBEDDING, BIAS, rollout, TOKENS)
  assert loss == 0
  assert not any(np.any(x) for x in jax.tree.leaves(gradients))


def test_a_nan_that_counts_is_loud():
  at = tuple(np.argwhere(MASK)[3])
  hidden = HIDDEN.at[at].set(jnp.nan)
  arguments = (PRESETS["grpo"], hidden, UNEMBEDDING, BIAS, near("grpo"), TOKENS)
  (loss, _), gradients = run(*arguments)
  assert np.isnan(loss)
  assert np.isnan(gradients[1][at]).all()
  assert np.isnan(gradients[2]).all()


@pytest.mark.quick("both")
@pytest.mark.parametrize("slope", ["both", "log_probs", "entropy"])
def test_log_probs_and_entropy_are_differentiable(slope):
  """Alone too: then the other's slope is a symbolic zero."""

  def total(outputs):
    if slope != "both":
      return jnp.sum(jnp.where(MASK, getattr(outputs, slope), 0)), outputs
    terms = outputs.log_probs * 0.3 + outputs.entropy**2
    return jnp.sum(jnp.where(MASK, terms, 0)), outputs

  def from_states(hidden, unembedding, bias):
    head = gpo.Head(unembedding, bias, **SETTINGS)
    return total(gpo.linear_token_log_probs(hidden, head, TOKENS, mask=MASK, tiling=SOME))

  def from_full(*state):
    outputs = linear.log_probs_of(*state)
    return total(jax.tree.map(lambda x: jnp.where(MASK, x, 0), outputs))

  found, wanted = (
    step(f, argnums=(0, 1, 2))(HIDDEN, UNEMBEDDING, BIAS) for f in (from_states, from_full)
  )
  assert_same(found, wanted)


@pytest.mark.quick("gspo")
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_a_loss_may_be_a_part_of_another_of_tied_embeddings(name):
  def tied(loss, embedding, objective):
    hidden = jnp.tanh(embedding[TOKENS] * 3)
    loss, _ = loss(objective, hidden, embedding, BIAS, near(name))
    return -3 * loss + jnp.sum(embedding**2), None

  found, wanted = (
    step(functools.partial(tied, f), argnums=(0, 1))(UNEMBEDDING, PRESETS[name])
    for f in (from_hidden, from_logits)
  )
  assert_same(found, wanted, 2e-5)


def test_no_gradient_reaches_the_rollout_or_comes_from_the_terms():
  def of_rollout(rollout):
    return from_hidden(PRESETS["grpo"], HIDDEN, UNEMBEDDING, BIAS, rollout)[0]

  rollout = near("grpo").replace(mask=jnp.asarray(MASK, jnp.float32))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(of_rollout)(rollout)))

  def of_terms(hidden):
    terms = from_hidden(PRESETS["grpo"], hidden, UNEMBEDDING, BIAS, near("grpo"))[1]
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(terms))

  assert not np.any(jax.grad(of_terms)(HIDDEN))


def test_microbatches_prompts_and_recomputation_add_up():
  wanted = linear.expected("grpo")[1][1:3]

  def of_prompt(cut, unembedding, recompute=False):
    loss = lambda h, w: from_hidden(PRESETS["grpo"], h, w, BIAS, *cut[1:])[0]
    return jax.grad(jax.checkpoint(loss) if recompute else loss, argnums=(0, 1))(
      cut[0], unembedding
    )

  @linear.jit
  def every_way(cuts, unembedding):
    add = lambda total, cut: (total + of_prompt(cut, unembedding, True)[1], None)
    mapped = jax.vmap(of_prompt, in_axes=(0, None))(cuts, unembedding)
    return (mapped[0], mapped[1].sum(0)), jax.lax.scan(add, jnp.zeros_like(unembedding), cuts)[0]

  mapped, scanned = every_way((HIDDEN, near("grpo"), TOKENS), UNEMBEDDING)
  assert_same(mapped, wanted, 2e-5)
  assert_same(scanned, wanted[1], 2e-5)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_what_is_not_differentiable_says_so(name):
  rollout = near(name)
  loss = lambda h: from_hidden(PRESETS[name], h, UNEMBEDDING, BIAS, rollout)[0]
  first = "first reverse-mode derivatives only; for others use token_log_probs"
  with pytest.raises(NotImplementedError, match=first):
    jax.eval_shape(jax.grad(lambda h: jnp.sum(jax.grad(loss)(h) ** 2)), HIDDEN)
  with pytest.raises(NotImplementedError, match=first):
    jax.eval_shape(lambda h: jax.jvp(jax.grad(loss), (h,), (h,)), HIDDEN)
  forward = lambda loss: lambda h: jax.jvp(loss, (h,), (h,))[1]
  for run in (forward(loss), forward(jax.jit(loss)), jax.jit(forward(loss)), jax.jacfwd(loss)):
    with pytest.raises(NotImplementedError, match=first):
      run(HIDDEN)


@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_what_makes_logits_is_not_differentiable_and_says_so(name):
  def loss(value):
    head = gpo.Head(UNEMBEDDING, **SETTINGS | {name: value})
    return gpo.linear_loss(PRESETS["grpo"], HIDDEN, head, TOKENS, near("grpo"))[0]

  with pytest.raises(NotImplementedError, match="softcap and temperature are not differentiable"):
    jax.eval_shape(jax.grad(loss), 1.0)


@pytest.mark.slow
def test_a_temperature_or_a_number_of_the_objective_may_change_without_a_new_trace():
  traces = []

  @linear.jit
  def loss(temperature, objective):
    traces.append(1)
    head = gpo.Head(UNEMBEDDING, temperature=temperature)
    return gpo.linear_loss(objective, HIDDEN, head, TOKENS, near("grpo"), tiling=SOME)[0]

  for number in (0.5, 2.0):
    objective = gpo.grpo(epsilon_low=number / 5, beta=number)
    logits = linear.logits_of(HIDDEN, UNEMBEDDING)
    log_probs = gpo.token_log_probs(logits, TOKENS, temperature=number)
    wanted = objective(log_probs, near("grpo"))[0]
    np.testing.assert_allclose(loss(number, objective), wanted, rtol=2e-5)
  assert len(traces) == 1


def test_outside_of_jit_a_slot_sees_what_it_closes_over_now():
  scale = [1.0]
  for declare in (lambda f: f, gpo.tokenwise):
    surrogate = declare(lambda x, a: scale[0] * jnp.exp(x) * a)
    objective = gpo.dapo().replace(surrogate=surrogate)
    loss = lambda: gpo.linear_loss(objective, HIDDEN, UNEMBEDDING, TOKENS, near("dapo"))[0]
    scale[0] = 1.0
    first = loss()
    scale[0] = 2.0
    np.testing.assert_allclose(loss(), 2 * first, rtol=1e-6)


# --- divergences of whole distributions ----------------------------------------------------------


@pytest.mark.quick("20")
@pytest.mark.parametrize("chunk_size", [1, 20, None])
def test_a_divergence_is_that_of_the_full_logits(chunk_size):
  reference = linear.draw(7)[:3]

  def from_full(*state):
    logits = (linear.logits_of(*x) for x in (state, reference))
    return jnp.where(MASK, gpo.exact_kl(*logits, **SETTINGS), 0)

  def from_states(*state, garbage=0.0):
    dirty = lambda x: jnp.where(MASK[..., None], x, garbage)
    heads = (gpo.Head(*x[1:], **SETTINGS) for x in (state, reference))
    states = (x for pair in zip(map(dirty, (state[0], reference[0])), heads) for x in pair)
    how = {"mask": MASK, "tiling": gpo.Tiling(chunk_size)}
    return gpo.linear_divergence(gpo.vocabulary.kl, *states, **how)

  slopes = np.random.default_rng(8).normal(size=MASK.shape).astype(np.float32)

  def run(of, **how):
    total = lambda *state: (jnp.sum(slopes * of(*state, **how)), None)
    return step(total, argnums=(0, 1, 2))(HIDDEN, UNEMBEDDING, BIAS)

  found = run(from_states)
  assert_same(found, run(from_full), 2e-5)
  if chunk_size == 20:
    jax.tree.map(np.testing.assert_array_equal, run(from_states, garbage=jnp.nan), found)


def test_a_divergence_has_no_gradient_to_the_reference():
  def total(ref_hidden, *ref_head):
    kl = functools.partial(gpo.linear_divergence, gpo.vocabulary.kl)
    return jnp.sum(kl(HIDDEN, UNEMBEDDING, ref_hidden, gpo.Head(*ref_head)))

  gradients = jax.grad(total, argnums=(0, 1, 2))(2 * HIDDEN, UNEMBEDDING[::-1], BIAS)
  assert not any(np.any(x) for x in gradients)


def test_a_divergence_may_be_one_s_own():
  total_variation = lambda p, q: jnp.sum(jnp.abs(jnp.exp(p) - jnp.exp(q)), -1) / 2
  states = (HIDDEN, UNEMBEDDING, HIDDEN / 2, UNEMBEDDING)
  found = gpo.linear_divergence(total_variation, *states)
  log_probs = (jax.nn.log_softmax(linear.logits_of(x, UNEMBEDDING)) for x in (HIDDEN, HIDDEN / 2))
  np.testing.assert_allclose(found, total_variation(*log_probs), rtol=1e-5)


def test_a_divergence_s_head_gradient_is_added_up_in_float32():
  tokens, chunk = 2048, 16
  rng = np.random.default_rng(0)
  hidden, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((tokens, 8), (32, 8)))

  def gradient(chunk_size, dtype):
    how = {"tiling": gpo.Tiling(chunk_size)}
    states = (hidden.astype(dtype), w.astype(dtype), hidden.astype(dtype) / 2, w.astype(dtype))
    kl = lambda w: jnp.sum(
      gpo.linear_divergence(gpo.vocabulary.kl, states[0], w, *states[2:], **how)
    )
    return jnp.asarray(jax.jit(jax.grad(kl))(states[1]), jnp.float32)

  exact = gradient(tokens, jnp.float32)
  assert linear.relative_error(gradient(chunk, jnp.bfloat16), exact) < 1e-2
  assert linear.relative_error(gradient(tokens, jnp.bfloat16), exact) < 1e-2


def test_a_divergence_in_a_loss_from_hidden_states():
  """The documented two lines, beside the full logits."""
  reference = linear.draw(7)[:3]
  rollout = near("gspo")
  objective = lambda kl: PRESETS["gspo"].replace(divergence=lambda *_: kl, beta=0.5)

  def from_states(hidden, unembedding, bias):
    heads = (gpo.Head(*x, **SETTINGS) for x in ((unembedding, bias), reference[1:]))
    head, ref_head = heads
    kl = gpo.linear_divergence(
      gpo.vocabulary.forward_kl, hidden, head, reference[0], ref_head, mask=MASK
    )
    return gpo.linear_loss(objective(kl), hidden, head, TOKENS, rollout, tiling=SOME)[0], None

  def from_full(*state):
    logits = (linear.logits_of(*x) for x in (state, reference))
    kl = gpo.token_divergence(gpo.vocabulary.forward_kl, *logits, **SETTINGS)
    return objective(kl)(linear.log_probs_of(*state).log_probs, rollout)[0], None

  found, wanted = (
    step(f, argnums=(0, 1, 2))(HIDDEN, UNEMBEDDING, BIAS) for f in (from_states, from_full)
  )
  assert_same(found, wanted, 2e-5)


def test_a_divergence_holds_several_chunks_of_logits():
  tokens, vocabulary, width = 1024, 8192, 8

  def memory(chunk_size):
    how = {"tiling": gpo.Tiling(chunk_size)}
    kl = functools.partial(gpo.linear_divergence, gpo.vocabulary.kl, **how)
    total = lambda hidden, w: jnp.sum(kl(hidden, w, 2 * hidden, w))
    shapes = ((1, tokens, width), (vocabulary, width))
    return linear.temporaries(jax.value_and_grad(total, argnums=(0, 1)), *shapes)

  several = 8 * 4 * 32 * vocabulary
  assert memory(chunk_size=32) < several
  assert memory(chunk_size=tokens) > several


# --- wrong input ---------------------------------------------------------------------------------

STATES = {"hidden": HIDDEN, "head": UNEMBEDDING, "tokens": TOKENS}


def log_probs(**changes):
  return gpo.linear_token_log_probs(**STATES | changes)


def loss(objective=PRESETS["grpo"], rollout=None, **changes):
  rollout = near("grpo") if rollout is None else rollout
  return gpo.linear_loss(objective, rollout=rollout, **STATES | changes)


def divergence(function=gpo.vocabulary.kl, hidden=HIDDEN, head=UNEMBEDDING, **changes):
  reference = {"ref_hidden": HIDDEN, "ref_head": UNEMBEDDING} | changes
  return gpo.linear_divergence(function, hidden, head, **reference)


def loss_of_another_shape():
  return loss(rollout=gpo.dapo().prepare([[1.0, 0.0]], np.ones((1, 2, 3))))


WRONG = {
  "tokens_shifted_by_one": (lambda: log_probs(tokens=TOKENS[..., 1:]), "tokens must .* shift"),
  "tokens_of_floats": (lambda: log_probs(tokens=TOKENS.astype(float)), "tokens must be integers"),
  "mask_of_another_shape": (
    lambda: log_probs(mask=MASK[..., 1:]),
    r"mask must have the shape of tokens; got tokens \[8, 4, 6\], mask \[8, 4, 5\]",
  ),
  "mask_of_other_numbers": (lambda: log_probs(mask=MASK * -1e9), "mask must hold bools or 0 and 1"),
  "a_preset_that_was_not_called": (
    lambda: loss(gpo.grpo),
    r"call the preset, such as gpo.grpo\(\)",
  ),
  "rollout_of_another_shape": (loss_of_another_shape, "mask must have the shape of tokens"),
  "no_rollout": (lambda: loss(rollout={}), "rollout must be a Rollout.* got dict"),
  "rollout_without_reference": (
    lambda: loss(rollout=near("grpo").replace(ref_log_probs=None)),
    "divergence=k3 needs rollout.ref_log_probs",
  ),
  "no_function": (lambda: divergence("kl"), r"function must be one of gpo.vocabulary; got 'kl'"),
  "two_vocabularies": (
    lambda: divergence(ref_head=UNEMBEDDING[1:]),
    r"make logits of one shape; got \[8, 4, 6, 56\] and \[8, 4, 6, 55\]",
  ),
  "two_lengths": (lambda: divergence(ref_hidden=HIDDEN[..., 1:, :]), "make logits of one shape"),
  "reference_kernel": (
    lambda: divergence(ref_head=UNEMBEDDING.T),
    "ref_head .* transpose a kernel",
  ),
  "mask_of_a_divergence": (lambda: divergence(mask=MASK[..., 1:]), "mask must have the shape of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name):
  function, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    function()


def test_a_symbolic_batch_is_refused_by_name_and_the_way_by_logits_takes_it():
  (batch,) = jax.export.symbolic_shape("batch")
  objective = gpo.dapo()

  def step(from_hidden, hidden, unembedding, tokens, rewards, mask, old):
    rollout = objective.prepare(rewards, mask, old)
    if from_hidden:
      return gpo.linear_loss(objective, hidden, unembedding, tokens, rollout)[0]
    return objective(gpo.token_log_probs(hidden @ unembedding.T, tokens), rollout)[0]

  like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *shape), dtype)
  shapes = (
    like(4, 6, 8), jax.ShapeDtypeStruct((32, 8), jnp.float32), like(4, 6, dtype=jnp.int32),
    like(4), like(4, 6, dtype=bool), like(4, 6),
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"known sizes.*got hidden \[batch, 4, 6, 8\].*fixed size"):
    jax.export.export(jax.jit(functools.partial(step, True)))(*shapes)
  jax.export.export(jax.jit(functools.partial(step, False)))(*shapes)
