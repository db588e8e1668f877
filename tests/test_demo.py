"""The demo: the task, the policy, and short runs of the whole."""

import dataclasses
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
import gpo_jax.demo.run as experiment
from gpo_jax.demo import __main__ as command
from gpo_jax.demo import objective, report, task, train
from gpo_jax.demo.config import Config
from gpo_jax.demo.evaluate import evaluate
from gpo_jax.demo.policy import Policy, answer_log_probs, sample
from gpo_jax.demo.run import REINFORCEMENT, SUPERVISED, WARM_START, Arm, Record

TINY = Config(prompts=4, samples=4, warm_start_until=0.0, warm_start_batch=8, evaluate_every=2)
PROBLEMS = jnp.arange(task.PROBLEMS)
apply = jax.jit(Policy.__call__)
draw = jax.jit(sample)


@pytest.fixture(scope="module")
def policy():
  return Policy(nnx.Rngs(0))


@pytest.fixture
def as_users_run():
  # Strict promotion is our own rule; Adam, as optax writes it, does not keep it.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


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


def test_the_policy_is_small_and_gives_probabilities(policy):
  assert 90_000 < sum(leaf.size for leaf in jax.tree.leaves(policy)) < 110_000
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


def test_a_group_of_equal_rewards_has_no_advantage():
  rewards = jnp.array([[0.1] * 7, [1.0] * 7, [0.0] * 7, [1.0, 0, 0, 0, 0, 0, 0]])
  advantages = objective.standardise(rewards)
  np.testing.assert_array_equal(advantages[:3], 0)
  np.testing.assert_allclose(jnp.mean(advantages[3]), 0, atol=1e-7)
  np.testing.assert_allclose(jnp.std(advantages[3]), 1, rtol=1e-5)


def test_the_loss_follows_the_reward_and_skips_what_is_masked():
  rewards = jnp.array([[1.0, 0.0], [1.0, 1.0]])
  log_probs = jnp.full((2, 2, 3), -1.0)
  mask = jnp.ones((2, 2, 3), bool).at[..., 2].set(False)
  with jax.debug_nans(True):
    gradient, metrics = jax.grad(objective.group_policy_loss, has_aux=True)(
      log_probs, rewards, mask, log_probs, log_probs
    )
  np.testing.assert_allclose(gradient[0, :, :2], [[-1 / 8, -1 / 8], [1 / 8, 1 / 8]], rtol=1e-5)
  np.testing.assert_array_equal(gradient[1], 0)
  np.testing.assert_array_equal(gradient[..., 2], 0)
  assert metrics["reward"] == 0.75


def test_the_fraction_clipped_counts_what_has_no_gradient():
  rewards = jnp.array([[1.0, 0.0]])
  old = jnp.full((1, 2, 4), -1.0)
  log_probs = old + jnp.array([[[-0.5, 0.0, 0.1, 0.5]]])
  mask = jnp.ones(old.shape, bool)
  gradient, metrics = jax.grad(objective.group_policy_loss, has_aux=True)(
    log_probs, rewards, mask, old, old, beta=0.0
  )
  assert metrics["clipped"] == jnp.mean(gradient == 0) == 0.25


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

  def counted(*inputs):
    traces.append(inputs)
    return objective.group_policy_loss(*inputs)

  monkeypatch.setattr(experiment, "group_policy_loss", counted)
  status = command.main(["--steps", "3", "--seed", "5", "--out", str(tmp_path)], TINY)
  assert len(traces) == 1
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  before, after = (metrics["results"][REINFORCEMENT][when] for when in ("before", "after"))
  assert status == (0 if after["sampled"] > before["sampled"] else command.NOT_IMPROVED)
  assert metrics["results"][SUPERVISED]["before"]["sampled"] == before["sampled"]
  assert metrics["config"]["seed"] == 5
  assert not metrics["interrupted"]
  for name in (REINFORCEMENT, SUPERVISED):
    history = metrics["history"][name]
    assert [row["step"] for row in history["updates"]] == [1, 2, 3]
    assert [row["step"] for row in history["evaluations"]] == [0, 2, 3]
  assert len(metrics["examples"]) == 3
  assert_picture(tmp_path / "learning.png")
  assert str(tmp_path / "learning.png") in capsys.readouterr().out


def test_the_sampler_is_one_update_late(as_users_run):
  optimizer = optax.sgd(0.5)
  state = train.start({"w": jnp.ones(2)}, optimizer)
  for old, new in ((1.0, 0.5), (0.5, 0.0)):
    state = train.update(optimizer, state, {"w": jnp.ones(2)})
    np.testing.assert_array_equal(state.sampler["w"], old)
    np.testing.assert_array_equal(state.policy["w"], new)


@pytest.mark.parametrize(
  ("rows", "recorded"),
  [
    (0, {WARM_START: 0}),
    (2, {WARM_START: 1, REINFORCEMENT: 0}),
    (4, {REINFORCEMENT: 2}),
    (504, {REINFORCEMENT: 500, SUPERVISED: 0}),
  ],
)
def test_an_interrupted_run_leaves_what_was_recorded(
  tmp_path, policy, monkeypatch, as_users_run, capsys, rows, recorded
):
  metrics = {"reward": 0.5, "clipped": 0.0, "sampled": 0.5, "greedy": 0.5, "divergence": 0.0}
  answers = task.ANSWERS[:1000]
  monkeypatch.setattr(experiment, "Policy", lambda rngs: policy)
  monkeypatch.setattr(experiment, "evaluate", lambda *args, **kwargs: (metrics, answers))
  for name in ("supervised_step", "reinforcement_step"):
    monkeypatch.setattr(train, name, lambda *args: lambda state, key: (state, metrics))
  row, made = Arm.row, []

  def interrupting_row(arm, number, metrics):
    if len(made) == rows:
      raise KeyboardInterrupt
    made.append(number)
    return row(arm, number, metrics)

  monkeypatch.setattr(Arm, "row", interrupting_row)
  config = dataclasses.replace(TINY, evaluate_every=1000)
  assert command.main(["--steps", "500", "--out", str(tmp_path)], config) == command.INTERRUPTED
  assert "Interrupted" in capsys.readouterr().err
  written = json.loads((tmp_path / "metrics.json").read_text())
  assert written["interrupted"]
  for name, updates in recorded.items():
    assert len(written["history"][name]["updates"]) == updates
  assert_picture(tmp_path / "learning.png")


@pytest.mark.parametrize(
  "arguments",
  [["--steps", "0"], ["--steps", "-3"], ["--steps", "ten"], ["--seed", "-1"], ["--out", __file__]],
)
def test_bad_flags_are_refused(arguments, capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(arguments)
  assert stop.value.code == command.USAGE
  assert arguments[0] in capsys.readouterr().err


def test_help():
  script = [sys.executable, "-m", "gpo_jax.demo", "--help"]
  done = subprocess.run(script, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  for flag in ("--steps", "--seed", "--out"):
    assert flag in done.stdout


def test_a_missing_package_is_named(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "tqdm" or None)
  with pytest.raises(SystemExit) as stop:
    command.main([])
  assert stop.value.code == command.USAGE
  error = capsys.readouterr().err
  assert "tqdm" in error
  assert 'pip install "gpo_jax[demo]"' in error


def test_no_improvement_is_a_failure():
  record = Record(TINY)
  assert not report.improved(record)
  for accuracies, improved in (((0.5,), False), ((0.5, 0.4), False), ((0.5, 0.6), True)):
    rows = [{"sampled": accuracy} for accuracy in accuracies]
    record.arms[REINFORCEMENT] = Arm(REINFORCEMENT, evaluations=rows)
    assert report.improved(record) == improved


def assert_picture(path):
  head = path.read_bytes()[:24]
  assert head.startswith(b"\x89PNG")
  assert struct.unpack(">II", head[16:]) == (1200, 800)
