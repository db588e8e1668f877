"""What `diagnose` returns, as text, as a table and as a figure."""

import dataclasses
import functools
import textwrap
from typing import Any, NamedTuple

from gpo_jax.diagnosis.evidence import Evidence
from gpo_jax.diagnosis.plot import draw


class Finding(NamedTuple):
  """Something that is wrong.

  Attributes:
    name: a short one, listed in `diagnose`.
    severity: "error" if numbers are wrong, "warning" if they may be meant.
    evidence: what was found, with its numbers.
    limit: what it exceeds.
    source: where the limit comes from.
    remedy: what to do about it.
  """

  name: str
  severity: str
  evidence: str
  limit: str
  source: str
  remedy: str


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
  """What `diagnose` found; `str()` is the report.

  Attributes:
    findings: errors first, causes before consequences; empty if nothing is wrong.
    examined: the names that were looked for.
    unexamined: why the other names could not be, by name.
    table: the numbers, found or not: rows of (finding, field, statistic, value); the field is
      empty for a statistic of the whole batch.
  """

  findings: tuple[Finding, ...]
  examined: tuple[str, ...]
  unexamined: dict[str, str]
  table: tuple[tuple[str, str, str, float], ...]
  _batch: Evidence = dataclasses.field(repr=False)

  def __str__(self) -> str:
    """Writes the report."""
    size = f"{self._batch.group.size:,} responses, {self._batch.response.size:,} tokens"
    found = {finding.name for finding in self.findings}
    clear = ", ".join(name for name in self.examined if name not in found)
    why = {reason: [] for reason in self.unexamined.values()}
    for name, reason in self.unexamined.items():
      why[reason].append(name)
    rest = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in why.items())
    rest = f" Not examined: {rest}." if rest else ""
    if not self.findings:
      return f"Nothing found in {size}. Examined: {clear}.{rest}"
    number = len(self.findings)
    lines = [f"{number} finding{'s' if number > 1 else ''} in {size}.", ""]
    for finding in self.findings:
      lines.append(f"{finding.severity.upper()} {finding.name}: {finding.evidence}.")
      lines += [f"  {part}: {getattr(finding, part)}" for part in ("remedy", "limit", "source")]
      lines.append("")
    lines.append(f"Nothing else found. Examined: {clear}.{rest}")
    fill = functools.partial(textwrap.fill, width=96, break_on_hyphens=False)
    return "\n".join(fill(line, subsequent_indent="    " * (line[:1] == " ")) for line in lines)

  def plot(self) -> Any:
    """Draws the evidence: log-probabilities against each other, lags, ratios, advantages.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: without matplotlib.
    """
    names = ", ".join(dict.fromkeys(finding.name for finding in self.findings))
    return draw(self._batch, names or "Nothing found")
