"""The objective as a policy loss of Tunix: beside Tunix's own, and through its learner.

Where definitions are the same, values are. They are not the same for Tunix's default KL, `kl`,
whose gradient is not that of a KL (k1 against k3); for equal rewards, where Tunix's advantages are
rounding errors over 1e-6; for packed rows, which Tunix 0.1.7 averages as one response each; and for
Dr. GRPO's constant, which is the padded width there.
"""

import dataclasses
import re
import types
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tunix")
with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # of libraries that Tunix imports
  from flax import nnx
  from tunix.rl import common, function_registry, rl_cluster
  from tunix.rl import utils as rl_utils
  from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
  from tunix.rl.rollout.base_rollout import RolloutConfig
  from tunix.sft import utils as sft_utils
  from tunix.tests import test_common

import gpo_jax as gpo
from gpo_jax.integrations.tunix import adapter, register
from tests.support.batches import grpo_with, relative_error

SIZE = test_common.MockVocab().GetPieceSize()
ROWS, PROMPT, LENGTH = 8, 4, 6
PACKING = {"sequences_per_update": ROWS - 1} if hasattr(sft_utils, "LossOutput") else {}
TUNIX_GRPO = {"kl_loss_mode": "low_var_kl", "num_generations": 4}


@pytest.fixture(autouse=True)
def as_tunix_needs_it():
  """Tunix promotes dtypes and ranks, in threads of its own too; its registry is global."""
  registered = function_registry.default_registry._registry
  before = {kind: dict(functions) for kind, functions in registered.items()}
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  jax.config.update("jax_numpy_rank_promotion", "allow")
  jax.config.update("jax_disable_most_optimizations", True)  # quicker to compile
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_numpy_rank_promotion", "raise")
  registered.update(before)


class Policy(nnx.Module):
  """Predicts the next token from this one: the same when sampling, training and packed."""

  def __init__(self, seed):
    rngs = nnx.Rngs(seed)
    self.config = test_common.ModelConfig(num_layers=1, num_kv_heads=1, head_dim=1)
    self.embedding = nnx.Embed(SIZE, 16, rngs=rngs)
    self.hidden = nnx.Linear(16, 32, rngs=rngs)
    self.head = nnx.Linear(32, SIZE, rngs=rngs)

  def __call__(self, x, positions, cache=None, attention_mask=None, skip_lm_head=False):
    hidden = nnx.tanh(self.hidden(3 * self.embedding(x)))
    return hidden if skip_lm_head else self.compute_final_logits(hidden), cache

  def compute_final_logits(self, hidden):
    return 2 * self.head(hidden)

  def init_cache(self, batch_size, cache_size, dtype):
    return {"layer_0": {"end_index": jnp.zeros(batch_size, jnp.int32)}}

  @property
  def num_embed(self):
    return SIZE


def head(model):
  return gpo.Head(2 * model.head.kernel[...].T, bias=2 * model.head.bias[...])


def parameters(model):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def log_probs_of(model, prompts, completions):
  return common.compute_per_token_logps(
    *nnx.split(model), prompts, completions, pad_id=0, eos_id=2, temperature=0.7
  )


@pytest.fixture(scope="module")
def example():
  """A batch off-policy, ragged, with an empty row and sampler weights."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  lengths = np.array([0, 1, 2, 3, 4, 5, 6, 6])
  mask = np.arange(LENGTH) < lengths[:, None]
  prompts = jnp.asarray(rng.integers(3, SIZE, (ROWS, PROMPT)), jnp.int32)
  completions = jnp.asarray(np.where(mask, rng.integers(3, SIZE, mask.shape), 0), jnp.int32)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    log_probs = log_probs_of(Policy(0), prompts, completions)
  return common.TrainExample(
    prompt_ids=prompts,
    prompt_mask=jnp.ones_like(prompts, bool),
    completion_ids=completions,
    completion_mask=jnp.asarray(mask),
    advantages=draw(ROWS),
    ref_per_token_logps=log_probs + 0.3 * draw(*mask.shape),
    old_per_token_logps=log_probs + 0.3 * draw(*mask.shape),
    sampler_is_weights=jnp.exp(0.3 * draw(*mask.shape)),
  )


def reduced(output):
  """Loss and metrics, of what a loss returns up to Tunix 0.1.7 and after it."""
  if isinstance(output, tuple):
    return output
  scalar = lambda x: x.compute() if hasattr(x, "compute") else x
  return scalar(output.primary_loss), {k: scalar(x) for k, x in output.aux_metrics.items()}


def loss_of(name, chunk_size=0, **config):
  settings = types.SimpleNamespace(**(vars_of(GRPOConfig(**TUNIX_GRPO)) | config))
  settings.temperature = 0.7
  loss_fn = function_registry.get_policy_loss_fn(name)
  chunks = {"compute_logps_chunk_size": chunk_size}
  return lambda model, x: reduced(loss_fn(model, x, settings, 0, 2, **chunks))


def evaluate(name, example, **config):
  """Loss, metrics and gradient of a registered loss, as Tunix's trainer takes them."""
  run = nnx.jit(nnx.value_and_grad(loss_of(name, **config), has_aux=True))
  (loss, metrics), gradient = run(Policy(0), example)
  flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.to_pure_dict(gradient))])
  return float(loss), jax.tree.map(float, metrics), flat


def vars_of(config):
  return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


SAME = {
  "grpo": (gpo.grpo(), {}),
  "token_mean": (grpo_with(gpo.weightings.token_mean), {"loss_agg_mode": "token-mean"}),
  "sequence_sum": (grpo_with(gpo.weightings.sequence_sum), {"loss_agg_mode": "seq-mean-token-sum"}),
  "dr_grpo": (
    gpo.dr_grpo(length=LENGTH),
    {"loss_agg_mode": "sequence-mean-token-scale", "beta": 0.0},
  ),
  "dapo": (gpo.dapo(), {"loss_agg_mode": "token-mean", "beta": 0.0, "epsilon_high": 0.28}),
  "gspo_token": (
    gpo.gspo_token(epsilon_low=0.02, epsilon_high=0.02),
    {"loss_algo": "gspo-token", "epsilon": 0.02, "beta": 0.0},
  ),
  "k1": (gpo.grpo().replace(divergence=gpo.divergences.k1), {"kl_loss_mode": "kl"}),
  "dual_clip": (
    gpo.grpo().replace(surrogate=partial(gpo.surrogates.dual_clip, bound=1.3)),
    {"epsilon_c": 1.3},
  ),
}
# The reduced loss, after 0.1.7, counts empty rows, which the loss itself does not.
OF_THEIR_OWN = {"pg_clipfrac_lower", "pg_loss/clipped_mean", "reduced_pg_loss"}


@pytest.mark.parametrize(
  ("case", "on_policy"),
  [*((case, False) for case in SAME), ("grpo", True), ("gspo_token", True)],
)
def test_loss_gradient_and_metrics_are_tunixs(example, case, on_policy):
  if on_policy:
    example = example.replace(old_per_token_logps=None, sampler_is_weights=None)
  objective, config = SAME[case]
  register("ours", objective)
  loss, metrics, gradient = evaluate("ours", example, **config)
  expected_loss, expected, expected_gradient = evaluate("grpo", example, **config)
  assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
  assert relative_error(gradient, expected_gradient) < 1e-5
  differing = set() if config.get("loss_agg_mode") == "token-mean" else {"entropy"}
  differing |= {"kl", "kl_loss"} if objective.divergence is None else set()
  differing |= {"pg_clipfrac"} if case == "dual_clip" else set()
  for name in set(expected) - OF_THEIR_OWN - differing:
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
  assert not set(expected) - set(metrics) - {"pg_clipfrac_lower"}
  assert "loss" not in metrics  # which Tunix logs itself: each step would be logged twice
  assert metrics["pg_clipfrac"] > 0 or on_policy  # else a clip could be missing


def test_another_beta_or_kl_is_seen(example):
  register("beta", gpo.grpo(beta=0.05))
  register("k1", gpo.grpo().replace(divergence=gpo.divergences.k1))
  _, _, expected = evaluate("grpo", example)
  for name in ("beta", "k1"):
    assert relative_error(evaluate(name, example)[2], expected) > 1e-3, name


def test_advantages_are_tunixs_with_its_eps():
  standardize = partial(gpo.advantages.standardize, eps=1e-6)
  register("ours", gpo.grpo().replace(advantage=standardize))
  register("leave_one_out", gpo.rloo())
  register("center", gpo.dr_grpo(length=8))
  rewards = np.random.default_rng(0).normal(size=12)
  for name, theirs in (("ours", "grpo"), ("leave_one_out", "rloo"), ("center", "drgrpo")):
    ours, theirs = map(function_registry.get_advantage_estimator, (name, theirs))
    arguments = {"rewards": rewards, "num_generations": 4}
    np.testing.assert_allclose(ours(**arguments), theirs(**arguments), rtol=1e-5, atol=1e-6)
  equal = {"rewards": np.full(7, 0.7, np.float32), "num_generations": 7}
  ours, theirs = map(function_registry.get_advantage_estimator, ("ours", "grpo"))
  assert not np.any(ours(**equal))
  assert np.max(np.abs(theirs(**equal))) > 0.05  # rounding of the mean, divided by 1e-6


def test_packed_rows_count_each_response(example):
  example = jax.tree.map(lambda x: x[1:], example).replace(sampler_is_weights=None)
  (packed,), *rest = rl_utils.pack_sequences(iter([[example]]), 64, **PACKING)
  assert not rest
  assert packed.segment_ids.shape == (1, 64)
  register("ours", gpo.grpo())
  loss, _, gradient = evaluate("ours", example)
  packed_loss, _, packed_gradient = evaluate("ours", packed)
  assert packed_loss == pytest.approx(loss, rel=1e-5)
  assert relative_error(packed_gradient, gradient) < 1e-5
  error = relative_error(evaluate("grpo", packed)[2], gradient)
  if hasattr(sft_utils, "LossOutput"):
    assert error < 1e-5
  else:  # up to 0.1.7 Tunix takes one mean over the row
    assert error > 0.1


@pytest.mark.parametrize(
  "weighting",
  [
    gpo.weightings.token_mean,
    gpo.weightings.sequence_mean,
    gpo.weightings.sequence_sum,
    partial(gpo.weightings.constant_length, length=8),
    gpo.weightings.token_sum,
  ],
)
def test_sums_and_denominators_of_microbatches_add_up(example, weighting, monkeypatch):
  # A stand-in with the fields of later versions; the newest release is without them.
  Metric = dataclasses.make_dataclass("WeightedMetric", ["unreduced_sum", "denominator"])
  Output = dataclasses.make_dataclass("LossOutput", ["primary_loss", "aux_metrics"])
  whole = grpo_with(weighting)
  register("pair", whole)
  expected, *_ = evaluate("pair", example)
  for kind in (Metric, Output):
    monkeypatch.setattr(sft_utils, kind.__name__, kind, raising=False)
  register("ours", whole)
  loss_fn = function_registry.get_policy_loss_fn("ours")
  settings = types.SimpleNamespace(temperature=0.7)
  pieces = [jax.tree.map(lambda x: x[cut], example) for cut in (slice(0, 3), slice(3, 8))]

  @nnx.jit
  def sum_and_denominator(model, piece):
    loss = loss_fn(model, piece, settings, 0, 2).primary_loss
    return jnp.stack([loss.unreduced_sum, loss.denominator])

  losses = np.array([sum_and_denominator(Policy(0), piece) for piece in pieces])
  total, denominator = np.sum(losses, axis=0)
  if weighting is gpo.weightings.token_sum:  # a sum has no denominator: averaged
    assert denominator == len(pieces)
    assert total == pytest.approx(expected, rel=1e-5)
    return
  assert total / denominator == pytest.approx(expected, rel=1e-5)
  mean = np.mean(losses[:, 0] / losses[:, 1])
  assert mean != pytest.approx(expected, rel=1e-3)


def largest_logits(name, example, **config):
  """The elements of the largest array with a vocabulary, in a program of loss and gradient."""
  graphdef, state = nnx.split(Policy(0))
  loss_fn = loss_of(name, **config)
  program = jax.make_jaxpr(jax.grad(lambda s: loss_fn(nnx.merge(graphdef, s), example)[0]))(state)
  shapes = re.findall(r"\w\d+\[([\d,]+)\]", str(program))
  shapes = [[int(size) for size in shape.split(",")] for shape in shapes]
  return max(np.prod(shape) for shape in shapes if SIZE in shape)


@pytest.mark.parametrize(("name", "packed"), [("grpo", True), ("gspo", False)])  # one pass, two
def test_a_head_gives_the_same_without_logits_of_all_tokens(example, packed, name):
  if packed:
    example = jax.tree.map(lambda x: x[1:], example).replace(sampler_is_weights=None)
    (example,), *_ = rl_utils.pack_sequences(iter([[example]]), 64, **PACKING)
  objective = getattr(gpo, name)()
  register("plain", objective)
  register("linear", objective, head=head)
  loss, metrics, gradient = evaluate("plain", example)
  linear_loss, linear_metrics, linear_gradient = evaluate("linear", example, chunk_size=2)
  assert linear_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
  assert relative_error(linear_gradient, gradient) < 1e-5
  assert linear_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
  logits = example.completion_ids.size * SIZE
  assert largest_logits("plain", example) >= logits
  assert largest_logits("linear", example, chunk_size=2) < logits


def test_a_head_on_the_actors_mesh_gives_the_same(example):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  P = jax.sharding.PartitionSpec
  sharding = gpo.Sharding(mesh, tokens=P("data"), unembedding=P(None, ("data", "model")))
  register("one", gpo.grpo(), head=head)
  register("mesh", gpo.grpo(), head=head, sharding=sharding)
  expected = evaluate("one", example)
  found = evaluate("mesh", example)
  assert found[0] == pytest.approx(expected[0], rel=1e-5)
  assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)
  assert relative_error(found[2], expected[2]) < 1e-5
  graphdef, state = nnx.split(Policy(0))
  program = lambda name: str(
    jax.make_jaxpr(lambda s: loss_of(name)(nnx.merge(graphdef, s), example)[0])(state)
  )
  assert "shard_map" in program("mesh")
  assert "shard_map" not in program("one")


@pytest.mark.skipif(not hasattr(sft_utils, "LossOutput"), reason="Tunix has no chunks up to 0.1.7")
def test_the_chunk_size_of_tunix_bounds_the_logits(example):
  register("ours", gpo.grpo())
  expected = evaluate("ours", example)
  found = evaluate("ours", example, chunk_size=2)
  assert found[0] == pytest.approx(expected[0], rel=1e-5)
  assert relative_error(found[2], expected[2]) < 1e-5
  logits = example.completion_ids.size * SIZE
  assert largest_logits("ours", example) >= logits
  assert largest_logits("ours", example, chunk_size=2) < logits


def test_a_model_without_hidden_states_says_so(example):
  class Opaque(Policy):
    def __call__(self, x, positions, cache=None, attention_mask=None):
      return super().__call__(x, positions)

  register("linear", gpo.grpo(), head=head)
  with pytest.raises(ValueError, match="skip_lm_head=True; Opaque does not take it"):
    loss_of("linear")(Opaque(0), example)


def test_a_name_is_replaced_where_that_is_asked_for(example):
  register("ours", gpo.cispo())
  _, _, expected = evaluate("ours", example)
  _, _, theirs = evaluate("grpo", example)
  register("grpo", gpo.cispo(), overwrite=True)
  _, _, gradient = evaluate("grpo", example)
  assert relative_error(gradient, expected) == 0
  assert relative_error(gradient, theirs) > 1e-2


# --- several rewards -----------------------------------------------------------------------------

REWARDS = {
  "correct": np.array([1, 0, 0, 1, 0, 0, 1, 0.0]), "long": np.array([5, 90, 30, 7, 1, 2, 3, 4.0])
}  # fmt: skip


def reward_functions():
  def function(name):
    def reward(prompts, completions, **_):
      return list(REWARDS[name])

    reward.__name__ = name
    return reward

  return [function(name) for name in REWARDS]


def rewards_of(manager):
  made = function_registry.get_reward_manager(manager)(
    reward_fns=reward_functions(), algo_config=GRPOConfig(**TUNIX_GRPO)
  )
  return made(prompts=[""] * 8, completions=[""] * 8)


def test_separate_rewards_reach_an_advantage_of_several():
  decoupled = partial(gpo.advantages.decoupled, weights=jnp.array([1.0, 0.5]))
  register("ours", gpo.grpo().replace(advantage=decoupled))
  info = rewards_of("ours")
  np.testing.assert_array_equal(info["rewards"], np.stack(list(REWARDS.values()), 1))
  estimate = function_registry.get_advantage_estimator("ours")
  advantages = estimate(rewards=info["rewards"], num_generations=4)
  groups = np.stack(list(REWARDS.values())).reshape(2, 2, 4)
  np.testing.assert_allclose(advantages, decoupled(groups).reshape(-1), rtol=1e-6)
  summed = gpo.advantages.standardize(groups.sum(0)).reshape(-1)
  assert relative_error(advantages, summed) > 0.1
  theirs = rewards_of("sequence-level")
  assert theirs["rewards"].shape == (8,)
  assert {"rewards/correct", "rewards/long"} < set(info["log_metrics"])
  for name, (values, _) in theirs["log_metrics"].items():
    np.testing.assert_array_equal(info["log_metrics"][name][0], values)


def test_one_reward_where_several_are_needed_and_the_reverse_are_errors():
  register("several", gpo.grpo().replace(advantage=gpo.advantages.decoupled))
  register("one", gpo.grpo())
  several, one = map(function_registry.get_advantage_estimator, ("several", "one"))
  with pytest.raises(ValueError, match=r"Tunix has added them up: set GRPOConfig\(reward_manager"):
    several(rewards=np.ones(8), num_generations=4)
  with pytest.raises(ValueError, match=r"standardize takes one reward per response; got \[8, 2\]"):
    one(rewards=np.ones((8, 2)), num_generations=4)
  own = lambda rewards, where: rewards - jnp.mean(rewards, axis=-1, keepdims=True)
  register("own", gpo.grpo().replace(advantage=own))
  with pytest.raises(ValueError, match=r"advantage must return \[2, 4\], .*\[2, 2, 4\]"):
    function_registry.get_advantage_estimator("own")(rewards=np.ones((8, 2)), num_generations=4)


# --- the orchestrator ----------------------------------------------------------------------------


def test_the_orchestrators_adapter():
  module = pytest.importorskip("tunix.experimental.orchestrator.algorithm_adapter")
  made = adapter(gpo.rloo(), group_size=4, mini_batch_size=2)
  assert isinstance(made, module.AlgorithmAdapter)
  assert made.mini_batch_size == 2
  assert not made.requires_reference_kl
  assert adapter(gpo.grpo()).requires_reference_kl
  rewards = [1.0, 0.0, 0.0, 0.0]
  np.testing.assert_allclose(
    made.compute_advantages(rewards), gpo.advantages.leave_one_out(np.array(rewards)), rtol=1e-6
  )
  register("ours", gpo.rloo())
  assert made.loss_fn().__qualname__ == function_registry.get_policy_loss_fn("ours").__qualname__


def test_mistakes_are_named(example):
  register("ours", gpo.grpo())
  with pytest.raises(ValueError, match="policy_loss_fn named 'ours' already"):
    register("ours", gpo.dapo())
  with pytest.raises(ValueError, match="named 'grpo' already"):
    register("grpo", gpo.grpo())
  with pytest.raises(ValueError, match="advantage_estimator named 'rloo' already"):
    register("rloo", gpo.rloo())
  with pytest.raises(ValueError, match=r"such as gpo.grpo\(\)"):
    register("function", gpo.grpo)
  with pytest.raises(ValueError, match=r"GRPOConfig\(beta="):
    evaluate("ours", example.replace(ref_per_token_logps=None))


# What Tunix calls is deprecated in three places, elsewhere in each new version of JAX and optax.
deprecated = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


def train(name, *, advantage_estimator="grpo", beta=0.04, micro=None, packed=None, **config):
  """Three steps of Tunix's own learner, which samples, scores, and updates a tiny policy."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  role = rl_cluster.Role
  cluster = rl_cluster.RLCluster(
    actor=Policy(0),
    reference=Policy(1),
    tokenizer=test_common.MockVocab(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
      rollout_engine="vanilla",
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.sgd(1.0),
        eval_every_n_steps=100,
        max_steps=3,
        mini_batch_size=4 if micro else None,
        train_micro_batch_size=micro,
        max_seq_token_per_tpu=packed,
      ),
      rollout_config=RolloutConfig(
        max_tokens_to_generate=8, max_prompt_length=8, kv_cache_size=32, temperature=1.0
      ),
    ),
  )
  settings = GRPOConfig(
    policy_loss_fn=name,
    advantage_estimator=advantage_estimator,
    beta=beta,
    **(TUNIX_GRPO | config),
  )
  reward = lambda completions, **_: [text.count("is") + 0.1 * len(text) for text in completions]
  learner = GRPOLearner(rl_cluster=cluster, algo_config=settings, reward_fns=reward)
  prompts = np.array(["input string", "hello world", "My name", "hello there"])
  learner.train([{"prompts": prompts} for _ in range(4)])
  history = cluster.actor_trainer.metrics_logger.get_metric_history
  logged = {key: np.array(history("actor", key, "train")) for key in ("loss", "kl", "pg_clipfrac")}
  return logged, parameters(cluster.actor_trainer.model)


@pytest.mark.slow
@deprecated
@pytest.mark.parametrize("run", [{}, {"micro": 2}, {"num_iterations": 2}, {"packed": 256}], ids=str)
def test_the_learner_trains_the_same_policy(run):
  objective = gpo.grpo()
  if "packed" in run:  # a response's mean is another there
    objective = objective.replace(weighting=gpo.weightings.token_mean)
    run |= {"loss_agg_mode": "token-mean"}
  register("ours", objective)
  expected, expected_policy = train("grpo", **run)
  logged, policy = train("ours", **run)
  for name in logged:
    np.testing.assert_allclose(logged[name], expected[name], rtol=1e-5, atol=1e-6)
  moved = jax.tree.map(np.subtract, expected_policy, parameters(Policy(0)))
  error = jax.tree.map(np.subtract, policy, expected_policy)
  for change, difference in zip(jax.tree.leaves(moved), jax.tree.leaves(error)):
    assert np.max(np.abs(difference)) < 1e-5 * np.max(np.abs(change))


@pytest.mark.slow
@deprecated
@pytest.mark.parametrize("name", ["dapo", "deepseek_v32", "gspo", "cispo"])
def test_the_learner_trains_by_objectives_that_tunix_lacks(name):
  objective = getattr(gpo, name)()
  register("ours", objective)
  beta = 0.0 if objective.divergence is None else 0.04
  logged, policy = train("ours", advantage_estimator="ours", beta=beta, num_iterations=2)
  assert all(len(values) and np.all(np.isfinite(values)) for values in logged.values())
  assert np.any(logged["kl"]) == (objective.divergence is not None)
  moved = jax.tree.map(np.subtract, policy, parameters(Policy(0)))
  assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(moved))


@pytest.mark.slow
@deprecated
def test_the_learner_without_a_reference_policy_says_so():
  register("ours", gpo.grpo())
  with pytest.raises(ValueError, match=r"GRPOConfig\(beta="):
    train("ours", beta=0.0)
