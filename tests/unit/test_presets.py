"""`gpo.preset`: presets by name, as a configuration file has them."""

import pytest

import gpo_jax as gpo
from tests.support.batches import MADE, NEEDED


@pytest.mark.parametrize("name", MADE)
def test_a_preset_by_name_is_the_preset(name):
  numbers = NEEDED.get(name, {})
  assert repr(gpo.preset(name, **numbers)) == repr(getattr(gpo, name)(**numbers))


def test_numbers_reach_the_preset():
  assert repr(gpo.preset("grpo", beta=None, epsilon_low=0.1)) == repr(
    gpo.grpo(beta=None, epsilon_low=0.1)
  )


WRONG = {
  "unknown_name": (("grop", {}), r"name must be one of gpo, grpo, .*distill; got 'grop'"),
  "no_name": ((None, {}), "name must be one of .*got None"),
  "unknown_number": (("dapo", {"gamma": 1.0}), "dapo takes epsilon_low, epsilon_high; got gamma"),
  "number_of_a_preset_without": (("rloo", {"beta": 1.0}), "rloo takes none; got beta"),
  "missing_number": (("dr_grpo", {}), "dr_grpo takes length, .*got none: .*'length'"),
  "misspelt_slot": (("dapo", {"surogate": "clip"}), "dapo takes .*unexpected .*'surogate'"),
  "text": (
    ("gspo", {"epsilon_low": "3e-4"}),
    r"epsilon_low of gspo must be a number; got text, '3e-4': .*3\.0e-4",
  ),
  "out_of_range": (("grpo", {"beta": -0.1}), r"beta must be in \[0, inf\); got -0.1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_name_or_number_says_what_is_right(case):
  (name, numbers), message = WRONG[case]
  with pytest.raises(ValueError, match=message):
    gpo.preset(name, **numbers)
