"""The demo: the task, the policy, the command line, and short runs of the whole."""

import dataclasses
import functools
import importlib.util
import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

# ruff: noqa: E402
import examples.demo.run as experiment
import gpo_jax as gpo
from examples.demo import __main__ as command
from examples.demo import objectives, picture, report, task, train
from examples.demo.config import SUPERVISED, Config
from examples.demo.evaluate import evaluate
from examples.demo.policy import Policy, answer_log_probs, sample
from examples.demo.run import WARM_START, Arm, Record

TINY = Config(prompts=4, samples=4, warm_start_until=0.0, warm_start_batch=8, evaluate_every=2)
SmallPolicy = functools.partial(Policy, width=16, heads=2)
PROBLEMS = jnp.arange(task.PROBLEMS)
apply = jax.jit(Policy.__call__)
draw = jax.jit(sample)


@pytest.fixture(scope="module")
def policy():
  return SmallPolicy(nnx.Rngs(0))


@pytest.fixture
def as_users_run():
  # Strict promotion is our own rule; Adam, as optax writes it, does not keep it.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def untrained(monkeypatch):
  """Gives a function that replaces training: a policy is its accuracy, one for each objective."""

  def replace(accuracies):
    metrics = {"reward": 0.5, "clip_fraction": 0.0}

    def evaluate(policy, **inputs):
      answers = task.ANSWERS[: task.HELD_OUT]
      return {"sampled": policy, "greedy": 0.5, "divergence": 0.0}, answers

    def rl_arm(name, config, policy, problems):
      start, end = (train.State(p, None, None) for p in (policy, accuracies.get(name, policy)))
      return lambda state, key: (end, metrics), start

    monkeypatch.setattr(experiment, "Policy", lambda rngs: jnp.float32(0.5))
    monkeypatch.setattr(experiment, "evaluate", evaluate)
    monkeypatch.setattr(experiment, "rl_arm", rl_arm)
    monkeypatch.setattr(train, "supervised_step", lambda *args: lambda state, key: (state, metrics))

  return replace


def test_every_right_answer_scores_one():
  _, right = task.pose(PROBLEMS)
  assert np.all(task.reward(PROBLEMS, right) == 1)


@pytest.mark.parametrize("position", range(task.ANSWER_LENGTH))
def test_every_corrupted_answer_scores_zero(position):
  _, right = task.pose(PROBLEMS)
  for shift in range(1, len(task.VOCABULARY)):
    other = (right[:, position] + shift) % len(task.VOCABULARY)
    corrupted = right.at[:, position].set(other)
    counts = task.answer_mask(right)[:, position]
    np.testing.assert_array_equal(task.reward(PROBLEMS, corrupted), 1 - counts.astype(jnp.float32))


@pytest.mark.parametrize(
  ("prompt", "answer", "score"),
  [
    ("47+85=", "231.", 1),
    ("00+00=", "0.", 1),
    ("99+99=", "891.", 1),
    ("01+02=", "3.", 1),
    ("01+02=", "30.", 0),
    ("01+02=", "3", 0),
    ("47+85=", "132.", 0),
    ("47+85=", "2315", 0),
  ],
)
def test_answers_as_a_reader_sees_them(prompt, answer, score):
  problem = int(prompt[:2]) * 100 + int(prompt[3:5])
  assert task.decode(task.PROMPTS[problem]) == prompt
  tokens = jnp.asarray(task.encode([answer.ljust(task.ANSWER_LENGTH, "+")]))
  assert task.reward(jnp.array([problem]), tokens) == score
  assert task.decode(task.encode([answer])[0]) == answer


def test_the_mask_ends_with_the_first_stop():
  answers = jnp.asarray(task.encode(["1...", "12.3", "1234", ".12."]))
  expected = [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
  np.testing.assert_array_equal(task.answer_mask(answers), expected)


def test_the_held_out_problems_are_not_trained_on():
  for seed in range(3):
    training, held_out = task.split(jax.random.key(seed))
    assert (len(training), len(held_out)) == (9000, 1000)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), PROBLEMS)


def test_the_policy_is_as_small_as_it_says():
  weights = jax.tree.leaves(jax.eval_shape(lambda: Policy(nnx.Rngs(0))))
  assert f"of {sum(leaf.size for leaf in weights):,} weights" in Policy.__doc__


def test_the_policy_gives_probabilities(policy):
  log_probs = apply(policy, jnp.asarray(task.PROMPTS[:6]).reshape(2, 3, -1))
  assert log_probs.shape == (2, 3, task.PROMPT_LENGTH, len(task.VOCABULARY))
  assert log_probs.dtype == jnp.float32
  np.testing.assert_allclose(jnp.sum(jnp.exp(log_probs), axis=-1), 1, rtol=1e-5)


def test_the_past_does_not_see_the_future(policy):
  prompts, answers = task.pose(jnp.array([4785, 12]))
  tokens = jnp.concatenate([prompts, answers], axis=1)
  for position in range(1, tokens.shape[1]):
    changed = tokens.at[:, position:].set((tokens[:, position:] + 1) % len(task.VOCABULARY))
    before, after = apply(policy, tokens), apply(policy, changed)
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert np.any(before[:, position:] != after[:, position:])


def test_the_sampler_reports_the_policys_log_probs(policy):
  prompts, _ = task.pose(PROBLEMS[:1024].reshape(64, 16))
  answers, log_probs = draw(policy, prompts, jax.random.key(1))
  assert answers.shape == log_probs.shape == (64, 16, task.ANSWER_LENGTH)
  recomputed = jax.jit(answer_log_probs)(policy, prompts, answers)
  np.testing.assert_allclose(log_probs, recomputed, rtol=1e-5)


def test_samples_follow_the_policy(policy):
  prompts, _ = task.pose(jnp.full((64, 16), 4785))
  answers, log_probs = draw(policy, prompts, jax.random.key(2))
  first = np.ravel(answers[..., 0])
  for token in np.unique(first):
    probability = np.exp(np.ravel(log_probs[..., 0])[first == token][0])
    deviation = np.sqrt(probability * (1 - probability) / first.size)
    assert abs(np.mean(first == token) - probability) < 5 * deviation


def test_the_objectives_are_the_presets():
  assert {"gpo", "grpo", "dapo", "gspo", "dr_grpo", "max_rl"} <= objectives.PRESETS.keys()
  for name, preset in objectives.PRESETS.items():
    assert preset is getattr(gpo, name)
  length = objectives.build("dr_grpo").weighting.keywords["length"]
  assert length == task.ANSWER_LENGTH


@pytest.mark.quick("deepseek_v32", "gspo", "dapo", "gpo")
@pytest.mark.parametrize("name", objectives.PRESETS)
def test_an_update_asks_the_reference_where_there_is_a_divergence(name, policy, monkeypatch):
  asked, divergence = [], name in ("gpo", "grpo", "deepseek_v32", "r1")

  def counted(*inputs):
    asked.append(inputs)
    return answer_log_probs(*inputs)

  monkeypatch.setattr(train, "answer_log_probs", counted)
  optimizer = optax.sgd(1.0)
  collect = train.collector(TINY, objectives.build(name), policy, PROBLEMS)
  step = train.rl_step(objectives.build(name), optimizer, collect)
  _, metrics = jax.eval_shape(step, train.start(policy, optimizer), jax.random.key(0))
  assert len(asked) == 1 + divergence
  assert {"reward", "clip_fraction", "ratio_max"} <= metrics.keys()
  assert ("divergence" in metrics) == divergence


def test_the_evaluation_gives_the_likelihood_of_the_right_answers(policy, as_users_run):
  problems = PROBLEMS[: task.HELD_OUT]
  metrics, answers = evaluate(policy, policy, problems, jax.random.key(0))
  assert metrics["divergence"] == 0
  prompts, right = task.pose(problems)
  log_probs = jax.jit(answer_log_probs)(policy, prompts, right)
  likelihoods = jnp.exp(jnp.sum(log_probs, axis=1, where=task.answer_mask(right)))
  np.testing.assert_allclose(metrics["sampled"], jnp.mean(likelihoods), rtol=1e-5)
  assert answers.shape == right.shape


def test_a_run_is_written(tmp_path, as_users_run, monkeypatch, capsys):
  traces = []

  def counted(log_ratio, advantages):
    traces.append(log_ratio)
    return gpo.surrogates.clip(log_ratio, advantages)

  monkeypatch.setattr(objectives, "build", lambda name: gpo.gpo().replace(surrogate=counted))
  monkeypatch.setattr(experiment, "Policy", SmallPolicy)
  status = command.main(["--steps", "3", "--seed", "5", "--out", str(tmp_path)], TINY)
  assert len(traces) == 3  # to check what it returns; to compile, for CPU and for others
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  before, after = (metrics["results"]["gpo"][when] for when in ("before", "after"))
  assert status == (0 if after["sampled"] > before["sampled"] else command.NOT_IMPROVED)
  assert metrics["results"][SUPERVISED]["before"]["sampled"] == before["sampled"]
  assert metrics["config"]["seed"] == 5
  assert not metrics["interrupted"]
  for name in ("gpo", SUPERVISED):
    history = metrics["history"][name]
    assert [row["step"] for row in history["updates"]] == [1, 2, 3]
    assert [row["step"] for row in history["evaluations"]] == [0, 2, 3]
  assert len(metrics["examples"]) == 3
  assert_picture(tmp_path / "learning.png")
  printed = capsys.readouterr().out
  assert str(tmp_path / "learning.png") in printed
  assert "\nA batch of gpo: Nothing found in 16 responses, " in f"\n{printed}"


@pytest.mark.slow
def test_a_comparison_starts_every_arm_alike(tmp_path, as_users_run, monkeypatch):
  monkeypatch.setattr(experiment, "Policy", SmallPolicy)
  command.main(["--compare", "dapo,dr_grpo,vespo", "--steps", "3", "--out", str(tmp_path)], TINY)
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  assert list(metrics["results"]) == ["dapo", "dr_grpo", "vespo"]
  starts = [results["before"] for results in metrics["results"].values()]
  first = [metrics["history"][name]["updates"][0] for name in metrics["results"]]
  for key, rows in (("sampled", starts), ("greedy", starts), ("reward", first)):
    assert len({row[key] for row in rows}) == 1


@pytest.mark.slow
def test_a_configuration_determines_a_run(as_users_run, monkeypatch):
  monkeypatch.setattr(experiment, "Policy", SmallPolicy)

  def numbers(seed):
    record = experiment.Record(dataclasses.replace(TINY, steps=3, seed=seed, arms=("gpo",)))
    experiment.run(record)
    rows = [row for arm in record.arms.values() for row in arm.updates + arm.evaluations]
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]

  first = numbers(seed=5)
  np.testing.assert_equal(numbers(seed=5), first)
  assert numbers(seed=6) != first


@pytest.mark.parametrize(
  ("flags", "arms"),
  [
    ([], ("gpo", SUPERVISED)),
    (["--objective", "gspo"], ("gspo", SUPERVISED)),
    (["--compare", "grpo"], ("grpo",)),
    (["--compare", "grpo, dapo"], ("grpo", "dapo")),
  ],
)
def test_the_flags_choose_the_arms(tmp_path, untrained, flags, arms, capsys):
  untrained(dict.fromkeys(arms, 0.6))
  assert command.main([*flags, "--steps", "2", "--out", str(tmp_path)]) == 0
  written = json.loads((tmp_path / "metrics.json").read_text())
  assert list(written["history"]) == [WARM_START, *arms]
  table = capsys.readouterr().out
  assert all(f"\n{arm} " in table for arm in arms)
  assert ("right answers" in table) == (SUPERVISED in arms)
  assert_picture(tmp_path / "learning.png")


def test_one_objective_that_does_not_improve_fails_a_comparison(tmp_path, untrained, capsys):
  untrained({"grpo": 0.6, "dapo": 0.5, "gspo": 0.4, "gmpo": np.nan})
  flags = ["--compare", "grpo,dapo,gspo,gmpo", "--steps", "2", "--out", str(tmp_path)]
  assert command.main(flags) == command.NOT_IMPROVED
  assert "did not improve: dapo, gspo, gmpo." in capsys.readouterr().err


def test_the_sampler_is_one_update_late(as_users_run):
  optimizer = optax.sgd(0.5)
  state = train.start({"w": jnp.ones(2)}, optimizer)
  for old, new in ((1.0, 0.5), (0.5, 0.0)):
    state = train.update(optimizer, state, {"w": jnp.ones(2)})
    np.testing.assert_array_equal(state.sampler["w"], old)
    np.testing.assert_array_equal(state.policy["w"], new)


@pytest.mark.parametrize(
  ("flags", "rows", "recorded"),
  [
    ([], 0, {WARM_START: 0}),
    ([], 2, {WARM_START: 1, "gpo": 0}),
    ([], 4, {"gpo": 2}),
    ([], 504, {"gpo": 500, SUPERVISED: 0}),
    (["--compare", "grpo,dapo,gspo"], 510, {"grpo": 500, "dapo": 6}),
  ],
)
def test_an_interrupted_run_leaves_what_was_recorded(
  tmp_path, monkeypatch, untrained, capsys, flags, rows, recorded
):
  untrained({})
  row, made = Arm.row, []

  def interrupting_row(arm, number, metrics):
    if len(made) == rows:
      raise KeyboardInterrupt
    made.append(number)
    return row(arm, number, metrics)

  monkeypatch.setattr(Arm, "row", interrupting_row)
  config = dataclasses.replace(TINY, evaluate_every=1000)
  arguments = [*flags, "--steps", "500", "--out", str(tmp_path)]
  assert command.main(arguments, config) == command.INTERRUPTED
  assert "Interrupted" in capsys.readouterr().err
  written = json.loads((tmp_path / "metrics.json").read_text())
  assert written["interrupted"]
  assert list(written["history"])[-1] == list(recorded)[-1]
  for name, updates in recorded.items():
    assert len(written["history"][name]["updates"]) == updates
  assert_picture(tmp_path / "learning.png")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--steps", "0"], "at least 1"),
    (["--steps", "-3"], "at least 1"),
    (["--steps", "ten"], "'ten'"),
    (["--seed", "-1"], "at least 0"),
    (["--out", __file__], "is a file"),
    (["--objective", "ppo"], "needs one of gpo, grpo,"),
    (["--objective", "grpo,dapo"], "got 'grpo,dapo'"),
    (["--objective", ""], "got ''"),
    (["--objective", SUPERVISED], "needs one of"),
    (["--compare", "grpo,ppo"], "got 'ppo'"),
    (["--compare", "grpo,dapo,grpo"], "each name once"),
    (["--compare", ""], "got ''"),
    (["--compare", "grpo,"], "got ''"),
    (["--compare", "grpo", "--objective", "gpo"], "not allowed with"),
    (["--objective", "gpo", "--compare", "grpo"], "not allowed with"),
  ],
)
def test_bad_flags_are_refused(arguments, message, capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(arguments)
  assert stop.value.code == command.USAGE
  error = capsys.readouterr().err
  assert arguments[0] in error
  assert message in error


def test_help():
  script = [sys.executable, "-m", "examples.demo", "--help"]
  done = subprocess.run(script, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  for word in ("--steps", "--seed", "--out", "--objective", "--compare", *objectives.PRESETS):
    assert word in done.stdout


def test_a_missing_package_is_named(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "tqdm" or None)
  with pytest.raises(SystemExit) as stop:
    command.main([])
  assert stop.value.code == command.USAGE
  error = capsys.readouterr().err
  assert "tqdm" in error
  assert 'pip install "gpo_jax[demo]"' in error


def test_an_arm_improves_if_its_last_evaluation_beats_its_first():
  for accuracies, improved in (
    ((), False),
    ((0.5,), False),
    ((0.5, 0.4), False),
    ((0.5, 0.6), True),
  ):
    rows = [{"sampled": accuracy} for accuracy in accuracies]
    assert report.improved(Arm("gpo", evaluations=rows)) == improved


def test_no_two_curves_look_alike():
  record = Record(Config(arms=tuple(objectives.PRESETS)))
  styles = [picture.style(record, arm) for arm in record.reinforced()]
  looks = {(style["color"], style["linestyle"], style["marker"]) for style in styles}
  assert len(looks) == len(styles) == len(objectives.PRESETS)


def assert_picture(path):
  head = path.read_bytes()[:24]
  assert head.startswith(b"\x89PNG")
  assert struct.unpack(">II", head[16:]) == (1200, 800)
