"""B: log-probabilities of the sampled tokens and their gradient, from logits."""

import jax
import jax.numpy as jnp
import optax

import gpo_jax as gpo
from benchmarks import data

TITLE = "B. Log-probabilities and their gradient from logits"
UNITS = ("floor: read and write the logits", "plain: logits[y] − logsumexp")
SIZES = [{"rows": 8, "tokens": 256, "vocabulary": 32768}]
QUICK = [{"rows": 8, "tokens": 16, "vocabulary": 512}]


def gather(x, tokens):
  return jnp.take_along_axis(x, tokens[..., None], -1)[..., 0]


def plain(logits, tokens):
  return gather(logits, tokens) - jax.nn.logsumexp(logits, -1)


def naive(logits, tokens):
  return gather(jax.nn.log_softmax(logits, -1), tokens)


def floor(logits, tokens):
  """Reads what must be read and writes what must be written."""
  return logits * tokens[..., None].astype(logits.dtype)


def of_sum(log_probs):
  """Gives the sum of a function's values and its gradient."""
  return jax.value_and_grad(lambda logits, tokens: jnp.sum(log_probs(logits, tokens)))


def contestants(size: data.Size) -> dict:
  """Gives functions and their arguments, by name."""
  arguments = jnp.asarray(data.logits(size)), jnp.asarray(data.tokens(size))
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  functions = {
    "floor: read and write the logits": floor,
    "plain: logits[y] − logsumexp": of_sum(plain),
    "gpo_jax.token_log_probs": of_sum(gpo.token_log_probs),
    "naive: log_softmax, then gather": of_sum(naive),
    "optax cross-entropy": of_sum(cross_entropy),
  }
  return {name: (function, arguments) for name, function in functions.items()}
