"""Compiled for GPUs: memory, and no large collective in a loop; their compiler estimates no time.

`make test-chips` runs these, where compilers for TPUs and GPUs are installed.
"""

import functools
import os

import pytest

import gpo_jax as gpo
from benchmarks import chips

pytest.importorskip("jax_cuda12_plugin")
if not os.environ.get("OPTIMIZE"):
  pytest.skip("without OPTIMIZE=1 GPUs' programs are not optimized either", allow_module_level=True)

SIZE = chips.Size()
LARGE = 16 * SIZE.tokens  # bytes: a few numbers per token


@functools.cache
def alone():
  return chips.Step(chips.GPU, 1, chips.Layout({"data": 1}), SIZE)


@functools.cache
def one_chip(name):
  return alone().linear_loss(gpo.preset(name))


@pytest.mark.parametrize(("name", "share"), [("dapo", 0.75), ("gspo", 0.15)])
def test_one_chip_holds_less_than_full_logits(name, share):
  """Of twice the tokens; in one pass most of it is dW in float32, whatever the tokens."""
  twice = chips.Step(chips.GPU, 1, chips.Layout({"data": 1}), SIZE._replace(tokens=2 * SIZE.tokens))
  objective = gpo.preset(name)
  found, full = twice.linear_loss(objective), twice.full_logits(objective)
  assert found["temporary"] < share * full["temporary"]


@pytest.mark.parametrize("name", chips.LAYOUTS[8])
def test_a_chip_of_eight_gathers_and_reduces_once(name):
  layout = chips.LAYOUTS[8][name]
  found = chips.Step(chips.GPU, 8, layout, SIZE).linear_loss(gpo.dapo())
  for x in found["collectives"]:
    assert x["bytes"] <= LARGE or (x["trips"] == 1 and not x["in_loop"])
  gathered = SIZE.vocabulary * SIZE.hidden * (2 + 4)  # W, and dW before it is scattered
  assert found["temporary"] < one_chip("dapo")["temporary"] + gathered
