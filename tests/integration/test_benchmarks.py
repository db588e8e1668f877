"""The benchmarks run, at sizes that say nothing of speed, and give what they promise."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def bench(out, *options):
  environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  command = [sys.executable, "-m", "benchmarks", "--quick", "--seconds", "0", "--out", out]
  done = subprocess.run(
    [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  return done.stdout, json.loads((out / "results.json").read_text())


def check_rows(result, unit):
  names = [row["contestant"] for row in result["rows"]]
  assert len(set(names)) == len(names) >= 4
  for row in result["rows"]:
    assert row["seconds"] > 0
    assert row["rounds"] >= 3
    assert row["ratios"][unit] > 0
    assert {"compile_seconds", "temporary_bytes", "output_bytes"} <= row.keys()
  (reference,) = [row for row in result["rows"] if row["contestant"] == unit]
  assert reference["ratios"][unit] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("workload", "unit"),
  [
    ("A", "textbook, plain autodiff"),
    ("B", "floor: read and write the logits"),
    ("C", "matmul3"),
  ],
)
def test_a_workload(tmp_path, workload, unit):
  stdout, output = bench(tmp_path, "--only", workload, "--peers", "")
  assert set(output["machine"]) == {"device", "cores", "python", "jax"}
  (result,) = output["results"]
  assert result["workload"] == workload
  check_rows(result, unit)
  assert stdout.count("\n## ") == 1
  for row in result["rows"]:
    assert f"| {row['contestant']} |" in stdout
  assert "Not run: peers (no environment; `make bench-peers` makes it)" in stdout
  assert ("peak_bytes" in result["rows"][0]) == (workload != "A")
  assert (tmp_path / "results.png").exists() == ("scaling" in output) == (workload == "C")


@pytest.mark.slow
def test_accuracy(tmp_path):
  stdout, output = bench(tmp_path, "--only", "D")
  assert output["results"] == []
  ours = [row for row in output["accuracy"] if row["contestant"] == "gpo_jax"]
  assert max(row["to"] for row in ours) == 20
  assert max(max(row["value"], row["slope"]) for row in ours) < 5e-7
  assert stdout.count("| gpo_jax |") == len(ours)


@pytest.mark.slow
def test_peers_that_cannot_be_had_are_named(tmp_path):
  """This interpreter has none of torch, TRL, Liger and Tunix, or has them."""
  stdout, output = bench(tmp_path, "--only", "A", "--peers", sys.executable)
  (result,) = output["results"]
  names = {row["contestant"] for row in result["rows"]} | set(result["skipped"])
  assert {"torch, eager", "torch, compiled", "Tunix", "Tunix with metrics"} <= names
  for name, why in result["skipped"].items():
    assert f"Not run: {name} ({why})" in stdout
