"""One small batch of hidden states, and what is computed from them by way of the full logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from tests.support.batches import PRESETS, batch, relative_error
from tests.support.quick import fused, jit

WIDTH, VOCABULARY = 16, 56
SETTINGS = {"temperature": 0.7, "softcap": 3.0}
# Chunks and tiles that divide neither tokens nor vocabulary, one chunk for all, one tile for all.
TILINGS = {
  "tiles": gpo.Tiling(7, 10),
  "one_chunk": gpo.Tiling(500, 10),
  "one_tile": gpo.Tiling(50, VOCABULARY),
  "default": None,
}
BATCH = batch(prompts=8)
MASK = BATCH.mask


def draw(seed=0, shape=MASK.shape, vocabulary=VOCABULARY, width=WIDTH, dtype=jnp.float32):
  """Draws hidden states, an unembedding, a bias and tokens."""
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(*shape, width)), dtype)
  unembedding = jnp.asarray(rng.normal(size=(vocabulary, width)) / 2, dtype)
  bias = jnp.asarray(rng.normal(size=vocabulary), dtype)
  return hidden, unembedding, bias, jnp.asarray(rng.integers(0, vocabulary, shape))


STATES = HIDDEN, UNEMBEDDING, BIAS, TOKENS = draw()


def logits_of(hidden, unembedding, bias=None):
  """The full logits, `[..., T, V]`."""
  logits = jnp.einsum("...h,vh->...v", hidden, unembedding)
  return logits if bias is None else logits + bias[(None,) * (hidden.ndim - 1)]


def log_probs_of(hidden, unembedding, bias, tokens=TOKENS):
  """Log-probabilities and entropies by way of the full logits."""
  logits = logits_of(hidden, unembedding, bias)
  entropy = gpo.token_entropy(logits, **SETTINGS)
  return gpo.TokenLogProbs(gpo.token_log_probs(logits, tokens, **SETTINGS), entropy)


def from_logits(objective, hidden, unembedding, bias, rollout, tokens=TOKENS):
  """An objective's loss and terms by way of the full logits."""
  log_probs, entropy = log_probs_of(hidden, unembedding, bias, tokens)
  loss, terms = objective(log_probs, rollout)
  return loss, (terms, jax.lax.stop_gradient(entropy))


def from_hidden(objective, hidden, unembedding, bias, rollout, tokens=TOKENS, **how):
  """The same from hidden states."""
  head = gpo.Head(unembedding, bias, **SETTINGS)
  loss, terms = gpo.linear_loss(objective, hidden, head, tokens, rollout, **how)
  return loss, (terms, terms.entropy)


def step(loss, argnums=(0, 1, 2, 3), **how):
  """Compiles a loss with its gradients in objective, hidden states, unembedding and bias."""
  loss = functools.partial(loss, **how)
  return jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True, allow_int=True))


@functools.cache
def near(name):
  """A preset's rollout whose other policies are near the one of the hidden states."""
  log_probs = jit(log_probs_of)(HIDDEN, UNEMBEDDING, BIAS).log_probs
  rng = np.random.default_rng(3)
  names = ("old_log_probs", "ref_log_probs", "sampler_log_probs")
  noisy = {n: log_probs + rng.normal(0, 0.3, MASK.shape).astype(np.float32) for n in names}
  return BATCH.prepare(PRESETS[name], **noisy)


@functools.cache
def expected(name):
  """Value, terms and gradients of a preset by way of the full logits."""
  return step(from_logits)(PRESETS[name], HIDDEN, UNEMBEDDING, BIAS, near(name))


def assert_same(found, wanted, tolerance=1e-5):
  """Checks leaves, each to the tolerance times the largest number in it."""
  leaves = jax.tree.leaves(found), jax.tree.leaves(wanted)
  assert len(leaves[0]) == len(leaves[1])
  for x, y in zip(*leaves):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    if x.dtype != jax.dtypes.float0 and np.any(y):
      assert relative_error(x, y) < tolerance
    elif x.dtype != jax.dtypes.float0:
      assert not np.any(x)


def products(function, *arguments):
  """Counts the matrix products of a compiled program, without those for improbable tokens."""
  text = fused(function).lower(*arguments).compile().as_text()
  found = re.findall(r"( dot\(|custom-call.*matmul|__onednn)(.*)", text)
  return sum("improbable_tokens" not in rest for _, rest in found)


def temporaries(function, *shapes):
  """Counts the bytes that a compiled program holds besides arguments and results."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = fused(function).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes
