"""Group policy optimization objectives in JAX.

An `Objective` turns rewards and log-probabilities into a scalar loss; `gpo_jax.presets` names the
known ones, `surrogates`, `levels`, `divergences`, `weightings`, `advantages` and `corrections` hold
what they are made of. `gpo_objective` and its relatives are the written objective in probability
space.
"""

from gpo_jax import advantages as advantages
from gpo_jax import corrections as corrections
from gpo_jax import divergences as divergences
from gpo_jax import levels as levels
from gpo_jax import presets as presets
from gpo_jax import surrogates as surrogates
from gpo_jax import vocabulary as vocabulary
from gpo_jax import weightings as weightings
from gpo_jax.configuration import from_config as from_config
from gpo_jax.configuration import to_config as to_config
from gpo_jax.diagnosis import Diagnosis as Diagnosis
from gpo_jax.diagnosis import Finding as Finding
from gpo_jax.diagnosis import diagnose as diagnose
from gpo_jax.linear import Head as Head
from gpo_jax.linear import Sharding as Sharding
from gpo_jax.linear import Tiling as Tiling
from gpo_jax.linear import TokenLogProbs as TokenLogProbs
from gpo_jax.linear import linear_divergence as linear_divergence
from gpo_jax.linear import linear_loss as linear_loss
from gpo_jax.linear import linear_token_log_probs as linear_token_log_probs
from gpo_jax.log_probs import exact_kl as exact_kl
from gpo_jax.log_probs import token_divergence as token_divergence
from gpo_jax.log_probs import token_entropy as token_entropy
from gpo_jax.log_probs import token_log_probs as token_log_probs
from gpo_jax.merging import merge_metrics as merge_metrics
from gpo_jax.metrics import summarize as summarize
from gpo_jax.objective import Objective as Objective
from gpo_jax.presets import cispo as cispo
from gpo_jax.presets import dapo as dapo
from gpo_jax.presets import deepseek_v32 as deepseek_v32
from gpo_jax.presets import distill as distill
from gpo_jax.presets import dppo as dppo
from gpo_jax.presets import dr_grpo as dr_grpo
from gpo_jax.presets import gmpo as gmpo
from gpo_jax.presets import gpg as gpg
from gpo_jax.presets import gpo as gpo
from gpo_jax.presets import grpo as grpo
from gpo_jax.presets import gspo as gspo
from gpo_jax.presets import gspo_token as gspo_token
from gpo_jax.presets import luspo as luspo
from gpo_jax.presets import max_rl as max_rl
from gpo_jax.presets import ppo as ppo
from gpo_jax.presets import preset as preset
from gpo_jax.presets import r1 as r1
from gpo_jax.presets import reinforce_plus_plus as reinforce_plus_plus
from gpo_jax.presets import rloo as rloo
from gpo_jax.presets import sapo as sapo
from gpo_jax.presets import topr as topr
from gpo_jax.presets import vespo as vespo
from gpo_jax.specification import GpoGradients as GpoGradients
from gpo_jax.specification import check as check
from gpo_jax.specification import gpo_loss as gpo_loss
from gpo_jax.specification import gpo_objective as gpo_objective
from gpo_jax.specification import gpo_objective_per_group as gpo_objective_per_group
from gpo_jax.specification import gpo_value_and_grad as gpo_value_and_grad
from gpo_jax.training import as_loss as as_loss
from gpo_jax.traits import tokenwise as tokenwise
from gpo_jax.types import Rollout as Rollout
from gpo_jax.types import Terms as Terms

__version__ = "0.1.0"
