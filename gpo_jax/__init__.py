"""Group policy optimization objectives in JAX."""

from gpo_jax.specification import GpoGradients as GpoGradients
from gpo_jax.specification import check as check
from gpo_jax.specification import gpo_loss as gpo_loss
from gpo_jax.specification import gpo_objective as gpo_objective
from gpo_jax.specification import gpo_objective_per_group as gpo_objective_per_group
from gpo_jax.specification import gpo_value_and_grad as gpo_value_and_grad

__version__ = "0.1.0"
