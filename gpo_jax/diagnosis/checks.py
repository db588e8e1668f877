"""What a check is: a function of the batch, with its limit, the limit's source and a remedy.

The function is `(batch) -> (numbers, text)`, or `(batch, pair)` for every policy that the check is
about: the statistics by name, and what is wrong in words, empty if nothing is. It raises
`UnknownError` if the batch does not hold what it needs.
"""

from collections.abc import Callable
from typing import NamedTuple

Result = tuple[dict[str, float], str]
MEASURED = "our measurement, benchmarks/DIAGNOSIS.md"


class Check(NamedTuple):
  """A finding to look for.

  Attributes:
    name: of the finding.
    severity: "error" if numbers are wrong, "warning" if they may be meant.
    limit: what the evidence must exceed.
    source: where the limit comes from.
    remedy: what to do.
    function: returns the numbers and the text.
    policies: the fields that are compared with `log_probs`, one by one; () for the whole batch.
    explained_by: findings about the same field that explain this one.
  """

  name: str
  severity: str
  limit: str
  source: str
  remedy: str
  function: Callable[..., Result]
  policies: tuple[str, ...]
  explained_by: tuple[str, ...]


def check(
  severity: str,
  *,
  limit: str,
  source: str = MEASURED,
  remedy: str,
  policies: tuple[str, ...] = (),
  explained_by: tuple[str, ...] = (),
) -> Callable[[Callable[..., Result]], Check]:
  """Decorates a check's function, whose name is the finding's."""

  def make(function: Callable[..., Result]) -> Check:
    texts = severity, limit, source, remedy
    return Check(function.__name__, *texts, function, policies, explained_by)

  return make
