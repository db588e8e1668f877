"""Training: an RL update and a supervised one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpo_jax import Objective, Rollout, Terms, summarize

from . import task
from .config import Config
from .evaluate import Metrics
from .policy import Policy, answer_log_probs, sample


class State(NamedTuple):
  """What an update changes.

  Attributes:
    policy: the parameters that are trained.
    sampler: the parameters that answer for the next update. They are the policy's, one update late,
      as where sampling and training run side by side: ratios differ from 1.
    optimizer_state: Adam's moments and count.
  """

  policy: Policy
  sampler: Policy
  optimizer_state: optax.OptState


class Batch(NamedTuple):
  """What one update learns from: groups of answers [prompts, G, T] and their rewards."""

  prompts: jax.Array
  answers: jax.Array
  rewards: jax.Array
  rollout: Rollout


# A policy as a tree of arrays: optax's type of one does not know Flax's modules.
Tree = Any
Collect = Callable[[State, jax.Array], Batch]
Step = Callable[[State, jax.Array], tuple[State, Metrics]]


def start(policy: Tree, optimizer: optax.GradientTransformation) -> State:
  """Gives the state of a policy before its first update."""
  return State(policy, policy, optimizer.init(policy))


def update(optimizer: optax.GradientTransformation, state: State, gradients: Tree) -> State:
  """Follows the gradients; the policy that was trained until now becomes the sampler."""
  updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
  old: Tree = state.policy
  new: Tree = optax.apply_updates(old, updates)
  return State(new, old, optimizer_state)


def rl_optimizer(config: Config) -> optax.GradientTransformation:
  """Makes Adam with clipped gradients and a learning rate that rises from 0, then falls slowly."""
  peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
  total = max(config.steps, warmup + 1)
  rate = optax.schedules.warmup_cosine_decay_schedule(0.0, peak, warmup, total, peak / 2)
  return optax.chain(optax.clip_by_global_norm(config.max_gradient_norm), optax.adam(rate))


def collector(
  config: Config, objective: Objective, reference: Policy, problems: jax.Array
) -> Collect:
  """Makes the function that samples groups of answers, scores them and prepares the rollout."""

  @jax.jit
  def collect(state: State, key: jax.Array) -> Batch:
    choice_key, sample_key = jax.random.split(key)
    chosen = jax.random.choice(choice_key, problems, (config.prompts, 1))
    chosen = jnp.repeat(chosen, config.samples, axis=1)
    prompts, _ = task.pose(chosen)
    answers, old_log_probs = sample(state.sampler, prompts, sample_key)
    rewards, mask = task.reward(chosen, answers), task.answer_mask(answers)
    ref_log_probs = None
    if objective.divergence is not None:
      ref_log_probs = answer_log_probs(reference, prompts, answers)
    rollout = objective.prepare(rewards, mask, old_log_probs, ref_log_probs=ref_log_probs)
    return Batch(prompts, answers, rewards, rollout)

  return collect


def rl_step(
  objective: Objective, optimizer: optax.GradientTransformation, collect: Collect
) -> Step:
  """Makes the update that collects a batch and lowers the loss."""

  @jax.jit
  def step(state: State, key: jax.Array) -> tuple[State, Metrics]:
    batch = collect(state, key)

    def loss_fn(policy: Policy) -> tuple[jax.Array, Terms]:
      return objective(answer_log_probs(policy, batch.prompts, batch.answers), batch.rollout)

    gradients, terms = jax.grad(loss_fn, has_aux=True)(state.policy)
    metrics = {"reward": jnp.mean(batch.rewards), **summarize(terms, batch.rollout)}
    return update(optimizer, state, gradients), metrics

  return step


def supervised_step(
  batch: int, optimizer: optax.GradientTransformation, problems: jax.Array
) -> Step:
  """Makes the update that raises the likelihood of the right answers to a batch of problems."""

  @jax.jit
  def step(state: State, key: jax.Array) -> tuple[State, Metrics]:
    prompts, answers = task.pose(jax.random.choice(key, problems, (batch,)))
    mask = task.answer_mask(answers)

    def loss_fn(policy: Policy) -> tuple[jax.Array, Metrics]:
      log_probs = answer_log_probs(policy, prompts, answers)
      right = jnp.exp(jnp.sum(log_probs, axis=-1, where=mask))
      return -jnp.mean(log_probs, where=mask), {"reward": jnp.mean(right)}

    gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.policy)
    return update(optimizer, state, gradients), metrics

  return step
