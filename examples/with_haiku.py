"""A Haiku function as the policy, without its random keys."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import task

import gpo_jax as gpo


@hk.without_apply_rng
@hk.transform
def model(tokens):
  x = hk.Embed(task.SYMBOLS, 32)(tokens)
  return hk.Linear(task.SYMBOLS)(jnp.tanh(hk.Linear(32)(x)))


def policy(params, read, written):
  return gpo.token_log_probs(model.apply(params, read), written)


objective = gpo.gspo()
loss_fn = gpo.as_loss(objective, policy)
optimizer = optax.adam(1e-2)
params = model.init(jax.random.key(1), jnp.zeros((1, 1, 1), int))


@jax.jit
def step(state, key):
  params, optimizer_state = state
  read, written, rewards = task.sample(lambda tokens: model.apply(params, tokens), key)
  rollout = objective.prepare(rewards, jnp.ones_like(written))
  grad, _terms = jax.grad(loss_fn, has_aux=True)(params, rollout, read, written)
  updates, optimizer_state = optimizer.update(grad, optimizer_state)
  return (optax.apply_updates(params, updates), optimizer_state), jnp.mean(rewards)


task.train(step, (params, optimizer.init(params)))
