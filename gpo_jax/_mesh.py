"""Helpers for Explicit meshes, where a sharding is part of an array's type, and for shard_map."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, reshard


def whole(x: jax.Array) -> jax.Array:
  """Gives every device all of an array; what is on no mesh stays where it is."""
  mesh = jax.typeof(x).sharding.mesh
  return x if mesh.empty else reshard(x, NamedSharding(mesh, PartitionSpec()))


def vary(tree: Any) -> Any:
  """Adds a 0 of all arrays of a tree to each, which compiles to nothing.

  Under `shard_map` all then vary over the devices over which any of them does, as a loop requires;
  and a gradient in a replicated array is summed over the devices, by JAX itself.
  """
  none = [jnp.sum((x != x).astype(jnp.int32) * 0) for x in jax.tree.leaves(tree)]
  zero = functools.reduce(jnp.add, none)
  return jax.tree.map(
    lambda x: x | zero.astype(bool) if x.dtype == bool else x + zero.astype(x.dtype), tree
  )
