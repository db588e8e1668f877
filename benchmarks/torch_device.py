"""PyTorch and Liger-Kernel on the same device, from the same arrays: DAPO's loss and gradients."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Clock, clock


def contestants(arrays: dict) -> tuple[dict[str, Clock], dict[str, int], dict[str, str]]:
  """Builds clocks by name, with the peak of memory of each, and says why others do not run."""
  if importlib.util.find_spec("torch") is None:
    return {}, {}, {"torch": "not installed"}
  import torch

  if not torch.cuda.is_available():
    return {}, {}, {"torch": "no GPU"}
  clocks, peaks, skipped = {}, {}, {}
  for name, build in {
    "torch compiled, full logits, dapo": _compiled,
    "Liger's Triton kernel, full logits, dapo": _liger_triton,
    "Liger's fused linear loss, dapo": _liger_linear,
  }.items():
    try:
      run = build(arrays)
      run()
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
      before = torch.cuda.memory_allocated()
      run()
      peaks[name] = torch.cuda.max_memory_allocated() - before
      clocks[name] = functools.partial(clock, run)
    except Exception as error:
      skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
  return clocks, peaks, skipped


def _tensor(x: jax.Array):
  import torch

  rows = x.reshape(-1, *x.shape[2:]) if x.ndim > 2 else x
  narrow = rows.dtype == jnp.bfloat16
  tensor = torch.from_numpy(np.asarray(rows.astype(jnp.float32) if narrow else rows).copy()).cuda()
  return tensor.bfloat16() if narrow else tensor


def _inputs(arrays: dict):
  """Converts hidden states and unembedding, both with a gradient, and what a loss takes."""
  hidden, unembedding = (_tensor(arrays[k]).requires_grad_() for k in ("hidden", "unembedding"))
  rewards = arrays["rewards"]
  centered = rewards - rewards.mean(-1, keepdims=True)
  advantages = (centered / (rewards.std(-1, ddof=1, keepdims=True) + 1e-4)).ravel()
  tokens, old, mask = (_tensor(arrays[k]) for k in ("tokens", "old", "mask"))
  return hidden, unembedding, tokens.long(), old, mask.float(), _tensor(advantages)


def _step(loss, *inputs):
  import torch

  def run() -> None:
    torch.autograd.grad(loss(*inputs), inputs)
    torch.cuda.synchronize()

  return run


def _compiled(arrays: dict):
  import torch

  hidden, unembedding, tokens, old, mask, advantages = _inputs(arrays)

  def loss(hidden, unembedding):
    logits = (hidden @ unembedding.T).float()
    chosen = torch.gather(logits, -1, tokens[..., None])[..., 0]
    ratio = torch.exp(chosen - torch.logsumexp(logits, -1) - old)
    clipped = torch.clamp(ratio, 0.8, 1.28)
    surrogate = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return -(surrogate * mask).sum() / mask.sum()

  return _step(torch.compile(loss), hidden, unembedding)


def _liger_triton(arrays: dict):
  import torch
  from liger_kernel.transformers.grpo_loss import triton_grpo_loss

  hidden, unembedding, tokens, old, mask, advantages = _inputs(arrays)
  # The kernel drops the logits of the last position: one more, which predicts nothing.
  hidden = torch.cat([hidden.detach(), hidden.detach()[:, :1]], 1).requires_grad_()

  def loss(hidden, unembedding):
    return triton_grpo_loss(
      hidden @ unembedding.T, old, None, tokens, advantages, mask, temperature=1.0, beta=0.0,
      eps_low=0.2, eps_high=0.28, inplace=True, loss_type="dapo", reduce=True,
    )[0]  # fmt: skip

  return _step(loss, hidden, unembedding)


def _liger_linear(arrays: dict):
  from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

  hidden, unembedding, tokens, old, mask, advantages = _inputs(arrays)
  fused = LigerFusedLinearGRPOLoss(
    beta=0.0, epsilon_high=0.28, loss_type="dapo", use_ref_model=False
  )
  return _step(
    lambda h, w: fused(h, w, tokens, mask, advantages, old_per_token_logps=old)[0],
    hidden,
    unembedding,
  )
