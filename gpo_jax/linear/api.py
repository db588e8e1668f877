"""The public functions from hidden states."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gpo_jax._inputs import as_mask, check_same_shape
from gpo_jax._mesh import vary
from gpo_jax._padding import mask_of
from gpo_jax.evaluation import enter, evaluate, is_all_ours
from gpo_jax.linear import distributions, one_pass, selected, two_passes
from gpo_jax.linear.chunks import Tiling, as_tiling
from gpo_jax.linear.derivatives import reverse_only
from gpo_jax.linear.forward import TokenLogProbs
from gpo_jax.linear.head import Head, as_head
from gpo_jax.linear.mesh import Sharding, layout_of
from gpo_jax.log_probs import as_tokens, check_function
from gpo_jax.objective import Objective, check_objective
from gpo_jax.types import Rollout, Terms


def linear_token_log_probs(
  hidden: jax.Array,
  head: jax.Array | Head,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  support: jax.Array | None = None,
  tiling: Tiling | None = None,
  sharding: Sharding | None = None,
) -> TokenLogProbs:
  """Computes log-probabilities and entropies from hidden states; `[..., T, V]` is never formed.

      log π_t = z_{y_t} − log Σ_v exp(z_v),   z = softcap(h_t Wᵀ + b) / temperature

  Has first derivatives with respect to hidden states, unembedding and bias, through entropies too.
  The backward pass recomputes the logits: four matrix products of tokens × V × H instead of three.

  With K ids per position, one pass over the vocabulary serves all of them; each additional id reads
  one row of W per position. With a support, the tokens that the sampler's top-k or top-p kept, v
  runs over these only: there is no pass over the vocabulary at all. A sampler that truncates
  without this makes the ratio of an unchanged policy differ from 1.

  On many devices pass `sharding` for arrays on a mesh with Auto axes; arrays on Explicit axes, and
  a call inside of `jax.shard_map`, need nothing. Without it an Auto mesh computes the same, slowly:
  the compiler may gather the unembedding, and all tokens, in each chunk.

  Args:
    hidden: h, the last hidden states, `[..., T, H]` floats; products are of this dtype (of the
      wider of it and the unembedding's), sums are float32 at least.
    head: the unembedding W, `[V, H]`, or a `Head` with a bias, a softcap or a temperature.
    tokens: the sampled tokens, `[..., T]` integers in [0, V), or K ids per position, `[..., T, K]`.
      An id outside gives NaN.
    mask: the tokens that count, `[..., T]`; None for all. The others get 0, may hold anything, and
      cost nothing.
    support: ids of the tokens that the sampler kept, `[..., T, S]`, in any order, with
      negative ids as padding; None for the whole vocabulary. A token outside of it is −inf.
    tiling: how much is computed at a time.
    sharding: how tokens and unembedding lie on a mesh.

  Returns:
    In nats, the log-probabilities, of the shape of tokens, and the entropy of each position,
    `[..., T]`, over the support.

  Raises:
    ValueError: if shapes or dtypes do not fit.
    NotImplementedError: for second derivatives, and in forward mode.

  Example:
    >>> hidden, unembedding = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 2.0]])
    >>> outputs = linear_token_log_probs(hidden, unembedding, jnp.array([0]))
    >>> print(outputs.log_probs, outputs.entropy)
    [-0.693] [0.693]
    >>> alone = linear_token_log_probs(
    ...   hidden, unembedding, jnp.array([[0, 1]]), support=jnp.array([[0, -1]])
    ... )
    >>> print(alone.log_probs)
    [[  0. -inf]]
  """
  hidden, head = as_head(hidden, head)
  of = hidden.shape[:-1], f"hidden {list(hidden.shape)}"
  ids = as_tokens(tokens, *of, several=True)
  mask = jnp.ones(of[0], bool) if mask is None else as_mask("mask", mask)
  check_same_shape(tokens=ids[..., 0], mask=mask)
  if support is not None:
    support = as_tokens(support, *of, several=True, name="support")
  layout, hidden, head = layout_of(sharding, hidden, head)
  hidden, head = reverse_only((hidden, head))
  log_probs, entropy = _log_probs(as_tiling(tiling), layout, hidden, head, ids, mask, support)
  return TokenLogProbs(log_probs.reshape(np.shape(tokens)), entropy)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probs(tiling, layout, *arguments):
  hidden, head, ids, mask, support = vary(arguments)
  if support is not None:
    return selected.within(layout, hidden, head, ids, mask, support)
  if ids.shape[-1] > 1:
    return selected.log_probs(tiling, layout, hidden, head, ids, mask)
  outputs = two_passes.log_probs(tiling, layout, hidden, head, ids[..., 0], mask)
  return outputs._replace(log_probs=outputs.log_probs[..., None])


def linear_loss(
  objective: Objective,
  hidden: jax.Array,
  head: jax.Array | Head,
  tokens: jax.Array,
  rollout: Rollout,
  *,
  tiling: Tiling | None = None,
  sharding: Sharding | None = None,
) -> tuple[jax.Array, Terms]:
  """Computes `objective(log_probs, rollout)` from hidden states, without materialising the logits.

  An objective is a sum over tokens with fixed weights. If a token's gradient depends only on that
  token, one pass over the vocabulary computes loss and gradients, in three matrix products of
  tokens × V × H, as if the logits were kept. The package's token-level functions are declared
  tokenwise; declare yours with `gpo.tokenwise`. All other objectives (ratios, divergences or
  corrections of responses, functions of your own) take the two passes of `linear_token_log_probs`,
  as all do with `Tiling(recompute=True)`, which holds no gradient of the unembedding besides the
  result. Outside of `jax.jit` a function of your own is compiled in each call, with what it closes
  over then.

  Args:
    objective: the objective; its numbers are differentiable too.
    hidden: h, `[..., T, H]`; see `linear_token_log_probs` for this and all that follows.
    head: the unembedding W, `[V, H]`, or a `Head`.
    tokens: the sampled tokens, `[..., T]` integers in [0, V).
    rollout: from `objective.prepare`; its mask says which tokens count.
    tiling: how much is computed at a time.
    sharding: how tokens and unembedding lie on a mesh.

  Returns:
    The loss and its terms, as `objective(log_probs, rollout)` returns them, and the entropy of each
    token as `terms.entropy`, without gradient.

  Raises:
    ValueError: if shapes or dtypes do not fit.
    NotImplementedError: for second derivatives, and in forward mode.

  Example:
    >>> import gpo_jax as gpo
    >>> objective = gpo.dapo()
    >>> rollout = objective.prepare(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 1)))
    >>> hidden, tokens = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]]), jnp.array([[[0], [1]]])
    >>> grad = jax.grad(lambda w: linear_loss(objective, hidden, w, tokens, rollout)[0])
    >>> print(grad(jnp.zeros((2, 2))))
    [[-0.177 -0.177]
     [ 0.177  0.177]]
  """
  check_objective(objective)
  hidden, head = as_head(hidden, head)
  tokens = as_tokens(tokens, hidden.shape[:-1], f"hidden {list(hidden.shape)}")
  check_same_shape(tokens=tokens, mask=mask_of(rollout))
  stand_in = jnp.zeros_like(tokens, head.dtype)
  slots, _, rollout = enter(objective, stand_in, rollout)
  layout, hidden, head = layout_of(sharding, hidden, head)
  compiled = _loss
  if not is_all_ours(slots):
    compiled = jax.jit(lambda *args: _evaluate(*args), static_argnums=(0, 1, 2))
  structure, numbers = one_pass.split(slots)
  hidden, head, numbers = reverse_only((hidden, head, numbers))
  return compiled(as_tiling(tiling), layout, structure, hidden, head, tokens, numbers, rollout)


def _evaluate(tiling, layout, structure, *arguments):
  hidden, head, tokens, numbers, rollout = vary(arguments)
  objective = one_pass.join(structure, numbers)
  if one_pass.is_taken(tiling, objective):
    return one_pass.loss(tiling, layout, structure, hidden, head, tokens, numbers, rollout)
  outputs = two_passes.log_probs(tiling, layout, hidden, head, tokens, rollout.mask)
  log_probs = outputs.log_probs.astype(rollout.weights.dtype)
  loss, terms = evaluate(objective, log_probs, rollout)
  return loss, dataclasses.replace(terms, entropy=jax.lax.stop_gradient(outputs.entropy))


_loss = jax.jit(_evaluate, static_argnums=(0, 1, 2))


def linear_divergence(
  function: Callable[[jax.Array, jax.Array], jax.Array],
  hidden: jax.Array,
  head: jax.Array | Head,
  ref_hidden: jax.Array,
  ref_head: jax.Array | Head,
  *,
  mask: jax.Array | None = None,
  tiling: Tiling | None = None,
  sharding: Sharding | None = None,
) -> jax.Array:
  """Computes a divergence of whole distributions from both hidden states, chunk by chunk.

      function(log π, log π_ref)_t,   such as KL_t = Σ_v p_v (log p_v − log q_v)

  As an objective's divergence, close over it: `replace(divergence=lambda *_: kl, beta=0.01)`. On a
  mesh each unembedding is gathered, once; devices that hold parts of the vocabulary share the
  tokens instead.

  Args:
    function: a function of `gpo_jax.vocabulary`, or one of its signature.
    hidden: h of the policy, `[..., T, H]`.
    head: the policy's unembedding, `[V, H]`, or a `Head`.
    ref_hidden: h of the reference policy or the teacher, `[..., T, H']`; no gradient flows to it.
    ref_head: its unembedding, `[V, H']`, or a `Head`; no gradient flows to it.
    mask: the tokens that count, `[..., T]`; None for all. The others get 0, and may hold anything.
    tiling: its chunk_size is used, 256 if None; holds several `[chunk_size, V]` arrays.
    sharding: how tokens and both unembeddings lie on a mesh; see `linear_token_log_probs`.

  Returns:
    Divergences, `[..., T]`.

  Raises:
    ValueError: if shapes or dtypes do not fit; for arrays sharded over some axes of a mesh inside
      of a `jax.shard_map` over others.

  Example:
    >>> import gpo_jax as gpo
    >>> hidden, w = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(linear_divergence(gpo.vocabulary.kl, hidden, w, jnp.zeros((1, 2)), w))
    [0.111]
  """
  check_function(function)
  hidden, head = as_head(hidden, head)
  ref_hidden, ref_head = jax.lax.stop_gradient(as_head(ref_hidden, ref_head, "ref_"))
  states = ((hidden, head), (ref_hidden, ref_head))
  shapes = [(*x.shape[:-1], w.unembedding.shape[0]) for x, w in states]
  if shapes[0] != shapes[1]:
    raise ValueError(
      "hidden and ref_hidden, head and ref_head must make logits of one shape; got "
      f"{list(shapes[0])} and {list(shapes[1])}"
    )
  mask = jnp.ones(hidden.shape[:-1], bool) if mask is None else as_mask("mask", mask)
  check_same_shape(hidden=hidden[..., 0], mask=mask)
  chunk_size = as_tiling(tiling).chunk_size or 256
  return distributions.divergence(function, chunk_size, sharding, *states[0], *states[1], mask)
