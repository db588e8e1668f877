"""`python -m benchmarks.device`: one accelerator, parity with float64, then times beside others.

Everything runs in one process: JAX, and PyTorch and Liger-Kernel if they are installed. Contestants
take turns, round after round, and a table gives ratios of medians to three bare matrix products.
Writes DEVICE.md and device.json to `--out`. Under 8 minutes on an H100; `--seconds` ends it sooner.
"""

import argparse
import functools
import json
import os
import pathlib
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # the rest is for the others

import jax
import jax.numpy as jnp
import numpy as np

import gpo_jax as gpo
from benchmarks import report, torch_device
from benchmarks.timing import clock, interleave, medians

SIZES = [  # tokens, hidden, vocabulary, padding
  (8192, 4096, 151936, 0.3),
  (8192, 4096, 151936, 0.0),
  (8192, 2048, 32768, 0.3),
  (32768, 4096, 151936, 0.3),
]
QUICK = [(512, 16, 256, 0.3)]
DTYPES = {"float32": "highest", "float32, default precision": "default", "bfloat16": "default"}


def batch(size: tuple, dtype=jnp.bfloat16) -> dict:
  """Draws hidden states, an unembedding, tokens and what a loss takes, `[prompts, 8, T]`."""
  count, hidden, vocabulary, padding = size
  keys = jax.random.split(jax.random.key(0), 5)
  rows = max(count // 1024, 8)
  shape = (rows // 8, 8, count // rows)
  lengths = jnp.linspace(1 - 2 * padding, 1, rows).reshape(*shape[:2], 1) * shape[2]
  old = -np.log(vocabulary) - 0.5 + 0.3 * jax.random.normal(keys[3], shape)
  unembedding = jax.random.normal(keys[1], (vocabulary, hidden), jnp.float32) / hidden**0.5
  return {
    "hidden": jax.random.normal(keys[0], (*shape, hidden), dtype),
    "unembedding": unembedding.astype(dtype),
    "tokens": jax.random.randint(keys[2], shape, 0, vocabulary),
    "mask": jnp.arange(shape[2]) < lengths,
    "rewards": (jnp.arange(rows) % 2).astype(jnp.float32).reshape(shape[:2]),
    "old": old,
    "ref": old + 0.1 * jax.random.normal(keys[4], shape),
  }


def prepared(objective: gpo.Objective, arrays: dict, packed: bool = False) -> gpo.Rollout:
  """Prepares a rollout; packed, each row holds two responses."""
  mask, rewards, ids = arrays["mask"], arrays["rewards"], None
  if packed:
    ids = jnp.broadcast_to(1 + (jnp.arange(mask.shape[-1]) >= mask.shape[-1] // 3), mask.shape)
    rewards = jnp.stack([rewards, 1 - rewards], axis=-1)
  return objective.prepare(
    rewards, mask, arrays["old"], ref_log_probs=arrays["ref"], segment_ids=ids
  )


def linear(hidden, unembedding, tokens, objective, rollout, **how):
  return gpo.linear_loss(objective, hidden, unembedding, tokens, rollout, **how)[0]


def full(
  hidden, unembedding, tokens, objective, rollout, dtype=None, log_probs=gpo.token_log_probs
):
  logits = jnp.einsum("...h,vh->...v", hidden, unembedding, preferred_element_type=dtype)
  return objective(log_probs(logits, tokens), rollout)[0]


def products(hidden, unembedding):
  """Computes the three matrix products of forward and backward pass, and nothing else."""
  logits = jnp.einsum("...h,vh->...v", hidden, unembedding)
  d_hidden = jnp.einsum("...v,vh->...h", logits, unembedding)
  return d_hidden, jnp.einsum("...v,...h->vh", logits, hidden)


def both(loss):
  return jax.value_and_grad(loss, argnums=(0, 1))


def parity(size: tuple) -> list[dict]:
  """Compares loss and gradients from hidden states with full logits in float64."""
  rows = []
  for name in ("dapo", "gspo"):
    objective = gpo.preset(name)
    for packed in (False, True):
      for precision, products_in in DTYPES.items():
        arrays = batch(size, jnp.dtype(precision.split(",")[0]))
        rollout = prepared(objective, arrays, packed)
        inputs = (arrays["hidden"], arrays["unembedding"])
        rest = (arrays["tokens"], objective, rollout)
        with jax.default_matmul_precision(products_in):
          value, gradients = jax.jit(both(linear))(*inputs, *rest)
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
          wide = [x.astype(jnp.float64) for x in inputs]
          expected, truth = jax.jit(both(full))(*wide, *rest)
        errors = [_error(x, y) for x, y in zip(gradients, truth, strict=True)]
        rows.append(
          {
            "objective": name + (", packed" if packed else ""),
            "dtype": precision,
            "loss": abs(float(value) - float(expected)),
            "hidden": errors[0],
            "unembedding": errors[1],
          }
        )
  return rows


def _error(value, expected) -> float:
  """Computes ‖value − expected‖ / ‖expected‖."""
  value, expected = (np.asarray(x.astype(jnp.float32), np.float64) for x in (value, expected))
  return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def contestants(size: tuple) -> dict:
  """Builds functions and their arguments, by name."""
  arrays, dapo, gspo = batch(size), gpo.dapo(), gpo.gspo()
  inputs = (arrays["hidden"], arrays["unembedding"])
  of_dapo = (*inputs, arrays["tokens"], dapo, prepared(dapo, arrays))
  of_gspo = (*inputs, arrays["tokens"], gspo, prepared(gspo, arrays))
  chunks = {f"linear_loss, dapo, chunks of {n}": gpo.Tiling(chunk_size=n) for n in (1024, 4096)}
  return {
    "three products": (products, inputs),
    "linear_loss, dapo": (both(linear), of_dapo),
    "linear_loss, gspo": (both(linear), of_gspo),
    "full logits, dapo": (both(full), of_dapo),
    "full logits in float32, dapo": (both(functools.partial(full, dtype=jnp.float32)), of_dapo),
    **{k: (both(functools.partial(linear, tiling=t)), of_dapo) for k, t in chunks.items()},
  }


def timed(size: tuple, seconds: float, until: float) -> dict:
  """Times all contestants at a size; what does not fit or comes too late is named."""
  clocks, temporary, skipped = {}, {}, {}
  for name, (function, arguments) in contestants(size).items():
    if time.time() > until:
      skipped[name] = "out of time"
      continue
    try:
      compiled = jax.jit(function).lower(*arguments).compile()
      jax.block_until_ready(compiled(*arguments))
    except jax.errors.JaxRuntimeError as error:
      skipped[name] = str(error).splitlines()[0][:100]
      continue
    temporary[name] = compiled.memory_analysis().temp_size_in_bytes
    clocks[name] = functools.partial(clock, functools.partial(compiled, *arguments))
  if time.time() < until:
    others, peaks, failed = torch_device.contestants(batch(size))
    clocks, temporary, skipped = clocks | others, temporary | peaks, skipped | failed
  times = interleave(clocks, seconds, 3)
  rows = medians(times, ("three products",))
  return {
    "size": size,
    "rows": [{"name": k, **row, "temporary": temporary[k]} for k, row in rows.items()],
    "skipped": skipped,
  }


def markdown(result: dict) -> str:
  """Lays out the tables of DEVICE.md."""
  lines = [f"# On one {result['device']}", ""]
  lines += [f"JAX {result['jax']}. `python -m benchmarks.device` writes this page.", ""]
  for entry in result["times"]:
    tokens, hidden, vocabulary, padding = entry["size"]
    lines += [f"## {tokens} tokens, H {hidden}, V {vocabulary}, {padding:.0%} padding", ""]
    head = ["loss and gradients, bfloat16", "median", "× three products", "temporary GB"]
    rows = [
      [
        row["name"],
        f"{1e3 * row['seconds']:.2f} ms",
        f"{row['ratios']['three products']:.2f}",
        f"{row['temporary'] / 1e9:.2f}",
      ]
      for row in entry["rows"]
    ]
    lines += [report.table(head, rows), ""]
    lines += [f"- {name}: {why}" for name, why in entry["skipped"].items()]
    lines += [""] if entry["skipped"] else []
  lines += ["## Parity with float64", "", "Relative error of the gradients, in norm.", ""]
  head = ["objective", "dtype", "loss, absolute", "hidden states", "unembedding"]
  rows = [
    [row["objective"], row["dtype"], *(f"{row[k]:.1e}" for k in ("loss", "hidden", "unembedding"))]
    for row in result["parity"]
  ]
  return "\n".join([*lines, report.table(head, rows), ""])


def main() -> None:
  start = time.time()
  parser = argparse.ArgumentParser("python -m benchmarks.device")
  parser.add_argument("--seconds", type=float, default=400.0, help="start nothing after that")
  parser.add_argument("--quick", action="store_true", help="small sizes: whether it works")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-output"))
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  device = jax.devices()[0]
  result = {"device": device.device_kind, "jax": jax.__version__, "times": [], "parity": []}

  def save() -> None:
    (args.out / "device.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "DEVICE.md").write_text(markdown(result))

  result["parity"] = parity(QUICK[0] if args.quick else (2048, 512, 8192, 0.3))
  save()
  for size in QUICK if args.quick else SIZES:
    if time.time() - start < args.seconds:
      result["times"].append(timed(size, 0.5 if args.quick else 4.0, start + args.seconds))
      save()
  print(markdown(result))
  print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
  main()
