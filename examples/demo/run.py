"""A run: the warm start, then arms from the policy it leaves, recorded as they go."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from gpo_jax import diagnose

from . import objectives, task, train
from .config import SUPERVISED, Config
from .evaluate import Metrics, evaluate
from .policy import Policy, answer_log_probs

WARM_START = "warm start"
Row = dict[str, float]
Measure = Callable[[Policy], tuple[Metrics, jax.Array]]


@dataclasses.dataclass
class Arm:
  """One stretch of training, and what is known of it so far.

  Attributes:
    name: what it is called in the report.
    updates: a row for each update: its number, its metrics and the seconds since the arm began.
    evaluations: a row for each evaluation: the number of updates before it, and the same.
    answers: the held-out answers sampled at each evaluation.
    begin: when it began.
  """

  name: str
  updates: list[Row] = dataclasses.field(default_factory=list)
  evaluations: list[Row] = dataclasses.field(default_factory=list)
  answers: list[np.ndarray] = dataclasses.field(default_factory=list)
  begin: float = dataclasses.field(default_factory=time.perf_counter)

  def row(self, number: int, metrics: Metrics) -> Row:
    """Makes a row; reading the metrics waits for their computation."""
    values = {name: float(value) for name, value in metrics.items()}
    return {"step": number, **values, "seconds": time.perf_counter() - self.begin}

  def seconds(self) -> float:
    """Gives how long the arm took so far, compilation and evaluation included."""
    return max((row["seconds"] for row in self.updates + self.evaluations), default=0.0)


@dataclasses.dataclass
class Record:
  """What a run leaves, complete or interrupted.

  Attributes:
    config: what the run depends on.
    held_out: the problems of the evaluations.
    arms: by name, the stretches of training that have begun.
    interrupted: whether the run was stopped before its end.
  """

  config: Config
  held_out: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  arms: dict[str, Arm] = dataclasses.field(default_factory=dict)
  interrupted: bool = False

  def begin(self, name: str) -> Arm:
    """Begins an arm."""
    return self.arms.setdefault(name, Arm(name))

  def arm(self, name: str) -> Arm:
    """Gives an arm, empty where it has not begun."""
    return self.arms.get(name, Arm(name))

  def reinforced(self) -> list[Arm]:
    """Gives the arms of the objectives, in their order, empty where they have not begun."""
    return [self.arm(name) for name in self.config.arms if name != SUPERVISED]


def run(record: Record) -> None:
  """Fills a record: the warm start, then one arm after another, with the same random choices.

  The supervised arm is shown the right answers, as in the warm start, whose optimizer's state it
  keeps; the others are only told which of their own are right.
  """
  config = record.config
  keys = jax.random.split(jax.random.key(config.seed), 4)
  problems, held_out = task.split(keys[0])
  record.held_out = np.asarray(held_out)

  adam = optax.adam(config.supervised_rate)
  start = train.start(Policy(nnx.Rngs(keys[1])), adam)
  step = train.supervised_step(config.warm_start_batch, adam, problems)
  warm = warm_start(record.begin(WARM_START), step, start, keys[2], config.warm_start_until)
  measure = functools.partial(evaluate, reference=warm.policy, problems=held_out, key=keys[3])

  for name in config.arms:
    if name == SUPERVISED:
      step, start = train.supervised_step(config.prompts * config.samples, adam, problems), warm
    else:
      step, start = rl_arm(name, config, warm.policy, problems)
    train_arm(record.begin(name), step, start, keys[3], config, measure)


def rl_arm(
  name: str, config: Config, policy: Policy, problems: jax.Array
) -> tuple[train.Step, train.State]:
  """Gives the update by an objective and the state before the first one, a policy its reference."""
  objective, optimizer = objectives.build(name), train.rl_optimizer(config)
  collect = train.collector(config, objective, policy, problems)
  start = train.start(policy, optimizer)
  batch = collect(start, jax.random.key(config.seed))
  log_probs = jax.jit(answer_log_probs)(policy, batch.prompts, batch.answers)
  print(f"A batch of {name}: {diagnose(log_probs, batch.rollout, batch.rewards)}")
  return train.rl_step(objective, optimizer, collect), start


def warm_start(
  arm: Arm, step: train.Step, state: train.State, key: jax.Array, until: float
) -> train.State:
  """Trains on right answers until those of a batch have the mean probability `until`."""
  for _, trained in _updates(arm, step, state, key, itertools.count(1)):
    if arm.updates[-1]["reward"] >= until:
      return trained
  return state


def train_arm(
  arm: Arm, step: train.Step, state: train.State, key: jax.Array, config: Config, measure: Measure
) -> None:
  """Trains for the configured number of updates, measured on held-out problems now and then."""

  def note(number: int, policy: Policy) -> None:
    metrics, answers = measure(policy)
    arm.evaluations.append(arm.row(number, metrics))
    arm.answers.append(np.asarray(answers))

  note(0, state.policy)
  for number, trained in _updates(arm, step, state, key, range(1, config.steps + 1)):
    if number % config.evaluate_every == 0 or number == config.steps:
      note(number, trained.policy)


def _updates(
  arm: Arm, step: train.Step, state: train.State, key: jax.Array, numbers: Iterable[int]
) -> Iterator[tuple[int, train.State]]:
  with tqdm(numbers, desc=f"{arm.name:>19}", unit=" updates") as bar:
    for number in bar:
      state, metrics = step(state, jax.random.fold_in(key, number))
      arm.updates.append(arm.row(number, metrics))
      bar.set_postfix(reward=f"{arm.updates[-1]['reward']:.2f}", refresh=False)
      yield number, state
