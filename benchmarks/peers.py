"""The same work by other packages, in an interpreter of their own that has some of them, on CPU.

Each contestant is built from a size and is a function of no argument: loss and gradients once.
"""

import functools
import time
import types
from unittest import mock

import numpy as np

from benchmarks import data

PADDING = 0.3


def torch_batch(size, level=-1.5):
  """Gives what a loss takes after log-probabilities; and those, in case."""
  import torch

  batch = data.batch(size, PADDING, level)
  arrays = batch.old, batch.ref, batch.advantages[:, None], batch.mask.astype(np.float32)
  return torch.from_numpy(batch.log_probs), tuple(map(torch.from_numpy, arrays))


def torch_grpo(log_probs, old, ref, advantages, mask):
  """The formula as TRL writes it."""
  import torch

  ratio = torch.exp(log_probs - old)
  surrogate = torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
  k3 = torch.exp(ref - log_probs) - (ref - log_probs) - 1
  per_token = 0.04 * k3 - surrogate
  return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def torch_step(function, inputs, compile=False):
  """Gives the function that computes gradients with respect to inputs."""
  import torch

  function = torch.compile(function) if compile else function
  inputs = [x.requires_grad_() for x in inputs]
  return lambda: torch.autograd.grad(function(*inputs), inputs)


def torch_loss(size, compile):
  log_probs, rest = torch_batch(size)
  return torch_step(lambda x: torch_grpo(x, *rest), [log_probs], compile)


def torch_selected(logits, tokens):
  import torch

  return logits.gather(-1, tokens[..., None])[..., 0] - torch.logsumexp(logits, -1)


def torch_cross_entropy(logits, tokens):
  import torch

  return -torch.nn.functional.cross_entropy(
    logits.flatten(0, 1), tokens.flatten(), reduction="none"
  )


def trl_selected(logits, tokens):
  from trl.trainer.utils import selective_log_softmax

  return selective_log_softmax(logits, tokens)


def torch_logits(size, log_probs, compile):
  import torch

  tokens = torch.from_numpy(data.tokens(size)).long()
  logits = torch.from_numpy(data.logits(size))
  return torch_step(lambda x: log_probs(x, tokens).sum(), [logits], compile)


def torch_head(size):
  """Gives hidden states and unembedding, tokens, and what a loss takes."""
  import torch

  tokens = torch.from_numpy(data.tokens(size)).long()
  _, rest = torch_batch(size, -np.log(size["vocabulary"]) - 0.5)
  return list(map(torch.from_numpy, data.head(size))), tokens, rest


def torch_linear(size, log_probs, compile):
  inputs, tokens, rest = torch_head(size)
  loss = lambda h, w: torch_grpo(log_probs(h @ w.T, tokens), *rest)  # noqa: E731
  return torch_step(loss, inputs, compile)


def liger_linear(size):
  from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

  inputs, tokens, (old, ref, advantages, mask) = torch_head(size)
  fused = LigerFusedLinearGRPOLoss(beta=0.04, loss_type="grpo")
  batch = {"ref_per_token_logps": ref, "old_per_token_logps": old}
  return torch_step(lambda h, w: fused(h, w, tokens, mask, advantages[:, 0], **batch)[0], inputs)


def tunix_objective(size, level=-1.5):
  """Gives the loss of a model, with its metrics, and log-probabilities."""
  from tunix.rl import algo_core

  batch = data.batch(size, PADDING, level)
  example = types.SimpleNamespace(
    prompt_ids=np.zeros((size["rows"], 1), np.int32),
    completion_ids=data.tokens({"vocabulary": 2, **size}),
    completion_mask=batch.mask.astype(np.int32),
    advantages=batch.advantages,
    old_per_token_logps=batch.old,
    ref_per_token_logps=batch.ref,
  )
  config = types.SimpleNamespace(
    beta=0.04, epsilon=0.2, temperature=1.0, loss_algo="grpo",
    loss_agg_mode="sequence-mean-token-mean", kl_loss_mode="low_var_kl", kl_clamp_value=None,
  )  # fmt: skip
  return lambda model: algo_core.grpo_loss_fn(model, example, config, -1, -1), batch.log_probs


def tunix_step(loss, arguments, metrics):
  import jax

  wanted = loss if metrics else lambda *inputs: loss(*inputs)[0]
  numbers = tuple(range(len(arguments)))
  step = jax.jit(jax.value_and_grad(wanted, argnums=numbers, has_aux=metrics))
  arguments = jax.device_put(arguments)
  return lambda: jax.block_until_ready(step(*arguments))


def tunix_loss(size, metrics):
  from flax import nnx
  from tunix.rl import common

  objective, log_probs = tunix_objective(size)

  def loss(log_probs):
    outputs = log_probs, log_probs[..., None]
    with mock.patch.object(common, "compute_per_token_logps", return_value=outputs):
      return objective(nnx.Module())

  return tunix_step(loss, (log_probs,), metrics)


def tunix_logits(size):
  from tunix.rl import common

  tokens = data.tokens(size)
  loss = lambda logits: (common.selective_log_softmax(logits, tokens).sum(), None)  # noqa: E731
  return tunix_step(loss, (data.logits(size),), False)


def tunix_linear(size, metrics):
  from flax import nnx

  class Model(nnx.Module):
    def __init__(self, hidden, unembedding):
      self.hidden, self.unembedding = nnx.Param(hidden), nnx.Param(unembedding)

    def __call__(self, tokens, **_):
      return self.hidden[...] @ self.unembedding[...].T, None

  objective, _ = tunix_objective(size, -np.log(size["vocabulary"]) - 0.5)
  # One position more, which predicts what follows the last token: a model has it, too.
  hidden, unembedding = data.head({**size, "tokens": size["tokens"] + 1})
  return tunix_step(lambda h, w: objective(Model(h, w)), (hidden, unembedding), metrics)


def of(function, *arguments):
  return lambda size: function(size, *arguments)


PEERS = {
  "A": {
    "torch, eager": of(torch_loss, False),
    "torch, compiled": of(torch_loss, True),
    "Tunix": of(tunix_loss, False),
    "Tunix with metrics": of(tunix_loss, True),
  },
  "B": {
    "torch gather − logsumexp, compiled": of(torch_logits, torch_selected, True),
    "torch cross-entropy, eager": of(torch_logits, torch_cross_entropy, False),
    "torch cross-entropy, compiled": of(torch_logits, torch_cross_entropy, True),
    "TRL selective_log_softmax": of(torch_logits, trl_selected, False),
    "Tunix selective_log_softmax": tunix_logits,
  },
  "C": {
    "torch full logits, grpo, compiled": of(torch_linear, torch_selected, True),
    "TRL selective_log_softmax, grpo": of(torch_linear, trl_selected, False),
    "Liger fused linear, grpo": liger_linear,
    "Tunix full logits, grpo": of(tunix_linear, False),
    "Tunix full logits, grpo, with metrics": of(tunix_linear, True),
  },
}


def clock(run) -> float:
  """Runs and gives the seconds."""
  before = time.perf_counter()
  run()
  return time.perf_counter() - before


def clocks(workload: str, size: data.Size, only: str) -> tuple[dict, dict[str, str]]:
  """Gives clocks of what runs here, each run once before, and why the others do not."""
  found, skipped = {}, {}
  for name, build in PEERS[workload].items():
    if only not in ("", name):
      continue
    try:
      run = build(size)
      run()
    except Exception as error:
      skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
    else:
      found[name] = functools.partial(clock, run)
  return found, skipped
