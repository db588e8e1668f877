"""The task: add two two-digit numbers, written one character at a time.

A problem is a number below 10,000: problem 4785 is the prompt `47+85=`. Its answer is written with
the least significant digit first, so that each carry is known when it is needed, and ends with a
full stop: `231.`.
"""

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = "0123456789+=."
END = VOCABULARY.index(".")
PROBLEMS = 10_000
HELD_OUT = 1_000


def encode(texts: list[str]) -> np.ndarray:
  """Turns N texts of one length into tokens [N, T]."""
  return np.array([[VOCABULARY.index(letter) for letter in text] for text in texts], np.int32)


def decode(tokens: np.ndarray) -> str:
  """Turns tokens [T] into text; an answer ends with its full stop."""
  head, stop, _ = "".join(VOCABULARY[token] for token in tokens).partition(".")
  return head + stop


PROMPTS = encode([f"{a:02}+{b:02}=" for a in range(100) for b in range(100)])
ANSWERS = encode([str(a + b)[::-1].ljust(4, ".") for a in range(100) for b in range(100)])
PROMPT_LENGTH, ANSWER_LENGTH = PROMPTS.shape[1], ANSWERS.shape[1]


def split(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Parts the problems at random into those trained on [9000] and those held out [1000]."""
  problems = jax.random.permutation(key, PROBLEMS)
  return problems[HELD_OUT:], problems[:HELD_OUT]


def pose(problems: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gives the prompts [..., S] and the right answers [..., T] of problems [...]."""
  return jnp.asarray(PROMPTS)[problems], jnp.asarray(ANSWERS)[problems]


def answer_mask(answers: jax.Array) -> jax.Array:
  """Marks the tokens of answers [..., T] up to and with the first full stop: bool [..., T]."""
  stops = (answers == END).astype(jnp.int32)
  return jnp.cumsum(stops, axis=-1) - stops == 0


def reward(problems: jax.Array, answers: jax.Array) -> jax.Array:
  """Scores answers [..., T] to problems [...]: 1 for the right sum, else 0."""
  _, right = pose(problems)
  matches = (answers == right) | ~answer_mask(answers)
  return jnp.all(matches, axis=-1).astype(jnp.float32)
