"""Every strict flag of JAX holds, with NaN at masked positions too: as `make test-all` has it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support.batches import PRESETS, Batch, batch
from tests.support.quick import jit

register = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])
register(Batch, data_fields=[field.name for field in dataclasses.fields(Batch)])
DATA = batch(prompts=2, length=3)
HIDDEN = np.random.default_rng(0).normal(size=(*DATA.mask.shape, 4)).astype(np.float32)
UNEMBEDDING = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
TOKENS = np.random.default_rng(2).integers(0, 6, DATA.mask.shape)
NAN = {k: np.where(DATA.mask, v, np.nan) for k, v in vars(DATA).items() if v.shape == TOKENS.shape}
DIRTY = dataclasses.replace(DATA, **(NAN | {"mask": DATA.mask}))
GOOD, BAD = (DATA, HIDDEN), (DIRTY, np.where(DATA.mask[..., None], HIDDEN, np.nan))
RUNNING = {
  "debug_nans": lambda: jax.debug_nans(True),
  "debug_infs": lambda: jax.debug_infs(True),
  "disable_jit": jax.disable_jit,
}
TRACING = {
  "check_tracer_leaks": jax.checking_leaks,
  "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
  "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


def cases(flags):
  """All presets and paths under all flags."""
  return [(name, path, flag) for name in PRESETS for path in ("plain", "hidden") for flag in flags]


def step(objective, data, path):
  """Prepares, evaluates, differentiates and summarizes."""
  data, hidden = data
  others = {name: getattr(data, name) for name in ("ref_log_probs", "sampler_log_probs")}
  rollout = objective.prepare(data.rewards, data.mask, data.old_log_probs, **others)
  if path == "plain":
    argument, loss_fn = data.log_probs, lambda x: objective(x, rollout)
  else:
    tiling = gpo.Tiling(chunk_size=8, tile_size=4)
    argument = (hidden, UNEMBEDDING)
    loss_fn = lambda x: gpo.linear_loss(objective, *x, TOKENS, rollout, tiling=tiling)
  (loss, terms), gradient = jax.value_and_grad(loss_fn, has_aux=True)(argument)
  return loss, gradient, gpo.summarize(terms, rollout)


@functools.cache
def without_flags(name, path):
  return step(PRESETS[name], jax.device_put(GOOD), path)


@pytest.mark.quick("deepseek_v32-plain-debug_infs", "deepseek_v32-hidden-debug_nans")
@pytest.mark.parametrize(("name", "path", "flag"), cases(RUNNING))
def test_a_flag_of_running_holds(name, path, flag):
  """Operation by operation, and compiled with NaN at every masked position.

  What does not hold, because JAX then checks every single operation: `debug_nans` on masked NaNs
  outside of `jax.jit`, where the gradient's first operation on the argument raises (it converts,
  nothing is masked yet); and `debug_nans` with `disable_jit`, for which a NaN is an error also as
  the constant of `jnp.where(bad, jnp.nan, x)`, by which bad input is made loud.
  """
  expected, good, bad = without_flags(name, path), *jax.device_put((GOOD, BAD))
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  with RUNNING[flag]():
    jax.tree.map(same, step(PRESETS[name], good, path), expected)
    compiled = jit(lambda data: step(PRESETS[name], data, path))
    jax.tree.map(same, compiled(bad), expected)


@pytest.mark.quick(
  "deepseek_v32-hidden-dtype_promotion",
  "deepseek_v32-hidden-rank_promotion",
  "deepseek_v32-plain-dtype_promotion",
  "deepseek_v32-plain-rank_promotion",
  "gspo-hidden-rank_promotion",
  "gspo-hidden-dtype_promotion",
)
@pytest.mark.parametrize(("name", "path", "flag"), cases(TRACING))
def test_a_flag_of_tracing_holds(name, path, flag):
  with TRACING[flag]():
    jax.eval_shape(lambda data: step(PRESETS[name], data, path), BAD)
