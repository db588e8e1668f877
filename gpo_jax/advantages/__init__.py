"""Advantages: a sample's reward relative to its group, or a token's relative to a critic.

Those of groups are `(rewards, where=None, *, …) -> advantages`, `[..., G]` to `[..., G]`; the group
is the last axis. `where`, bools or 0/1 of that shape, marks the samples that count, all if None:
the others are in no statistic and have advantage 0. A group whose rewards are all equal has
advantage exactly 0, with no rounding error for a small standard deviation to blow up. A reward that
is not finite makes its whole group NaN. (The group of `batch_standardize`, and of the last step of
`decoupled`, is the batch.) `by_group` tells groups apart by ids. `generalized` is of tokens and
needs a critic's values: pass what it returns to `prepare(advantages=…)`. No gradient flows to the
rewards.
"""

from gpo_jax.advantages.batch import batch_standardize, decoupled
from gpo_jax.advantages.grouping import by_group
from gpo_jax.advantages.groups import (
  center,
  informative,
  leave_one_out,
  max_rl,
  optimal_baseline,
  pass_at_k,
  standardize,
)
from gpo_jax.advantages.tokens import generalized

__all__ = [
  "batch_standardize",
  "by_group",
  "center",
  "decoupled",
  "generalized",
  "informative",
  "leave_one_out",
  "max_rl",
  "optimal_baseline",
  "pass_at_k",
  "standardize",
]
