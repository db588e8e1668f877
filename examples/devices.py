"""One device, eight devices, two processes: the same training step, the same numbers.

    python examples/devices.py
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/devices.py
    python examples/devices.py --coordinator localhost:9876 --processes 2 --process 0 &
    python examples/devices.py --coordinator localhost:9876 --processes 2 --process 1

On several GPU or TPU hosts nothing changes but the mesh (and on TPU `jax.distributed.initialize`
finds its arguments itself). Arrays are global: weights and advantages are computed over all of the
batch, wherever its rows are, so there is nothing to divide by the number of devices.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo

PROMPTS, SAMPLES, LENGTH, WIDTH, VOCABULARY = 8, 4, 6, 16, 40


def data() -> dict[str, np.ndarray]:
  """Random samples, ragged; in earnest each process would load its own."""
  rng = np.random.default_rng(0)
  shape = (PROMPTS, SAMPLES, LENGTH)
  return {
    "tokens": rng.integers(0, VOCABULARY, shape),
    "mask": np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (PROMPTS, SAMPLES, 1)),
    "rewards": rng.integers(0, 2, (PROMPTS, SAMPLES)).astype(np.float32),
    "old_log_probs": rng.normal(-3.7, 0.1, shape).astype(np.float32),
  }


def start() -> dict[str, np.ndarray]:
  """The parameters before the first step."""
  rng = np.random.default_rng(1)
  shapes = {"embedding": (VOCABULARY, WIDTH), "unembedding": (VOCABULARY, WIDTH)}
  return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


objective = gpo.grpo(beta=None)
optimizer = optax.adam(1e-2)
# Of the mesh in context; each device sees its own rows, and all of the unembedding.
sharding = gpo.Sharding(tokens=P("data"), unembedding=P())


@jax.jit
def step(params, state, batch):
  rollout = objective.prepare(batch["rewards"], batch["mask"], batch["old_log_probs"])

  def loss_fn(params):
    hidden = jnp.tanh(jnp.cumsum(params["embedding"][batch["tokens"]], axis=-2))
    # Each token is predicted from those before it.
    hidden = jnp.pad(hidden[..., :-1, :], [(0, 0), (0, 0), (1, 0), (0, 0)])
    head, tokens = params["unembedding"], batch["tokens"]
    return gpo.linear_loss(objective, hidden, head, tokens, rollout, sharding=sharding)[0]

  loss, gradient = jax.value_and_grad(loss_fn)(params)
  updates, state = optimizer.update(gradient, state)
  return optax.apply_updates(params, updates), state, loss, gradient


def main() -> None:
  """Trains for three steps and prints what must be the same everywhere."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--coordinator", help="address of process 0, host:port")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--process", type=int, default=0)
  parser.add_argument("--out", help="a .npz file for losses, gradients and parameters")
  arguments = parser.parse_args()
  if arguments.processes > 1:
    jax.distributed.initialize(
      arguments.coordinator, arguments.processes, arguments.process, initialization_timeout=60
    )

  mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, P("data"))
  mine = slice(*(PROMPTS * (arguments.process + i) // arguments.processes for i in (0, 1)))
  batch = {
    name: jax.make_array_from_process_local_data(rows, x[mine], x.shape)
    for name, x in data().items()
  }
  params = jax.device_put(start(), NamedSharding(mesh, P()))
  state, found = optimizer.init(params), {}
  for i in range(3):
    with jax.set_mesh(mesh):
      params, state, loss, gradient = step(params, state, batch)
    norm = optax.tree.norm(gradient)
    found |= {f"loss {i}": loss} | {f"gradient {i} {k}": x for k, x in gradient.items()}
    if arguments.process == 0:
      print(f"{jax.device_count()} devices, step {i}: loss {loss:.6f}, gradient {norm:.6f}")
  if arguments.out and arguments.process == 0:
    np.savez(arguments.out, **{k: np.asarray(x) for k, x in (found | params).items()})


if __name__ == "__main__":
  main()
