"""A policy that is a plain tree of arrays, trained by optax."""

import jax
import jax.numpy as jnp
import optax
import task

import gpo_jax as gpo


def model(params, tokens):
  hidden = jnp.tanh(params["embedding"][tokens] @ params["hidden"])
  return hidden @ params["unembedding"]


def policy(params, read, written):
  return gpo.token_log_probs(model(params, read), written)


shapes = {"embedding": (task.SYMBOLS, 32), "hidden": (32, 32), "unembedding": (32, task.SYMBOLS)}
keys = jax.random.split(jax.random.key(1), len(shapes))
params = {
  name: jax.random.normal(key, shape) / shape[0] ** 0.5
  for key, (name, shape) in zip(keys, shapes.items(), strict=True)
}
objective = gpo.dapo()
loss_fn = gpo.as_loss(objective, policy)
optimizer = optax.adam(1e-2)


@jax.jit
def step(state, key):
  params, optimizer_state = state
  read, written, rewards = task.sample(lambda tokens: model(params, tokens), key)
  rollout = objective.prepare(rewards, jnp.ones_like(written))
  grad, _terms = jax.grad(loss_fn, has_aux=True)(params, rollout, read, written)
  updates, optimizer_state = optimizer.update(grad, optimizer_state)
  return (optax.apply_updates(params, updates), optimizer_state), jnp.mean(rewards)


task.train(step, (params, optimizer.init(params)))
