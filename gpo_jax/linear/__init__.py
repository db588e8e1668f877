"""Losses and log-probabilities from hidden states: logits `[tokens, vocab]` are never formed.

`api` holds the public functions, `head` makes logits. `forward` passes over the vocabulary for
log-probabilities, `backward` for gradients, `chunks` loops over the tokens that count and calls
both; `tiles` loops over the vocabulary outside of that, for gradients alone. `one_pass` and
`two_passes` are the two ways to differentiate, and the rule that chooses; `selected` looks up K ids
or a support; `mesh` says which device does what.
"""

from gpo_jax.linear.api import linear_divergence as linear_divergence
from gpo_jax.linear.api import linear_loss as linear_loss
from gpo_jax.linear.api import linear_token_log_probs as linear_token_log_probs
from gpo_jax.linear.chunks import Tiling as Tiling
from gpo_jax.linear.forward import TokenLogProbs as TokenLogProbs
from gpo_jax.linear.head import Head as Head
from gpo_jax.linear.mesh import Sharding as Sharding
