"""What is wrong with this batch: named findings, from the arrays that the loss sees.

`api` runs the checks on the `evidence`, a batch on the host: `readings` of log-probabilities,
`distances` between policies, and `rollouts`. `report` is what comes out.
"""

from gpo_jax.diagnosis.api import diagnose as diagnose
from gpo_jax.diagnosis.report import Diagnosis as Diagnosis
from gpo_jax.diagnosis.report import Finding as Finding
