"""Hidden states and unembedding on many devices: what each computes, and what it tells the others.

Before the loop the unembedding is gathered, once, unless it is sharded over the vocabulary only, on
axes that hold no tokens: then each device sees its part of the vocabulary, and a few numbers per
token are combined. After the loop gradients are summed, once, and scattered if the unembedding was
gathered; with `Tiling(recompute=True)` the unembedding's a tile at a time.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpo_jax._mesh import vary
from gpo_jax.linear.head import Head


class Sharding(NamedTuple):
  """How tokens and unembedding lie on a mesh with Auto axes; Explicit arrays carry it themselves.

  Attributes:
    mesh: the mesh; None for the one in context.
    tokens: of tokens `[..., T]`; hidden states lie likewise, with H whole.
    unembedding: of W `[V, H]`, over V, over H (FSDP), or both; a bias `[V]` likewise.
  """

  mesh: jax.sharding.Mesh | None = None
  tokens: PartitionSpec = PartitionSpec()
  unembedding: PartitionSpec = PartitionSpec()


class Layout(NamedTuple):
  """Which axes of a mesh do what; all empty on one device."""

  mesh: Any = None
  tokens: PartitionSpec = PartitionSpec()
  unembedding: PartitionSpec = PartitionSpec()
  of_tokens: tuple[str, ...] = ()
  of_vocabulary: tuple[str, ...] = ()
  gathered: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

  def on_devices(self, function: Callable, specs: tuple, results: Any) -> Callable:
    """Runs a function on each device's own part of its arguments."""
    if self.mesh is None:
      return function
    own = jax.shard_map(
      function, mesh=self.mesh, in_specs=specs, out_specs=results, check_vma=False
    )

    def run(*arguments: Any) -> Any:
      found = own(*self.place(arguments, specs))
      # That a result varies over the axes of a `shard_map` around this one, its type has lost.
      return vary((arguments, found))[1] if self.inside else found

    return run

  def place(self, tree: Any, specs: Any) -> Any:
    """Moves arrays on Explicit axes to where their specs say; on Auto axes the compiler does."""
    if self.mesh is None or AxisType.Explicit not in self.mesh.axis_types:
      return tree
    move = lambda spec, x: jax.sharding.reshard(x, NamedSharding(self.mesh, spec))  # noqa: E731
    return jax.tree.map(
      lambda spec, part: jax.tree.map(lambda x: move(spec, x), part),
      specs,
      tree,
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )

  def specs(self, head: Head) -> tuple[Any, Any]:
    """Returns the specs of hidden states and of a head's arrays."""
    return PartitionSpec(*self.tokens, None), self.head_specs(head)

  def head_specs(self, head: Head) -> Any:
    """Returns the specs of a head's arrays."""
    unembedding: Any = self.unembedding
    bias: Any = PartitionSpec(*self.unembedding[:1])
    number: Any = PartitionSpec()
    specs: Any = Head(unembedding, bias, number, number)
    return specs._replace(**{name: None for name in head._fields if getattr(head, name) is None})

  @property
  def inside(self) -> bool:
    """Tells whether this is called inside of a `shard_map` over other axes of the mesh."""
    return self.mesh is not None and bool(jax.sharding.get_abstract_mesh().manual_axes)

  @property
  def whole(self) -> "Layout":
    """Returns the layout in which each device sees the whole vocabulary."""
    rows, columns = self.gathered
    return self._replace(of_vocabulary=(), gathered=(rows + self.of_vocabulary, columns))

  @property
  def part(self) -> tuple[Any, int]:
    """Returns which part of the vocabulary is this device's, and of how many."""
    axes = self.of_vocabulary
    return jax.lax.axis_index(axes) if axes else 0, math.prod(map(jax.lax.axis_size, axes))

  def gather(self, head: Head) -> Head:
    """Gathers what this device needs of the head, before the loop."""
    unembedding, bias = head.unembedding, head.bias
    for dim, axes in enumerate(self.gathered):
      if axes:
        unembedding = jax.lax.all_gather(unembedding, axes, axis=dim, tiled=True)
    if bias is not None and self.gathered[0]:
      bias = jax.lax.all_gather(bias, self.gathered[0], axis=0, tiled=True)
    return head._replace(unembedding=unembedding, bias=bias)

  def own_tokens(self, tokens: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """Numbers tokens relative to this device's part of the vocabulary; marks ids of any part."""
    size, (part, parts) = head.unembedding.shape[0], self.part
    own = tokens - size * jnp.asarray(part, tokens.dtype)
    return own, (tokens >= 0) & (tokens < size * parts)

  def over_vocabulary(self, x: Any) -> Any:
    """Sums over the devices that hold parts of the vocabulary."""
    return jax.lax.psum(x, self.of_vocabulary) if self.of_vocabulary else x

  def most(self, count: jax.Array) -> jax.Array:
    """Returns the largest count of all devices if they meet in the loop, which must go alike."""
    axes = self.of_tokens if self.of_vocabulary else ()
    return jax.lax.pmax(count, axes) if axes else count

  def reduce(self, gradients: Any, summed: bool = False) -> Any:
    """Sums `Gradients` over the devices that hold their parts; the unembedding's may be already."""
    hidden, unembedding, bias = gradients
    return gradients._replace(
      hidden=self.over_vocabulary(hidden),
      unembedding=unembedding if summed else self.sum_up(unembedding),
      bias=None if bias is None else self.sum_up(bias),
    )

  def sum_up(self, x: jax.Array) -> jax.Array:
    """Sums a gradient of the head over the devices that hold its parts."""
    rest = set(self.of_tokens)
    for dim, axes in enumerate(self.gathered[: x.ndim]):
      summed = tuple(axis for axis in axes if axis in rest)
      if summed == axes and axes:
        x = jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
        rest -= set(axes)
      elif axes:  # replicated over some of them: sum over the others first, then keep this part
        x = jax.lax.psum(x, summed) if summed else x
        rest -= set(summed)
        size = x.shape[dim] // math.prod(map(jax.lax.axis_size, axes))
        index = jax.lax.axis_index(axes)
        x = jax.lax.dynamic_slice_in_dim(x, index * size, size, dim)
    return jax.lax.psum(x, tuple(a for a in self.of_tokens if a in rest)) if rest else x


def axis_names_of(entry: Any) -> tuple[str, ...]:
  """Returns the axes of a mesh that an entry of a PartitionSpec names."""
  return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def layout_of(
  sharding: Sharding | None, hidden: jax.Array, head: Head
) -> tuple[Layout, jax.Array, Head]:
  """Finds how arrays lie on a mesh: as the user says, or as their types do."""
  if sharding is None:
    specs = [jax.typeof(x).sharding for x in (hidden, head.unembedding)]
    explicit = [s for s in specs if AxisType.Explicit in s.mesh.axis_types]
    if not explicit:
      return Layout(), hidden, head
    specs = [s.spec if s in explicit else PartitionSpec() for s in specs]
    sharding = Sharding(explicit[0].mesh, PartitionSpec(*specs[0][: hidden.ndim - 1]), specs[1])
  elif not isinstance(sharding, Sharding):
    raise ValueError(f"sharding must be a Sharding; got {sharding!r:.60}")
  mesh = jax.sharding.get_abstract_mesh() if sharding.mesh is None else sharding.mesh
  if mesh.empty:
    raise ValueError(
      "sharding needs a mesh; got none: pass gpo.Sharding(mesh), or call inside jax.set_mesh(mesh)"
    )
  layout = _layout(sharding, mesh, hidden, head)
  return layout, *layout.place((hidden, head), layout.specs(head))


def _layout(sharding: Sharding, mesh: Any, hidden: jax.Array, head: Head) -> Layout:
  ndim = hidden.ndim - 1
  if len(sharding.tokens) > ndim or len(sharding.unembedding) > 2:
    raise ValueError(
      f"sharding must have specs of tokens of rank {ndim} and an unembedding [V, H]; got "
      f"tokens={sharding.tokens}, unembedding={sharding.unembedding}"
    )
  tokens = (*sharding.tokens, *[None] * (ndim - len(sharding.tokens)))
  unembedding = (*sharding.unembedding, *[None] * (2 - len(sharding.unembedding)))
  _check("tokens", tokens, hidden.shape[:-1], mesh)
  _check("unembedding", unembedding, head.unembedding.shape, mesh)
  of_tokens = tuple(name for entry in tokens for name in axis_names_of(entry))
  rows, columns = map(axis_names_of, unembedding)
  parallel = bool(rows) and not set(rows) & set(of_tokens)
  return Layout(
    mesh=mesh,
    tokens=PartitionSpec(*tokens),
    unembedding=PartitionSpec(*unembedding),
    of_tokens=of_tokens,
    of_vocabulary=rows if parallel else (),
    gathered=(() if parallel else rows, columns),
  )


def _check(name: str, spec: tuple, shape: tuple[int, ...], mesh: Any) -> None:
  """Checks that a mesh divides an array as its spec says."""
  for entry, size in zip(spec, shape, strict=True):
    for axis in axis_names_of(entry):
      if axis not in mesh.axis_names:
        raise ValueError(f"sharding.{name} names {axis!r}; the mesh has axes {mesh.axis_names}")
    parts = math.prod(mesh.shape[axis] for axis in axis_names_of(entry))
    if size % parts:
      raise ValueError(
        f"sharding.{name} splits an axis of {size} over {parts} devices ({entry}), which do not "
        "divide it: pad it, a vocabulary by rows of W with a bias of -inf"
      )
