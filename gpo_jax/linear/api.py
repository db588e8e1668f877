"""The public functions from hidden states."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpo_jax._inputs import as_mask, check_same_shape
from gpo_jax.linear import one_pass, two_passes
from gpo_jax.linear.forward import TokenLogProbs
from gpo_jax.linear.head import Head, as_head, dot, scale_logits
from gpo_jax.linear.mesh import Sharding, layout_of
from gpo_jax.linear.sweep import Tiling, as_tiling, vary
from gpo_jax.log_probs import as_tokens
from gpo_jax.objective import Objective, check_objective, enter, evaluate
from gpo_jax.traits import traits_of
from gpo_jax.types import Rollout, Terms


def linear_token_log_probs(
  hidden: jax.Array,
  head: jax.Array | Head,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  tiling: Tiling | None = None,
  sharding: Sharding | None = None,
) -> TokenLogProbs:
  """Computes log-probabilities and entropies from hidden states; `[..., T, V]` is never formed.

      log π_t = z_{y_t} − log Σ_v exp(z_v),   z = softcap(h_t Wᵀ + b) / temperature

  Differentiable, once, in hidden states, unembedding and bias, through entropies too. The backward
  pass recomputes the logits: four matrix products of tokens × V × H instead of three.

  On many devices pass `sharding` for arrays on a mesh with Auto axes; arrays on Explicit axes, and
  a call inside of `jax.shard_map`, need nothing. Without it an Auto mesh computes the same, slowly:
  the compiler may gather the unembedding, and all tokens, in each chunk.

  Args:
    hidden: h, the last hidden states, `[..., T, H]` floats; products are of this dtype (of the
      wider of it and the unembedding's), sums are float32 at least.
    head: the unembedding W, `[V, H]`, or a `Head` with a bias, a softcap or a temperature.
    tokens: the sampled tokens, `[..., T]` integers in [0, V). An id outside gives NaN.
    mask: the tokens that count, `[..., T]`; None for all. The others get 0, may hold anything, and
      cost nothing.
    tiling: how much is computed at a time.
    sharding: how tokens and unembedding lie on a mesh.

  Returns:
    `TokenLogProbs(log_probs, entropy)`, `[..., T]` each, in nats.

  Raises:
    ValueError: if shapes or dtypes do not fit.
    NotImplementedError: for second derivatives. (Forward mode is a TypeError of JAX.)

  Example:
    >>> hidden, unembedding = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 2.0]])
    >>> outputs = linear_token_log_probs(hidden, unembedding, jnp.array([0]))
    >>> print(outputs.log_probs, outputs.entropy)
    [-0.693] [0.693]
  """
  hidden, head = as_head(hidden, head)
  tokens = as_tokens(tokens, hidden.shape[:-1], f"hidden {list(hidden.shape)}")
  mask = jnp.ones_like(tokens, bool) if mask is None else as_mask("mask", mask)
  check_same_shape(tokens=tokens, mask=mask)
  layout, hidden, head = layout_of(sharding, hidden, head)
  return _log_probs(as_tiling(tiling), layout, hidden, head, tokens, mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probs(tiling, layout, *arguments):
  return two_passes.log_probs(tiling, layout, *vary(arguments))


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
  tokens × V × H, as if the logits were kept. The package's functions of tokens are declared so, and
  yours may be, with `gpo.tokenwise`. All other objectives (ratios or divergences of responses,
  functions of your own) take the two passes of `linear_token_log_probs`. Outside of `jax.jit` a
  function of your own is compiled in each call, with what it closes over then.

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
    NotImplementedError: for second derivatives. (Forward mode is a TypeError of JAX.)

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
  check_same_shape(tokens=tokens, mask=rollout.mask)
  stand_in = jnp.zeros_like(tokens, head.dtype)
  slots, _, rollout = enter(objective, stand_in, rollout)
  layout, hidden, head = layout_of(sharding, hidden, head)
  in_loss = (slots.surrogate, slots.level, slots.divergence, *slots.corrections)
  ours = all(traits_of(slot).ours for slot in in_loss if slot is not None)
  compiled = _loss if ours else jax.jit(lambda *args: _evaluate(*args), static_argnums=(0, 1, 2))
  structure, numbers = one_pass.split(slots)
  return compiled(as_tiling(tiling), layout, structure, hidden, head, tokens, numbers, rollout)


def _evaluate(tiling, layout, structure, *arguments):
  hidden, head, tokens, numbers, rollout = vary(arguments)
  objective = one_pass.join(structure, numbers)
  if one_pass.is_enough(objective):
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
) -> jax.Array:
  """Computes a divergence of whole distributions from both hidden states, chunk by chunk.

      function(log π, log π_ref)_t,   such as KL_t = Σ_v p_v (log p_v − log q_v)

  Args:
    function: a function of `gpo_jax.vocabulary`.
    hidden: h of the policy, `[..., T, H]`.
    head: the policy's unembedding, `[V, H]`, or a `Head`.
    ref_hidden: h of the reference policy, `[..., T, H']`; no gradient flows to it.
    ref_head: the reference policy's unembedding, `[V, H']`, or a `Head`; no gradient flows to it.
    mask: the tokens that count, `[..., T]`; None for all. The others get 0, and may hold anything.
    tiling: its chunk_size is used, 256 if None; several `[chunk_size, V]` are held.

  Returns:
    Divergences, `[..., T]`.

  Raises:
    ValueError: if shapes or dtypes do not fit.

  Example:
    >>> import gpo_jax as gpo
    >>> hidden, w = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(linear_divergence(gpo.vocabulary.kl, hidden, w, jnp.zeros((1, 2)), w))
    [0.111]
  """
  if not callable(function):
    raise ValueError(f"function must be one of gpo.vocabulary; got {function!r:.60}")
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

  def of_token(states: tuple[jax.Array, jax.Array]) -> jax.Array:
    pairs = zip(states, (head, ref_head), strict=True)
    return function(*(_log_softmax(h, w) for h, w in pairs))

  clean = lambda x: jnp.where(mask[..., None], x, 0).reshape(-1, x.shape[-1])  # noqa: E731
  size = min(as_tiling(tiling).chunk_size or 256, mask.size)
  flat = jax.lax.map(jax.checkpoint(of_token), (clean(hidden), clean(ref_hidden)), batch_size=size)
  return jnp.where(mask, flat.reshape(mask.shape), 0)


def _log_softmax(hidden: jax.Array, head: Head) -> jax.Array:
  return jax.nn.log_softmax(scale_logits(dot("h,vh->v", hidden, head.unembedding), head.bias, head))
