"""The policy: a small decoder-only transformer, its answers and how likely it finds them."""

import jax
import jax.numpy as jnp
from flax import nnx

from . import task


class Block(nnx.Module):
  """Causal self-attention, then a perceptron, each added to its input."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    """Draws the weights."""
    self.heads = heads
    self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
    self.attention_in = nnx.Linear(width, 3 * width, rngs=rngs)
    self.attention_out = nnx.Linear(width, width, rngs=rngs)
    self.perceptron_norm = nnx.LayerNorm(width, rngs=rngs)
    self.perceptron_in = nnx.Linear(width, 4 * width, rngs=rngs)
    self.perceptron_out = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Maps activations [N, T, width] to [N, T, width]; mask [N, 1, T, T] says who sees whom."""
    projected = self.attention_in(self.attention_norm(x))
    projected = projected.reshape(*x.shape[:2], 3 * self.heads, -1)
    queries, keys, values = jnp.split(projected, 3, axis=2)
    mixed = jax.nn.dot_product_attention(queries, keys, values, mask=mask, is_causal=True)
    x = x + self.attention_out(mixed.reshape(x.shape))
    return x + self.perceptron_out(jax.nn.relu(self.perceptron_in(self.perceptron_norm(x))))


class Policy(nnx.Module):
  """A transformer over the task's characters, of 102,413 weights."""

  def __init__(self, rngs: nnx.Rngs, *, width: int = 64, layers: int = 2, heads: int = 4):
    """Draws the weights."""
    length, vocabulary = task.PROMPT_LENGTH + task.ANSWER_LENGTH, len(task.VOCABULARY)
    self.token_embedding = nnx.Embed(vocabulary, width, rngs=rngs)
    self.position_embedding = nnx.Embed(length, width, rngs=rngs)
    self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.readout = nnx.Linear(width, vocabulary, rngs=rngs)

  def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Maps tokens [..., T] to the log-probabilities [..., T, V] of each one's successor.

    In packed rows the tokens of a segment see, and count their positions in, that segment alone.
    """
    flat, mask = tokens.reshape(-1, tokens.shape[-1]), None
    positions = jnp.arange(flat.shape[1])[None]
    if segment_ids is not None:
      ids = segment_ids.reshape(flat.shape)
      mask = (ids[:, :, None] == ids[:, None, :])[:, None]
      positions -= jnp.argmax(mask[:, 0], axis=-1)
      # Padding may be longer than any segment; its positions only have to exist.
      positions = jnp.minimum(positions, self.position_embedding.num_embeddings - 1)
    x = self.token_embedding(flat) + self.position_embedding(positions)
    for block in self.blocks:
      x = block(x, mask)
    log_probs = jax.nn.log_softmax(self.readout(self.norm(x)))
    return log_probs.reshape(*tokens.shape, -1)


def pick(distributions: jax.Array, tokens: jax.Array) -> jax.Array:
  """Picks the log-probabilities [...] of tokens [...] from distributions [..., V]."""
  return jnp.take_along_axis(distributions, tokens[..., None], axis=-1)[..., 0]


def answer_distributions(policy: Policy, prompts: jax.Array, answers: jax.Array) -> jax.Array:
  """Gives the log-probabilities [..., T, V] that each token of answers [..., T] is drawn from."""
  sequences = jnp.concatenate([prompts, answers[..., :-1]], axis=-1)
  return policy(sequences)[..., prompts.shape[-1] - 1 :, :]


def answer_log_probs(policy: Policy, prompts: jax.Array, answers: jax.Array) -> jax.Array:
  """Gives the log-probability [..., T] of each token of answers [..., T] to prompts [..., S]."""
  return pick(answer_distributions(policy, prompts, answers), answers)


def sample(policy: Policy, prompts: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws answers [..., T] to prompts [..., S], with each token's log-probability [..., T]."""
  start, length = prompts.shape[-1], task.ANSWER_LENGTH

  def write(tokens: jax.Array, slot: tuple[jax.Array, jax.Array]):
    position, key = slot
    log_probs = policy(tokens)[..., position - 1, :]
    token = jax.random.categorical(key, log_probs).astype(tokens.dtype)
    return tokens.at[..., position].set(token), pick(log_probs, token)

  # The causal mask hides what is not yet written, so that it may hold any token.
  blank = jnp.full((*prompts.shape[:-1], length), task.END, prompts.dtype)
  slots = (start + jnp.arange(length), jax.random.split(key, length))
  tokens, log_probs = jax.lax.scan(write, jnp.concatenate([prompts, blank], axis=-1), slots)
  return tokens[..., start:], jnp.moveaxis(log_probs, 0, -1)
