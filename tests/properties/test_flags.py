"""Every strict flag of JAX holds, with NaN at masked positions too: as `make test-all` has it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpo_jax as gpo
from tests.support.batches import COVERING, PRESETS, Batch, batch

register = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])
register(Batch, data_fields=[field.name for field in dataclasses.fields(Batch)])
DATA = batch(prompts=2, length=3)
HIDDEN = np.random.default_rng(0).normal(size=(*DATA.mask.shape, 4)).astype(np.float32)
UNEMBEDDING = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
TOKENS = np.random.default_rng(2).integers(0, 6, DATA.mask.shape)
NAN = {k: np.where(DATA.mask, v, np.nan) for k, v in vars(DATA).items() if v.shape == TOKENS.shape}
DIRTY = dataclasses.replace(DATA, **(NAN | {"mask": DATA.mask}))
PATHS = ("plain", "hidden")
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


def cases(flags, quick):
  """All presets and paths under all flags, of which some are quick."""
  return [
    pytest.param(name, path, flag, marks=() if (name, path) in quick else pytest.mark.slow)
    for name in PRESETS
    for path in PATHS
    for flag in flags
  ]


def step(objective, data, path):
  """Prepares, evaluates, differentiates and summarizes."""
  rollout = data.prepare(objective)
  if path == "plain":
    argument, loss_fn = data.log_probs, lambda x: objective(x, rollout)
  else:
    tiling = gpo.Tiling(chunk_size=8, tile_size=4)
    argument = (jnp.where(data.mask[..., None], HIDDEN, data.log_probs[..., None]), UNEMBEDDING)
    loss_fn = lambda x: gpo.linear_loss(objective, *x, TOKENS, rollout, tiling=tiling)
  (loss, terms), gradient = jax.value_and_grad(loss_fn, has_aux=True)(argument)
  return loss, gradient, gpo.summarize(terms, rollout)


@functools.cache
def without_flags(name, path):
  return step(PRESETS[name], jax.device_put(DATA), path)


@pytest.mark.parametrize(
  ("name", "path", "flag"),
  cases(RUNNING, {("gspo", "hidden"), ("deepseek_v32", "plain"), ("deepseek_v32", "hidden")}),
)
def test_a_flag_of_running_holds(name, path, flag):
  """Not `debug_nans` with `disable_jit`: then JAX checks constants, and NaN is a constant here.

  Where an input is not finite, or an id is outside of its range, results are made NaN by
  `jnp.where(bad, jnp.nan, x)`. And a NaN must come on the device: `jnp.asarray` of NumPy's raises.
  """
  expected, dirty = without_flags(name, path), jax.device_put(DIRTY)
  with RUNNING[flag]():
    found = step(PRESETS[name], dirty, path)
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(same, found, expected)


@pytest.mark.parametrize(
  ("name", "path", "flag"), cases(TRACING, {(name, path) for name in COVERING for path in PATHS})
)
def test_a_flag_of_tracing_holds(name, path, flag):
  with TRACING[flag]():
    jax.eval_shape(lambda data: step(PRESETS[name], data, path), DIRTY)
