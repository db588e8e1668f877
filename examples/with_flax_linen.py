"""A Flax Linen module as the policy: its variables are the parameters."""

import jax
import jax.numpy as jnp
import optax
import task
from flax import linen as nn

import gpo_jax as gpo


class Model(nn.Module):
  """An embedding and a perceptron."""

  @nn.compact
  def __call__(self, tokens):
    """Maps tokens `[..., T]` to logits `[..., T, V]`."""
    x = nn.Embed(task.SYMBOLS, 32)(tokens)
    return nn.Dense(task.SYMBOLS)(jnp.tanh(nn.Dense(32)(x)))


model = Model()


def policy(variables, read, written):
  return gpo.token_log_probs(model.apply(variables, read), written)


objective = gpo.rloo()
loss_fn = gpo.as_loss(objective, policy)
optimizer = optax.adam(1e-2)
variables = model.init(jax.random.key(1), jnp.zeros((1, 1, 1), int))


@jax.jit
def step(state, key):
  variables, optimizer_state = state
  read, written, rewards = task.sample(lambda tokens: model.apply(variables, tokens), key)
  rollout = objective.prepare(rewards, jnp.ones_like(written))
  grad, _terms = jax.grad(loss_fn, has_aux=True)(variables, rollout, read, written)
  updates, optimizer_state = optimizer.update(grad, optimizer_state)
  return (optax.apply_updates(variables, updates), optimizer_state), jnp.mean(rewards)


task.train(step, (variables, optimizer.init(variables)))
