"""Packing: several samples side by side in one row, for the loss and gradient of one sample a row.

A row of the model's input holds whole sequences, prompt and answer, one after another. Three things
make it exact: attention and positions that stop at a sequence's end (the model's part), weights and
ratios that do (`segment_ids`), and advantages per group (`group_ids`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from demo import task
from demo.policy import Policy, answer_log_probs, pick, sample
from flax import nnx

import gpo_jax as gpo


def pack(sequences: list[np.ndarray], length: int) -> list[list[int]]:
  """Puts each sequence in the first row with room for it; gives the sequences of each row."""
  rows: list[list[int]] = []
  for i, sequence in enumerate(sequences):
    room = (row for row in rows if sum(len(sequences[j]) for j in row) + len(sequence) <= length)
    row = next(room, None)
    if row is None:
      rows.append([i])
    else:
      row.append(i)
  return rows


def lay_out(rows: list[list[int]], arrays: list[np.ndarray], length: int) -> np.ndarray:
  """Lays per-sequence arrays in their rows, `[R, length, …]`, 0 elsewhere."""
  packed = np.zeros((len(rows), length, *arrays[0].shape[1:]), arrays[0].dtype)
  for r, row in enumerate(rows):
    joined = np.concatenate([arrays[i] for i in row])
    packed[r, : len(joined)] = joined
  return packed


# Eight answers to each of six problems, by a policy of random weights.
policy, key = Policy(nnx.Rngs(0)), jax.random.key(0)
problems = jnp.repeat(jnp.arange(6)[:, None] * 1111, 8, axis=1)
prompts, _ = task.pose(problems)
answers, old_log_probs = sample(policy, prompts, key)
mask = task.answer_mask(answers)
rewards = jax.random.uniform(key, problems.shape)
objective = gpo.grpo(beta=None)

old_log_probs += 0.2 * jax.random.normal(key, mask.shape)  # a stale sampler

# One sample a row.
rollout = objective.prepare(rewards, mask, old_log_probs)


def plain_loss(policy):
  return objective(answer_log_probs(policy, prompts, answers), rollout)[0]


# Packed: what the model reads, what follows each token, which of those are answers that count.
width, flat = prompts.shape[-1], (-1, prompts.shape[-1] + answers.shape[-1])
tokens = np.concatenate([prompts, answers], axis=-1).reshape(flat)
lengths = width + np.asarray(mask.sum(-1)).reshape(-1)
old = np.pad(old_log_probs, [(0, 0), (0, 0), (width - 1, 0)]).reshape(len(tokens), -1)
read = [tokens[i, : n - 1] for i, n in enumerate(lengths)]
rows = pack(read, length=30)
place = {i: 1 + row.index(i) for row in rows for i in row}
segments = [np.full(len(x), place[i]) for i, x in enumerate(read)]
packed = {
  "read": lay_out(rows, read, 30),
  "written": lay_out(rows, [tokens[i, 1:n] for i, n in enumerate(lengths)], 30),
  "mask": lay_out(rows, [np.arange(1, n) >= width for n in lengths], 30),
  "old": lay_out(rows, [old[i, : n - 1] for i, n in enumerate(lengths)], 30),
  "segment_ids": lay_out(rows, segments, 30),
}
most = max(map(len, rows))
row_rewards, group_ids = np.zeros((len(rows), most), np.float32), np.full((len(rows), most), -1)
for r, row in enumerate(rows):
  row_rewards[r, : len(row)] = np.asarray(rewards).reshape(-1)[row]
  group_ids[r, : len(row)] = [i // 8 for i in row]

packed_rollout = objective.prepare(
  row_rewards,
  packed["mask"],
  packed["old"],
  segment_ids=packed["segment_ids"],
  group_ids=group_ids,
)


def packed_loss(policy):
  log_probs = policy(jnp.asarray(packed["read"]), jnp.asarray(packed["segment_ids"]))
  return objective(pick(log_probs, jnp.asarray(packed["written"])), packed_rollout)[0]


loss, gradient = nnx.jit(nnx.value_and_grad(plain_loss))(policy)
also, same = nnx.jit(nnx.value_and_grad(packed_loss))(policy)
pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True)
gap = max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(x))) for x, y in pairs)
print(f"{len(tokens)} rows of {width + answers.shape[-1] - 1}: loss {loss:.6f}")
print(f"{len(rows)} rows of 30: loss {also:.6f}, gradients differ by {gap:.1e}")
