"""The same loss as other packages compute it, for the machines that happen to have them."""

import functools
from collections.abc import Callable

import numpy as np


def torch_contestants(arrays: tuple) -> dict[str, Callable[[], object]]:
  """Gives the textbook formula in PyTorch, eager and compiled; nothing without PyTorch."""
  try:
    import torch
  except ImportError:
    return {}

  log_probs, old, ref, advantages, mask = (torch.from_numpy(np.array(x)) for x in arrays)
  log_probs.requires_grad_()

  def loss(log_probs, old, ref, advantages, mask):
    ratio = torch.exp(log_probs - old)
    surrogate = torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    k3 = torch.exp(ref - log_probs) - (ref - log_probs) - 1
    per_token = 0.04 * k3 - surrogate
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

  def run(fn):
    (gradient,) = torch.autograd.grad(fn(log_probs, old, ref, advantages, mask), log_probs)
    return gradient.numpy()

  return {
    "torch, eager": functools.partial(run, loss),
    "torch, compiled": functools.partial(run, torch.compile(loss)),
  }
