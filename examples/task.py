"""The examples' task: answer a symbol by the two that follow it in the alphabet."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

SYMBOLS, ANSWER = 12, 2
PROMPTS, SAMPLES = 16, 8


def sample(model: Callable, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Lets a model answer prompts, and scores what it says.

  Args:
    model: tokens `[..., T]` to the logits `[..., T, V]` of each one's successor.
    key: of the random draws.

  Returns:
    The tokens read `[P, G, T]`, the tokens written after each of them `[P, G, T]`, and the rewards
    `[P, G]`: the share of symbols that are right.
  """
  prompt_key, *keys = jax.random.split(key, 1 + ANSWER)
  prompts = jax.random.randint(prompt_key, (PROMPTS, 1, 1), 0, SYMBOLS)
  tokens = jnp.broadcast_to(prompts, (PROMPTS, SAMPLES, 1))
  for key in keys:
    written = jax.random.categorical(key, model(tokens)[..., -1:, :])
    tokens = jnp.concatenate([tokens, written.astype(tokens.dtype)], axis=-1)
  right = (prompts + 1 + jnp.arange(ANSWER)[None, None]) % SYMBOLS
  rewards = jnp.mean(tokens[..., 1:] == right, axis=-1)
  return tokens[..., :-1], tokens[..., 1:], rewards


def train(step: Callable, state: object, steps: int = 80) -> None:
  """Takes steps `(state, key) -> (state, reward)`; prints the mean reward of the first and last."""
  rewards = []
  for key in jax.random.split(jax.random.key(0), steps):
    state, reward = step(state, key)
    rewards.append(float(reward))
  print(f"reward {rewards[0]:.2f} -> {sum(rewards[-5:]) / 5:.2f}")
