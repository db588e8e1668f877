"""The recipe of a run."""

import dataclasses

SUPERVISED = "supervised"


@dataclasses.dataclass(frozen=True)
class Config:
  """What a run depends on: the same configuration gives the same numbers on the same machine.

  Attributes:
    arms: the objectives to train with, by name, or `SUPERVISED`; one after another, each from the
      same warm start.
    steps: updates of each arm after the warm start.
    seed: of every random choice.
    prompts: problems per RL update.
    samples: answers sampled to each of them, the size of a group.
    learning_rate: of RL, at its highest.
    warmup_steps: updates over which that rate rises from 0; it halves by the end.
    max_gradient_norm: of RL; longer gradients are scaled down to it.
    supervised_rate: learning rate of the warm start and of the supervised arm.
    warm_start_batch: answers per update of the warm start.
    warm_start_until: probability of a right answer at which the warm start ends.
    evaluate_every: updates from one evaluation on the held-out problems to the next.
  """

  arms: tuple[str, ...] = ("gpo", SUPERVISED)
  steps: int = 300
  seed: int = 0
  prompts: int = 64
  samples: int = 8
  learning_rate: float = 5e-4
  warmup_steps: int = 20
  max_gradient_norm: float = 1.0
  supervised_rate: float = 1e-3
  warm_start_batch: int = 128
  warm_start_until: float = 0.5
  evaluate_every: int = 25
