"""`to_config` and `from_config`: through files, bit for bit, and what a file cannot say."""

import json
import tomllib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from gpo_jax import configuration, corrections, levels
from tests.support.batches import PRESETS

COMPOSED = gpo.grpo(beta=0.1 + 0.2).replace(
  advantage=partial(gpo.advantages.decoupled, weights=jnp.array([1.0, 0.3])),
  corrections=(
    partial(corrections.mask_importance, low=0, high=np.inf, level=levels.sequence_product),
    corrections.topr,
  ),
)
OBJECTIVES = PRESETS | {
  "composed": COMPOSED,
  "nested_number": gpo.dapo().replace(
    corrections=(
      partial(
        corrections.truncate_importance,
        cap=1 / 3,
        level=partial(levels.clipped_sequence, low=0.1),
      ),
    )
  ),
  "reject": gpo.ppo().replace(
    corrections=(
      partial(
        corrections.reject, high=0.1, statistic=gpo.divergences.k1, level=levels.sequence_max
      ),
    )
  ),
  "allowed": gpo.gspo().replace(
    allow_token_weighting=True, weighting=partial(gpo.weightings.constant_length, length=7)
  ),
}


def to_toml(config):
  """Writes tables in TOML, whose inline values are JSON's but for `=` and infinity."""
  write = lambda value: (
    "{" + ", ".join(f"{k} = {write(v)}" for k, v in value.items()) + "}"
    if isinstance(value, dict)
    else "[" + ", ".join(map(write, value)) + "]"
    if isinstance(value, list)
    else json.dumps(value).replace("Infinity", "inf")
  )
  return "\n".join(f"{key} = {write(value)}" for key, value in config.items())


def yaml_round_trip(config):
  yaml = pytest.importorskip("yaml")
  return yaml.safe_load(yaml.safe_dump(config))


FORMATS = {
  "json": lambda config: json.loads(json.dumps(config)),
  "toml": lambda config: tomllib.loads(to_toml(config)),
  "yaml": yaml_round_trip,
}


def assert_same(found, expected):
  assert repr(found) == repr(expected)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  leaves, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  assert [x.dtype for x in leaves] == [x.dtype for x in expected]
  for x, y in zip(leaves, expected):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_survives_a_file(name, form):
  config = FORMATS[form](gpo.to_config(OBJECTIVES[name]))
  assert_same(gpo.from_config(config), OBJECTIVES[name])


def test_a_float_keeps_all_its_bits_and_its_digits(x64):
  assert gpo.to_config(gpo.grpo(beta=1 / 3))["beta"] == 1 / 3
  assert gpo.to_config(gpo.grpo())["beta"] == 0.04


def test_floats_of_32_bits_are_written_as_they_were_given():
  values = np.random.default_rng(0).uniform(0, 1, 1000).astype(np.float32)
  for value in values:
    assert np.float32(configuration._number("x", jnp.asarray(value))) == value
  assert gpo.to_config(gpo.grpo())["beta"] == 0.04 != float(np.float32(0.04))


def test_every_function_that_a_slot_can_have_has_a_name():
  names = {key: set(configuration._functions(key)) for key in configuration._MODULES}
  assert names["weighting"] >= {"token_mean", "sequence_mean", "constant_length", "token_sum"}
  assert names["level"] >= {"token", "sequence", "sequence_token", "clipped_sequence"}
  assert "by_group" not in names["advantage"]  # not a slot's
  assert "entropy_mask" not in names["corrections"]  # which a slot cannot call
  for key in ("surrogate", "divergence", "advantage", "corrections"):
    documented = [name for name in names[key] if getattr(configuration._MODULES[key], name).__doc__]
    assert len(documented) > 4


def test_a_preset_with_other_numbers_and_slots():
  config = {
    "preset": "dapo",
    "epsilon_high": 0.3,
    "weighting": {"function": "constant_length", "length": 512},
    "divergence": "unbiased",
    "beta": 0.1,
    "corrections": [{"function": "truncate_importance", "cap": 2}],
  }
  expected = gpo.dapo(epsilon_high=0.3).replace(
    weighting=partial(gpo.weightings.constant_length, length=512),
    divergence=gpo.divergences.unbiased,
    beta=0.1,
    corrections=(partial(corrections.truncate_importance, cap=2.0),),
  )
  assert_same(gpo.from_config(config), expected)
  assert_same(gpo.from_config({"preset": "grpo", "beta": None}), gpo.grpo(beta=None))
  assert config["weighting"] == {"function": "constant_length", "length": 512}  # not consumed


SLOTS = gpo.to_config(gpo.dapo())


def changed(**changes):
  return SLOTS | changes


WRONG = {
  "not_a_dictionary": (["dapo"], r"config must be a dictionary; got \['dapo'\]"),
  "empty": ({}, "config must have surrogate, level, weighting, or preset"),
  "missing": ({"surrogate": "reinforce"}, r"must have level, weighting, .*\['surro"),
  "unknown_key": (changed(gamma=1), "config takes preset, surrogate, .*; got 'gamma'"),
  "unknown_function": (
    changed(level="tokn"),
    r"level must be the name of a function of gpo_jax.levels, .*token, sequence.*; got 'tokn'",
  ),
  "of_another_slot": (changed(level="clip"), "level must be the name of .*gpo_jax.levels"),
  "a_path": (changed(surrogate="os.system"), "surrogate must be the name of .*got 'os.system'"),
  "private": (changed(advantage="_samples"), "advantage must be the name of .*got '_samples'"),
  "imported": (changed(advantage="Partial"), "advantage must be the name of .*got 'Partial'"),
  "a_function": (changed(level=levels.token), "level must be the name of"),
  "unknown_number": (
    changed(surrogate={"function": "clip", "epsilon": 0.2}),
    "surrogate=clip takes epsilon_low, epsilon_high, max_ratio; got 'epsilon'",
  ),
  "no_numbers": (
    changed(level={"function": "token", "low": 1}),
    "level=token takes none; got 'low'",
  ),
  "an_array_of_data": (
    changed(level={"function": "token", "rollout": 1}),
    "level=token takes none; got 'rollout'",
  ),
  "missing_number": (changed(weighting="constant_length"), "constant_length .*'length'"),
  "text": (
    changed(surrogate={"function": "clip", "epsilon_low": "3e-4"}),
    r"surrogate.epsilon_low must be a number; got text, '3e-4': write 3\.0e-4 in YAML",
  ),
  "text_in_a_list": (
    changed(corrections=[{"function": "truncate_importance", "cap": "2"}]),
    r"corrections\[0\].cap must be a number; got text, '2'.*float\(\)",
  ),
  "text_inside": (
    changed(
      corrections=[
        {"function": "truncate_importance", "level": {"function": "clipped_sequence", "low": "1"}}
      ]
    ),
    r"corrections\[0\].level.low must be a number; got text",
  ),
  "text_for_beta": (
    changed(divergence="k3", beta="None"),
    "beta must be a number; got text, 'None'.*null",
  ),
  "yes": (changed(divergence="k3", beta=True), "beta must be a number; got True, as which YAML"),
  "no_bool": (changed(allow_token_weighting="yes"), "allow_token_weighting must be true or false"),
  "no_list": (changed(corrections="topr1"), r"corrections\[0\] must be the name of"),
  "out_of_range": (changed(divergence="k3", beta=-1), r"beta must be in \[0, inf\); got -1"),
  "unknown_preset": ({"preset": "grop"}, "name must be one of gpo, .*got 'grop'"),
  "preset_of_a_list": ({"preset": ["grpo"]}, "name must be one of gpo, .*got "),
  "unknown_in_a_preset": ({"preset": "dapo", "gamma": 1}, "dapo takes .*; got gamma"),
  "text_in_a_preset": (
    {"preset": "dapo", "epsilon_low": "2e-1"},
    "epsilon_low of dapo must be a number; got text",
  ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named(case):
  config, message = WRONG[case]
  with pytest.raises(ValueError, match=message):
    gpo.from_config(config)


def test_yaml_reads_text_and_bools_where_numbers_are_meant():
  yaml = pytest.importorskip("yaml")
  for text, message in {
    "epsilon_low: 3e-4": "epsilon_low of dapo must be a number; got text, '3e-4'",
    "epsilon_low: None": "got text, 'None'.*null",
    "epsilon_low: off": "epsilon_low of dapo must be a number; got False, as which YAML reads",
  }.items():
    with pytest.raises(ValueError, match=message):
      gpo.from_config(yaml.safe_load(f"preset: dapo\n{text}"))
  read = yaml.safe_load("preset: dapo\nepsilon_low: 3.0e-4")
  assert_same(gpo.from_config(read), gpo.dapo(epsilon_low=3e-4))
  assert tomllib.loads("x = 3e-4") == json.loads('{"x": 3e-4}') == {"x": 0.0003}  # they do not


UNWRITABLE = {
  "lambda": (gpo.dapo().replace(surrogate=lambda x, a: x * a), "surrogate=<lambda> has no name"),
  "own": (gpo.dapo().replace(level=lambda log_ratio, rollout: log_ratio), "level=<lambda> has no"),
  "wrapped": (
    gpo.dapo().replace(level=jax.tree_util.Partial(lambda x, rollout: levels.token(x, rollout))),
    r"only the functions of gpo_jax\.levels .*from_config\(config\)\.replace\(level=",
  ),
  "in_corrections": (
    gpo.dapo().replace(corrections=(lambda x, rollout: x * 0,)),
    "corrections=<lambda> has no name",
  ),
  "inside": (
    gpo.dapo().replace(
      corrections=(partial(corrections.truncate_importance, level=lambda x, rollout: x),)
    ),
    "level=<lambda> has no name",
  ),
  "sweep": (jax.vmap(lambda beta: gpo.grpo(beta=beta))(jnp.arange(3.0)), "beta must be a scalar"),
  "swept_number": (
    jax.vmap(lambda x: gpo.dapo(epsilon_low=x))(jnp.arange(3.0)),
    "epsilon_.* must be a scalar",
  ),
  "preset_not_called": (gpo.grpo, "objective must be an Objective"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_has_no_name_is_an_error(case):
  objective, message = UNWRITABLE[case]
  with pytest.raises(ValueError, match=message):
    gpo.to_config(objective)


def test_a_function_of_the_same_name_is_not_taken_for_the_package_s():
  def token(log_ratio, rollout):
    return 2 * log_ratio

  with pytest.raises(ValueError, match="level=token has no name"):
    gpo.to_config(gpo.dapo().replace(level=token))


def test_a_traced_number_is_an_error():
  with pytest.raises(ValueError, match="beta must be known; .*outside of jax.jit"):
    jax.jit(lambda beta: gpo.to_config(gpo.grpo(beta=beta))["beta"])(0.1)
