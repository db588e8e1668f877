"""An Equinox module as the policy: `eqx.filter_grad` differentiates its arrays.

It has hidden states and an unembedding, so that `linear_loss` need not form the logits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import task

import gpo_jax as gpo


class Model(eqx.Module):
  """An embedding, a perceptron and an unembedding."""

  embedding: jax.Array
  hidden: eqx.nn.Linear
  unembedding: jax.Array

  def __init__(self, key):
    """Draws the weights."""
    keys = jax.random.split(key, 3)
    self.embedding = jax.random.normal(keys[0], (task.SYMBOLS, 32)) / 32**0.5
    self.hidden = eqx.nn.Linear(32, 32, key=keys[1])
    self.unembedding = jax.random.normal(keys[2], (task.SYMBOLS, 32)) / 32**0.5

  def states(self, tokens):
    """Maps tokens `[..., T]` to hidden states `[..., T, H]`."""
    return jnp.tanh(jnp.vectorize(self.hidden, signature="(h)->(h)")(self.embedding[tokens]))

  def __call__(self, tokens):
    """Maps tokens `[..., T]` to logits `[..., T, V]`."""
    return self.states(tokens) @ self.unembedding.T


objective = gpo.cispo()
optimizer = optax.adam(1e-2)


def loss_fn(model, rollout, read, written):
  return gpo.linear_loss(objective, model.states(read), model.unembedding, written, rollout)


@eqx.filter_jit
def step(state, key):
  model, optimizer_state = state
  read, written, rewards = task.sample(model, key)
  rollout = objective.prepare(rewards, jnp.ones_like(written))
  grad, _terms = eqx.filter_grad(loss_fn, has_aux=True)(model, rollout, read, written)
  updates, optimizer_state = optimizer.update(grad, optimizer_state)
  return (eqx.apply_updates(model, updates), optimizer_state), jnp.mean(rewards)


model = Model(jax.random.key(1))
task.train(step, (model, optimizer.init(eqx.filter(model, eqx.is_array))))
