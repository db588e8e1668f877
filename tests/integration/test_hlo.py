"""What the benchmarks read in a compiled program is what the program does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import hlo
from tests.support.quick import fused


def compiled(function, *arguments):
  return fused(function).lower(*arguments).compile().as_text()


def looped(trips):
  def function(x, n):
    with jax.named_scope("outer"):
      return jax.lax.fori_loop(0, trips or n, lambda i, x: jnp.sin(x) @ x, x)

  return compiled(function, jnp.ones((8, 8)), 3)


def runs(program):
  """How often the product runs, whatever the CPU's compiler made of it."""
  return max(count for x, count, _ in program.instructions() if "dot_general" in x.source)


@pytest.mark.parametrize("trips", [2, 7])
def test_loops_count_by_their_trips(trips):
  assert runs(hlo.Program(looped(trips))) == trips


def test_a_loop_of_unknown_trips_is_an_error_unless_it_is_named():
  text = looped(None)
  with pytest.raises(ValueError, match=r"runs an unknown number of times; it is from .*outer"):
    list(hlo.Program(text).instructions())
  assert runs(hlo.Program(text, {"outer": 5})) == 5
  assert runs(hlo.Program(text, {"outer": 0})) == 0


@pytest.mark.parametrize(
  ("shape", "bytes"),
  [("f32[3,5]{1,0}", 60), ("bf16[4]", 8), ("pred[]", 1), ("(f32[2]{0:T(128)S(1)}, s32[])", 12)],
)
def test_sizes(shape, bytes):
  assert hlo.size(shape) == bytes


CYCLES = """
%body (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} fusion(%x), backend_config={"window_config":{"estimated_cycles":"100"}}
}

%go_on (x: f32[4]) -> pred[] {
  %x.1 = f32[4]{0} parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} copy(%a), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %w = f32[4]{0} while(%b), condition=%go_on, body=%body, metadata={op_name="a/chunks/while"}
}
"""


def test_cycles_are_summed_by_trips():
  assert hlo.Program(CYCLES, {"chunks": 3}).cycles() == 307


TRAFFIC = """
ENTRY %main (a: f32[1024], b: f32[8]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %b = f32[8]{0} parameter(1)
  %s = ((f32[1024]{0:T(1024)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %c = (f32[8]{0:T(128)S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%b)
  %t = f32[256]{0:T(256)S(1)} slice-done(%s)
  %d = f32[8]{0:T(128)S(1)} copy-done(%c)
  %f = (f32[1024]{0:T(1024)}, f32[64]{0:T(64)S(1)}) fusion(%a, %a, /*index=2*/%t, %d)
  ROOT %r = f32[1024]{0:T(1024)} get-tuple-element(%f), index=0
}
"""


def test_traffic_is_what_passes_through_main_memory():
  copied, read, written = 4 * 256 + 4 * 8, 4 * 1024, 4 * 1024
  assert hlo.Program(TRAFFIC).traffic() == copied + read + written


def test_collectives_in_and_out_of_loops():
  mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

  def function(x):
    total = jax.lax.psum(x, "x")
    return jax.lax.fori_loop(0, 3, lambda i, t: t + jax.lax.psum(t[:2] * i, "x")[0], total)

  mapped = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)
  x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P("x")))
  found = hlo.Program(compiled(mapped, x)).collectives()
  assert found == [("all-reduce", 64, 1, False), ("all-reduce", 8, 3, True)]
