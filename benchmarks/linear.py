"""C: loss and gradients from hidden states `[rows, tokens, H]` and the unembedding `[V, H]`."""

import math

import jax
import jax.numpy as jnp

import gpo_jax as gpo
from benchmarks import data
from benchmarks.logits import naive
from benchmarks.loss import grouped, prepare

TITLE = "C. Loss and gradients from hidden states and unembedding"
UNITS = ("matmul3",)
SIZES = [
  {"rows": 8, "tokens": 256, "hidden": hidden, "vocabulary": vocabulary}
  for hidden, vocabulary in [(512, 32768), (1024, 32768), (512, 152064)]
]
QUICK = [{"rows": 8, "tokens": 32, "hidden": 32, "vocabulary": 2048}]
# For the picture, with fewer contestants.
MORE_SIZES = [{**SIZES[0], "vocabulary": vocabulary} for vocabulary in (8192, 65536)]
MORE_QUICK = [{**QUICK[0], "vocabulary": 4096}]
LINES = ("plain path, grpo", "linear_loss, grpo, no padding", "linear_loss, grpo, 30 % padding")


def matmul3(hidden, unembedding):
  """Does the three matrix products of forward and backward pass, and nothing else."""
  logits = hidden @ unembedding.T
  return logits @ unembedding, jnp.einsum("...v,...h->vh", logits, hidden)


def fused(hidden, unembedding, tokens, objective, rollout):
  return gpo.linear_loss(objective, hidden, unembedding, tokens, rollout)[0]


def plain(hidden, unembedding, tokens, objective, rollout):
  return objective(gpo.token_log_probs(hidden @ unembedding.T, tokens), rollout)[0]


def textbook(hidden, unembedding, tokens, objective, rollout):
  return objective(naive(hidden @ unembedding.T, tokens), rollout)[0]


def log_probs(hidden, unembedding, tokens):
  return jnp.sum(gpo.linear_token_log_probs(hidden, unembedding, tokens).log_probs)


def with_entropy(hidden, unembedding, tokens):
  outputs = gpo.linear_token_log_probs(hidden, unembedding, tokens)
  return jnp.sum(outputs.log_probs + 0.01 * outputs.entropy)


def contestants(size: data.Size) -> dict:
  """Gives functions and their arguments, by name."""
  hidden, unembedding = data.head(size)
  head = (grouped(hidden), jnp.asarray(unembedding))
  sampled = (*head, grouped(data.tokens(size)))
  level = -math.log(size["vocabulary"]) - 0.5

  def of(objective, padding):
    return *sampled, objective, prepare(objective, data.batch(size, padding, level))

  grpo, short_grpo = of(gpo.grpo(), 0.0), of(gpo.grpo(), 0.3)
  gspo, short_gspo = of(gpo.gspo(), 0.0), of(gpo.gspo(), 0.3)

  def both(loss):
    return jax.value_and_grad(loss, argnums=(0, 1))

  return {
    "matmul3": (matmul3, head),
    "linear_loss, grpo, 30 % padding": (both(fused), short_grpo),
    "linear_loss, grpo, no padding": (both(fused), grpo),
    "linear_loss, gspo, 30 % padding": (both(fused), short_gspo),
    "linear_loss, gspo, no padding": (both(fused), gspo),
    "linear_token_log_probs": (both(log_probs), sampled),
    "linear_token_log_probs and entropy": (both(with_entropy), sampled),
    "plain path, grpo": (both(plain), grpo),
    "naive log_softmax, grpo": (both(textbook), grpo),
    "linear_loss, grpo, no gradient": (fused, grpo),
    "plain path, grpo, no gradient": (plain, grpo),
  }
