"""`python -m benchmarks.chips`: what compilers make of a step for chips that are not here.

From hidden states it gives the compiler's own estimate of cycles, loops by their trips, as a
multiple of the three matrix products on one chip; memory; and every collective, its size and how
often it runs. From log-probabilities, the bytes through main memory. GPUs' compiler estimates no
cycles. It needs `jax[tpu]`, jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 in its environment, and no
other process that compiles for TPUs. Writes CHIPS.md and chips.json.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gpo_jax as gpo
from benchmarks import hlo, report
from benchmarks.device import both, full, linear, products
from benchmarks.logits import naive
from gpo_jax.linear.chunks import CHIP, as_tiling
from gpo_jax.linear.mesh import axis_names_of
from gpo_jax.linear.one_pass import is_taken

_SLICES = {  # the name of a slice of so many chips, and of the machine that holds it
  ("v5e", 1): "v5e:1x1", ("v5e", 8): "v5e:2x4", ("v5e", 256): "v5e:16x16",
  ("v5p", 1): "v5p:1x1x1", ("v5p", 8): "v5p:2x2x2", ("v5p", 256): "v5p:4x8x8",
  ("v6e", 1): "v6e:1x1", ("v6e", 8): "v6e:2x4", ("v6e", 256): "v6e:16x16",
}  # fmt: skip
_MACHINES = {"v5e": "v5litepod-8", "v5p": "v5p-16", "v6e": "v6e-8"}
GPU = "h100"
KINDS = (*_MACHINES, GPU)
MESHES = {"v5e": (8, 256), GPU: (8,)}
AGAIN = gpo.Tiling(recompute=True)
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


class Layout(NamedTuple):
  """How a step lies on chips: axes of the mesh, and specs of tokens [P, G, T] and W [V, H]."""

  axes: dict[str, int]
  tokens: P = P()
  unembedding: P = P()


class Size(NamedTuple):
  """Tokens per chip in 8 rows, hidden and vocabulary."""

  tokens: int = 8192
  hidden: int = 4096
  vocabulary: int = 151_936


LAYOUTS = {
  8: {
    "data": Layout({"data": 8}, P("data")),
    "FSDP, W over H": Layout({"data": 8}, P("data"), P(None, "data")),
    "FSDP, W over V": Layout({"data": 8}, P("data"), P("data")),
    "data × vocabulary": Layout({"data": 4, "model": 2}, P("data"), P("model")),
    "FSDP × vocabulary": Layout({"data": 4, "model": 2}, P("data"), P("model", "data")),
    "sequence": Layout({"data": 4, "seq": 2}, P("data", None, "seq"), P(None, ("data", "seq"))),
  },
  256: {
    "FSDP, W over H": Layout({"data": 256}, P("data"), P(None, "data")),
    "FSDP × vocabulary": Layout({"data": 64, "model": 4}, P("data"), P("model", "data")),
  },
}


def topology(kind: str, count: int) -> Any:
  """Describes so many chips of a kind: `v5e`, `v5p`, `v6e` or `h100`."""
  from jax.experimental import topologies

  if kind == GPU:
    figures = pathlib.Path(__file__).with_name(f"{GPU}.pbtxt").read_text()
    return topologies.get_topology_desc(
      platform="cuda", topology=f"1x1x{count}", target_config=figures
    )
  os.environ.update(_ENVIRONMENT, TPU_ACCELERATOR_TYPE=_MACHINES[kind])
  one = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
  return topologies.get_topology_desc(_SLICES[kind, count], "tpu", **one)


class Step:
  """Compiles losses with their gradients for a layout on chips.

  Every chip holds `size.tokens` tokens, none padded: whatever axes shard them.
  """

  def __init__(self, kind: str, count: int, layout: Layout, size: Size):
    devices = np.array(topology(kind, count).devices)
    self.mesh = Mesh(devices.reshape(*layout.axes.values()), tuple(layout.axes))
    self.layout, self.size = layout, size
    parts = [math.prod(layout.axes[a] for a in axis_names_of(entry)) for entry in layout.tokens]
    parts += [1] * (3 - len(parts))
    self.shape = (parts[0], 8 * parts[1], size.tokens // 8 * parts[2])
    self.chunk = min(CHIP[0], size.tokens)

  def _like(self, shape: tuple, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

  def arrays(self) -> tuple:
    """Describes hidden states, unembedding and tokens."""
    of_tokens, size = self.layout.tokens, self.size
    states = P(*of_tokens, *[None] * (4 - len(of_tokens)))
    return (
      self._like((*self.shape, size.hidden), jnp.bfloat16, states),
      self._like((size.vocabulary, size.hidden), jnp.bfloat16, self.layout.unembedding),
      self._like(self.shape, jnp.int32, of_tokens),
    )

  def rollout(self, objective: gpo.Objective) -> gpo.Rollout:
    """Describes a rollout."""
    shapes = jax.eval_shape(
      lambda: objective.prepare(
        jnp.zeros(self.shape[:2]), jnp.ones(self.shape, bool), jnp.zeros(self.shape)
      )
    )

    def like(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      entries = zip(self.layout.tokens, x.shape, strict=False)
      return self._like(x.shape, x.dtype, P(*(entry for entry, n in entries if n > 1)))

    return jax.tree.map(like, shapes)

  def products(self) -> dict:
    """Reports on the three products of a single chip."""
    hidden, unembedding, _ = self.arrays()
    return self._report(products, hidden, unembedding)

  def full_logits(
    self, objective: gpo.Objective, log_probs: Callable = gpo.token_log_probs
  ) -> dict:
    """Reports on the loss and its gradients by way of the logits."""
    loss = lambda h, w, y, r: full(h, w, y, objective, r, log_probs=log_probs)  # noqa: E731
    return self._report(both(loss), *self.arrays(), self.rollout(objective))

  def linear_loss(self, objective: gpo.Objective, tiling: gpo.Tiling | None = None) -> dict:
    """Reports on `gpo.linear_loss`."""
    _, tokens, unembedding = self.layout
    alone = self.mesh.size == 1
    how = {"sharding": None if alone else gpo.Sharding(self.mesh, tokens, unembedding)}
    loss = lambda h, w, y, r: linear(h, w, y, objective, r, tiling=tiling, **how)  # noqa: E731
    one_pass = is_taken(as_tiling(tiling), objective)
    return self._report(both(loss), *self.arrays(), self.rollout(objective), one_pass=one_pass)

  def _report(self, function: Any, *arguments: Any, one_pass: bool = False) -> dict:
    shardings = jax.tree.map(lambda x: x.sharding, arguments[:2])
    results = (None, shardings) if len(arguments) > 2 else shardings
    compiled = jax.jit(function, out_shardings=results).lower(*arguments).compile()
    # What a loop over tokens does depends on the mask: here all count, and none is improbable.
    chunks = self.size.tokens // self.chunk
    but_first = chunks - (chunks > 1)
    trips = {
      "improbable_tokens": 0,
      "last_chunks": 0,
      "tiles/chunks": but_first,
      "chunks": but_first if one_pass else chunks,
    }
    program = hlo.Program(compiled.as_text(), trips)
    return {
      "cycles": program.cycles() or None,  # GPUs' compiler estimates none
      "temporary": compiled.memory_analysis().temp_size_in_bytes,
      "collectives": [x._asdict() for x in program.collectives()],
    }


class LogProbs:
  """Compiles losses with their gradients from log-probabilities, for one chip.

  512 rows of 2048 tokens, float32. Packed, a row holds so few responses that one pass of
  `_segments` sums them.
  """

  shape = (64, 8, 2048)

  def __init__(self, kind: str):
    mesh = Mesh(np.array(topology(kind, 1).devices), ("data",))
    self._like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))

  def report(self, name: str, packed: bool = False, metrics: bool = False) -> dict:
    """Reports on a preset: main memory's traffic, beside arguments and results, and cycles."""
    objective = gpo.preset(name)

    def loss(log_probs: jax.Array, rollout: gpo.Rollout) -> Any:
      value, terms = objective(log_probs, rollout)
      return (value, gpo.summarize(terms, rollout)) if metrics else value

    arguments = jax.tree.map(self._like, jax.eval_shape(lambda: self._arrays(objective, packed)))
    step = jax.jit(jax.value_and_grad(loss, has_aux=metrics))
    compiled = step.lower(*arguments).compile()
    program, memory = hlo.Program(compiled.as_text(), {"windows": 1}), compiled.memory_analysis()
    return {
      "traffic": program.traffic(),
      "floor": memory.argument_size_in_bytes + memory.output_size_in_bytes,
      "cycles": program.cycles(),
      "temporary": memory.temp_size_in_bytes,
    }

  def _arrays(self, objective: gpo.Objective, packed: bool) -> tuple[jax.Array, gpo.Rollout]:
    rows, zeros = self.shape[:2], jnp.zeros(self.shape)
    ids = jnp.ones(self.shape, jnp.int32) if packed else None
    rewards = jnp.ones((*rows, 4)) if packed else jnp.ones(rows)
    ref = None if objective.divergence is None else zeros
    mask = zeros == 0
    rollout = objective.prepare(rewards, mask, zeros, ref_log_probs=ref, segment_ids=ids)
    return zeros, rollout


def from_log_probs(kind: str) -> list[dict]:
  """Reports on losses from log-probabilities, plain, with metrics, and of packed rows."""
  step, rows = LogProbs(kind), []
  for name in ("grpo", "dapo", "gspo"):
    plain = step.report(name)
    found = {name: plain}
    found[f"{name}, metrics"] = step.report(name, metrics=True)
    found[f"{name}, packed"] = step.report(name, packed=True)
    for label, x in found.items():
      ratios = {f"{key}_ratio": x[key] / plain[key] for key in ("traffic", "cycles")}
      rows.append(
        {"chip": kind, "name": label, "of_floor": x["traffic"] / x["floor"], **ratios, **x}
      )
  return rows


def log_softmax(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Computes log-probabilities as most code does: all of them, in float32."""
  return naive(logits.astype(jnp.float32), tokens)


def vocabulary_parts(layout: Layout) -> int:
  """Counts the parts of the vocabulary that chips keep to themselves."""
  of_tokens = {axis for entry in layout.tokens for axis in axis_names_of(entry)}
  rows = axis_names_of(layout.unembedding[0]) if len(layout.unembedding) else ()
  return math.prod(layout.axes[axis] for axis in rows if axis not in of_tokens)


def one_chip(kind: str, size: Size) -> list[dict]:
  """Reports on all that one chip is asked to do."""
  step = Step(kind, 1, Layout({"data": 1}), size)
  rows = [
    {"name": "three products", **step.products()},
    {"name": "full logits, jax.nn.log_softmax, dapo", **step.full_logits(gpo.dapo(), log_softmax)},
    {"name": "full logits, token_log_probs, dapo", **step.full_logits(gpo.dapo())},
    {"name": "linear_loss, dapo", **step.linear_loss(gpo.dapo())},
    {"name": "linear_loss, gspo", **step.linear_loss(gpo.gspo())},
    {"name": "linear_loss, dapo, recompute", **step.linear_loss(gpo.dapo(), AGAIN)},
  ]
  unit = rows[0]["cycles"]
  return [{"chip": kind, "chips": 1, "ratio": unit and x["cycles"] / unit, **x} for x in rows]


def meshes(kind: str, count: int, size: Size, unit: float) -> list[dict]:
  """Reports on `linear_loss` in every layout; `unit` is the three products' cycles on one chip.

  A chip that holds 1/n of the vocabulary should do 1/n of the work, so its ratio is to that.
  """
  rows = []
  for name, layout in LAYOUTS[count].items():
    for label, tiling in ((name, None), (f"{name}, recompute", AGAIN)):
      found = Step(kind, count, layout, size).linear_loss(gpo.dapo(), tiling)
      row = {
        "chip": kind,
        "chips": count,
        "name": label,
        "ratio": unit and found["cycles"] / unit * vocabulary_parts(layout),
      }
      rows.append({**row, **found})
  return rows


def reports(kind: str, size: Size) -> dict[str, list[dict]]:
  """Reports on one chip of a kind, and on meshes."""
  jax.config.update("jax_platforms", "cpu")
  rows = one_chip(kind, size)
  for count in MESHES.get(kind, ()):
    rows += meshes(kind, count, size, rows[0]["cycles"])
  return {"hidden_states": rows, "log_probs": [] if kind == GPU else from_log_probs(kind)}


def markdown(found: dict[str, list[dict]], size: Size) -> str:
  """Lays out CHIPS.md."""
  lines = [
    "# Compiled for TPUs and GPUs",
    "",
    f"JAX {jax.__version__}. `make bench-chips` writes this page, on any machine, without a chip.",
    "",
    f"Per chip {size.tokens:,} tokens, H {size.hidden:,}, V {size.vocabulary:,}, bfloat16. Cycles "
    "are the compiler's own estimate, loops counted by their trips, as a multiple of the three "
    "matrix products on one chip, for its part of the vocabulary. Collectives have no estimate, "
    "nor has a GPU.",
    "",
    "## One chip",
    "",
  ]
  rows = found["hidden_states"]
  head = ["chip", "loss and gradients", "× three products", "temporary GB"]
  alone = [x for x in rows if x["chips"] == 1]
  lines += [report.table(head, [_cells(x) for x in alone]), ""]
  together = [x for x in rows if x["chips"] > 1]
  if together:
    head = ["chips", "linear_loss, dapo", *head[2:], "collectives, per step and chip"]
    cells = [[*_cells(x), _collectives(x["collectives"])] for x in together]
    lines += ["## Many chips", "", report.table(head, cells), ""]
  lines += [
    "## From log-probabilities",
    "",
    "512 rows of 2,048 tokens, float32; packed, a row holds at most 8 responses. Bytes from and to "
    "main memory, as a multiple of the arguments read once and the results written once.",
    "",
  ]
  head = ["chip", "loss and gradient", "× floor", "bytes, × unpacked, without metrics", "cycles, ×"]
  cells = [
    [x["chip"], x["name"], *(f"{x[k]:.2f}" for k in ("of_floor", "traffic_ratio", "cycles_ratio"))]
    for x in found["log_probs"]
  ]
  lines += [report.table(head, cells), ""]
  return "\n".join(lines)


def _cells(row: dict) -> list[str]:
  count = f"{row['chips']} × " if row["chips"] > 1 else ""
  temporary = f"{row['temporary'] / 1e9:.2f}"
  ratio = f"{row['ratio']:.2f}" if row["ratio"] else "–"
  return [count + row["chip"], row["name"], ratio, temporary]


def _collectives(found: list[dict]) -> str:
  large = [x for x in found if x["bytes"] >= 1e6]
  text = [
    f"{x['kind']} of {x['bytes'] / 1e6:,.0f} MB" + (f" × {x['trips']}" if x["trips"] > 1 else "")
    + (" in a loop" if x["in_loop"] else "")
    for x in large
  ]  # fmt: skip
  small = sum(x["trips"] for x in found if x["bytes"] < 1e6)
  return "; ".join(text + ([f"{small} small"] if small else [])) or "none"


def main() -> None:
  parser = argparse.ArgumentParser("python -m benchmarks.chips")
  parser.add_argument("--chips", nargs="*", default=KINDS, choices=KINDS)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-output"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  found: dict[str, list[dict]] = {"hidden_states": [], "log_probs": []}
  for kind in args.chips:
    # TPUs' library knows one kind of machine per process.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
      for part, rows in process.submit(reports, kind, Size()).result().items():
        found[part] += rows
    (args.out / "chips.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "CHIPS.md").write_text(markdown(found, Size()))
  print(markdown(found, Size()))


if __name__ == "__main__":
  main()
