"""Compiled for TPUs: as fast on many chips as on one, and no large collective in a loop.

`make test-chips` runs these, where TPUs' library is installed; a process of its own holds it.
"""

import functools

import pytest

import gpo_jax as gpo
from benchmarks import chips

pytest.importorskip("libtpu")

KIND = "v5e"
SIZE = chips.Size()  # smaller ones do not fill a chip
LARGE = 16 * SIZE.tokens  # bytes: a few numbers per token


def step(count, layout):
  return chips.Step(KIND, count, layout, SIZE)


@functools.cache
def alone():
  return step(1, chips.Layout({"data": 1}))


@functools.cache
def one_chip(name):
  return alone().linear_loss(getattr(gpo, name)())


@pytest.mark.parametrize(("name", "products"), [("dapo", 1.15), ("gspo", 1.5)])
def test_one_chip_takes_little_more_than_the_products(name, products):
  assert one_chip(name)["cycles"] < products * alone().products()["cycles"]


def test_token_log_probs_holds_the_logits_once_and_plain_jax_six_times():
  logits = 2 * SIZE.tokens * SIZE.vocabulary  # bytes, of bfloat16; their gradient overwrites them
  ours, usual = alone().full_logits(gpo.dapo()), alone().full_logits(gpo.dapo(), chips.log_softmax)
  assert ours["temporary"] < 1.02 * logits
  assert usual["temporary"] > 5.5 * logits
  assert ours["cycles"] < 0.75 * usual["cycles"]


def test_from_hidden_states_twice_the_tokens_hold_their_own_gradient_more():
  twice = chips.Step(KIND, 1, chips.Layout({"data": 1}), SIZE._replace(tokens=2 * SIZE.tokens))
  found, full = twice.linear_loss(gpo.dapo()), twice.full_logits(gpo.dapo())
  more = found["temporary"] - one_chip("dapo")["temporary"]
  assert more < 1.02 * 4 * SIZE.tokens * SIZE.hidden
  assert found["temporary"] < 0.6 * full["temporary"]
  assert found["cycles"] < 1.1 * full["cycles"]


def test_recomputing_needs_a_fifth_of_the_memory_of_full_logits():
  found, full = alone().linear_loss(gpo.dapo(), chips.AGAIN), alone().full_logits(gpo.dapo())
  assert found["temporary"] < 0.6e9
  assert found["temporary"] < 0.25 * full["temporary"]
  assert found["cycles"] < 1.5 * full["cycles"]


@pytest.mark.parametrize("name", ["FSDP, W over H", "data"])
def test_recomputing_on_eight_chips_sums_each_part_of_the_gradient_once_in_float32(name):
  layout = chips.LAYOUTS[8][name]
  found = step(8, layout).linear_loss(gpo.dapo(), chips.AGAIN)
  share = 1 if name == "data" else 8
  sums = [x for x in found["collectives"] if x["kind"] in ("all-reduce", "reduce-scatter")]
  total = sum(x["bytes"] * x["trips"] for x in sums if x["bytes"] > LARGE)
  part = 4 * SIZE.vocabulary * SIZE.hidden // share
  assert part <= total < part + LARGE  # the loss may travel with the last one
  gathered = 2 * SIZE.vocabulary * SIZE.hidden if share > 1 else 0
  assert found["temporary"] < 0.8e9 + gathered


@pytest.mark.parametrize("name", chips.LAYOUTS[8])
def test_a_chip_of_eight_costs_what_one_does(name):
  layout = chips.LAYOUTS[8][name]
  found = step(8, layout).linear_loss(gpo.dapo())
  assert found["cycles"] * chips.vocabulary_parts(layout) < 1.05 * one_chip("dapo")["cycles"]
  for x in found["collectives"]:
    assert x["bytes"] <= LARGE or (x["trips"] == 1 and not x["in_loop"])


# Bytes through main memory, as a multiple of the arguments and the results.
REACHED = {"grpo": 1.15, "dapo": 1.15, "gspo": 2.2}


@pytest.mark.parametrize("name", REACHED)
def test_a_loss_from_log_probabilities_moves_little_more_than_it_must(name):
  step = chips.LogProbs(KIND)
  plain, metrics = step.report(name), step.report(name, metrics=True)
  packed = step.report(name, packed=True)
  assert plain["traffic"] < REACHED[name] * plain["floor"]
  assert metrics["traffic"] < 2.2 * metrics["floor"]
  assert packed["traffic"] < 2 * plain["traffic"]
