"""A Flax NNX module as the policy: `jax.grad` differentiates the module itself.

A module is a pytree. `nnx.grad` would do here too, but not inside of `jax.lax.scan` or of optax's
microbatches, where `jax.grad` does.
"""

import jax
import jax.numpy as jnp
import optax
import task
from flax import nnx

import gpo_jax as gpo


class Model(nnx.Module):
  """An embedding and a perceptron."""

  def __init__(self, rngs: nnx.Rngs):
    """Draws the weights."""
    self.embedding = nnx.Embed(task.SYMBOLS, 32, rngs=rngs)
    self.hidden = nnx.Linear(32, 32, rngs=rngs)
    self.readout = nnx.Linear(32, task.SYMBOLS, rngs=rngs)

  def __call__(self, tokens):
    """Maps tokens `[..., T]` to logits `[..., T, V]`."""
    return self.readout(jnp.tanh(self.hidden(self.embedding(tokens))))


def policy(model, read, written):
  return gpo.token_log_probs(model(read), written)


objective = gpo.grpo(beta=None)
loss_fn = gpo.as_loss(objective, policy)
model = Model(nnx.Rngs(1))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def update(model, optimizer, key):
  read, written, rewards = task.sample(model, key)
  rollout = objective.prepare(rewards, jnp.ones_like(written))
  grad, _terms = jax.grad(loss_fn, has_aux=True)(model, rollout, read, written)
  optimizer.update(model, grad)
  return jnp.mean(rewards)


task.train(lambda state, key: (state, update(model, optimizer, key)), None)
