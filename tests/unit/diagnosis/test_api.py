"""`diagnose`: silent about healthy batches, names what is wrong with others."""

import dataclasses

import jax
import numpy as np
import pytest

import gpo_jax as gpo
from benchmarks import diagnosis, synthetic
from gpo_jax.diagnosis.api import CHECKS
from tests.support.batches import batch
from tests.support.packing import pack

SETTING = synthetic.Setting(drift=0.02)
HEALTHY = synthetic.make(SETTING, 0)


def names(found):
  return [finding.name for finding in found.findings]


def test_every_check_has_a_sabotage_and_a_line_in_the_docstring():
  wanted = {sabotage.finding for sabotage in synthetic.SABOTAGES.values()}
  assert wanted == {check.name for check in CHECKS}
  listed = [line for line in gpo.diagnose.__doc__.splitlines() if line.startswith("  - `")]
  assert [line.split("`")[1] for line in listed] == [check.name for check in CHECKS]


def test_few_healthy_batches_have_a_finding():
  counts = diagnosis.healthy(range(20_000, 20_030), preset="grpo")["all"]
  assert counts["batches"] == 30
  assert counts["any"] == 0, diagnosis.alarms(counts)


@pytest.mark.parametrize("name", synthetic.SABOTAGES)
def test_sabotage_is_named(name):
  assert diagnosis.detected(name, range(20_000, 20_002)) == 1


def test_the_page_has_the_rates_that_are_promised():
  page = diagnosis.PAGE.read_text()
  total = next(line for line in page.splitlines() if "healthy batches" in line).split()
  alarms = int(total[total.index("have") - 1])
  assert alarms <= 0.01 * int(total[1].replace(",", ""))
  rates = [line.split(" | ") for line in page.splitlines() if line.endswith("% |")]
  assert [row[0].removeprefix("| ") for row in rates] == list(synthetic.SABOTAGES)
  assert min(int(row[3].removesuffix("% |")) for row in rates) >= 95


@pytest.mark.parametrize("field", ["old_log_probs", "sampler_log_probs", "ref_log_probs"])
def test_any_field_may_be_missing(field):
  there = {"old_log_probs", "sampler_log_probs", "ref_log_probs"} - {field}
  found = dataclasses.replace(HEALTHY, **dict.fromkeys(there)).diagnose()
  assert not found.findings
  missing = {"ref_log_probs": {"support", "temperature", "stale", "clipping_off", "mismatch"}}
  assert missing.get(field, set()) <= found.unexamined.keys()
  alone = dataclasses.replace(HEALTHY, **dict.fromkeys(there | {field})).diagnose()
  assert alone.unexamined["shifted"] == "no old_log_probs, no sampler_log_probs, no ref_log_probs"
  assert not alone.findings


def test_a_consequence_is_not_another_finding():
  shifted = dataclasses.replace(
    HEALTHY, sampler_log_probs=np.roll(HEALTHY.sampler_log_probs, 1, axis=-1)
  ).diagnose()
  assert names(shifted) == ["shifted"]
  assert shifted.unexamined["mismatch"] == "shifted explains it"
  # The reference is not what the samples are from.
  other = dataclasses.replace(HEALTHY, ref_log_probs=np.roll(HEALTHY.ref_log_probs, 1, axis=-1))
  assert names(other.diagnose()) == ["shifted"]
  assert "mismatch" in other.diagnose().examined


@pytest.mark.quick("None")
@pytest.mark.parametrize("fault", [None, "old_log_probs", "sampler_log_probs"])
def test_packed_rows_are_diagnosed_like_their_responses(fault):
  data = batch(prompts=16, samples=4, length=12, drift=0.05, seed=2)
  if fault:
    setattr(data, fault, np.roll(getattr(data, fault), 1, axis=-1))
  objective = gpo.grpo()
  found = gpo.diagnose(data.log_probs, data.prepare(objective), data.rewards)
  packed, _ = pack(data, rows=24, width=48)
  given = {name: packed.pop(name) for name in ("log_probs", "rewards", "mask", "old_log_probs")}
  log_probs = given.pop("log_probs")
  ids = packed["group_ids"]
  rollout = objective.prepare(**given, **packed)
  again = gpo.diagnose(log_probs, rollout, given["rewards"], group_ids=ids)
  assert again.findings == found.findings
  assert ("shifted" in names(found)) == bool(fault)
  numbers = {row[:3]: row[3] for row in again.table}
  for *key, value in found.table:
    if key[2] != "empty rows":
      np.testing.assert_allclose(numbers[tuple(key)], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_what_padding_holds_is_invisible():
  noisy = dataclasses.replace(HEALTHY)
  for name in synthetic.LOGS:
    setattr(noisy, name, np.where(HEALTHY.mask, getattr(HEALTHY, name), np.nan))
  assert noisy.diagnose().table == HEALTHY.diagnose().table


def test_bad_input():
  rollout = HEALTHY.prepare()
  with pytest.raises(ValueError, match=r"concrete arrays; got traced ones: call it outside of"):
    jax.jit(lambda x: gpo.diagnose(x, rollout))(HEALTHY.log_probs)
  with pytest.raises(ValueError, match=r"log_probs must have the shape of mask"):
    gpo.diagnose(HEALTHY.log_probs[1:], rollout)
  with pytest.raises(ValueError, match=r"rollout must be a Rollout"):
    gpo.diagnose(HEALTHY.log_probs, HEALTHY)
  with pytest.raises(ValueError, match=r"needs a batch with a token"):
    gpo.diagnose(HEALTHY.log_probs, rollout.replace(mask=np.zeros_like(HEALTHY.mask)))
  with pytest.raises(ValueError, match=r"rewards must have one value per response, \[8, 8\]; got"):
    gpo.diagnose(HEALTHY.log_probs, rollout, HEALTHY.rewards.ravel())
  with pytest.raises(ValueError, match=r"group_ids must be integers"):
    gpo.diagnose(HEALTHY.log_probs, rollout, group_ids=HEALTHY.rewards)
