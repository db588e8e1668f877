"""Objectives in SkyRL's table of losses: the same as its own, and through its JAX backend.

SkyRL needs Python 3.12: `make test-all` makes an environment for it where there is one.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("skyrl", reason="pip install 'skyrl[jax]', Python 3.12 or newer")
from skyrl.tinker import loss_fns

import gpo_jax as gpo
from gpo_jax.integrations.skyrl import per_token_loss, register
from tests.support.batches import relative_error

LENGTH = 16


@pytest.fixture(autouse=True)
def as_skyrl_needs_it():
  """SkyRL promotes dtypes; its table is global."""
  before = list(loss_fns.LOSS_FUNCTIONS), dict(loss_fns.LOSS_FUNCTION_MAP)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
  loss_fns.LOSS_FUNCTIONS[:] = before[0]
  loss_fns.LOSS_FUNCTION_MAP.update(before[1])


def sequence():
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=LENGTH), jnp.float32)
  log_probs = draw() - 3
  mask = jnp.array([1.0] * 9 + [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
  return log_probs, mask, log_probs + 0.3 * draw(), draw()


CONFIG = loss_fns.LossFnConfig(jnp.float32(0.8), jnp.float32(1.2))
SAME = {
  "ppo": gpo.dapo(epsilon_low=0.2, epsilon_high=0.2),
  "importance_sampling": gpo.gpg().replace(surrogate=gpo.surrogates.importance_weighted),
  "cispo": gpo.cispo(low=0.8, high=1.2),
}


def gradient(loss_fn, log_probs, *rest):
  return jax.grad(lambda x: jnp.sum(loss_fn(x, *rest, CONFIG)))(log_probs)


@pytest.mark.parametrize("name", SAME)
def test_losses_and_gradients_are_skyrls_where_the_definition_is(name):
  data = sequence()
  ours, theirs = per_token_loss(SAME[name]), loss_fns.LOSS_FUNCTION_MAP[name]
  np.testing.assert_allclose(gradient(ours, *data), gradient(theirs, *data), rtol=1e-5, atol=1e-7)
  if name != "cispo":  # theirs is w·A·log π, ours w·A·log ρ: another value, the same gradient
    np.testing.assert_allclose(ours(*data, CONFIG), theirs(*data, CONFIG), rtol=1e-5, atol=1e-7)
  wider = per_token_loss(gpo.dapo(epsilon_low=0.01, epsilon_high=0.01))
  assert relative_error(gradient(wider, *data), gradient(theirs, *data)) > 1e-2


def test_masked_positions_may_hold_anything():
  log_probs, mask, sampled, advantages = sequence()
  dirty = [jnp.where(mask == 0, jnp.nan, x) for x in (log_probs, sampled, advantages)]
  loss_fn = per_token_loss(gpo.gspo())
  expected = gradient(loss_fn, log_probs, mask, sampled, advantages)
  found = gradient(loss_fn, dirty[0], mask, *dirty[1:])
  np.testing.assert_array_equal(found, expected)
  assert np.any(np.isnan(gradient(loss_fns.ppo_loss, dirty[0], mask, *dirty[1:])))  # theirs: NaN


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="name must be one of cross_entropy, .*got 'grpo'"):
    register("grpo", gpo.grpo(beta=None))
  with pytest.raises(ValueError, match=r"such as gpo.grpo\(\)"):
    register("ppo", gpo.grpo)
  register("ppo", gpo.grpo())
  with pytest.raises(ValueError, match="needs rollout.ref_log_probs"):
    loss_fns.LOSS_FUNCTION_MAP["ppo"](*sequence(), CONFIG)


# --- its backend ---------------------------------------------------------------------------------


def tiny_model(path):
  """Writes a Qwen3 of 2 layers and its tokenizer, as a hub has them."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  from tokenizers import Tokenizer, models

  torch.manual_seed(0)
  settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
  heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
  config = transformers.Qwen3Config(**settings, **heads, tie_word_embeddings=True)
  transformers.Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(path)
  words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
  words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
  words.save_pretrained(path)
  assert json.loads((path / "config.json").read_text())["model_type"] == "qwen3"
  return str(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries that SkyRL imports
def test_its_backend_trains_an_adapter(tmp_path):
  from skyrl.backends.jax import JaxBackend, JaxBackendConfig
  from skyrl.tinker import types

  objective = gpo.gspo(epsilon_low=0.2, epsilon_high=0.2)
  register("ppo", objective)  # before the backend starts
  settings = {"max_lora_adapters": 2, "max_lora_rank": 4}
  backend = JaxBackend(tiny_model(tmp_path), JaxBackendConfig(**settings))
  backend.create_model("policy", types.LoraConfig(rank=4, alpha=8, seed=0))
  index = backend.models["policy"].adapter_index
  rng = np.random.default_rng(0)
  sequences = [rng.integers(2, 64, 9).tolist() for _ in range(4)]
  advantages = [1.0, -1.0, 0.5, -0.5]

  def batch(sampled):
    return types.PreparedModelPassBatch(
      all_model_inputs=[
        types.ModelInput(chunks=[types.EncodedTextChunk(tokens=tokens[:-1])])
        for tokens in sequences
      ],
      all_targets=[tokens[1:] for tokens in sequences],
      all_token_weights=[[0.0] * 3 + [1.0] * 5 for _ in sequences],
      all_sampling_logprobs=sampled,
      all_advantages=[[advantage] * 8 for advantage in advantages],
      all_model_ids=["policy"] * 4,
      all_loss_fns=["ppo"] * 4,
      all_loss_fn_configs=[None] * 4,
      all_values=[[] for _ in sequences],
      all_returns=[[] for _ in sequences],
      request_batch_slices=[("0", "policy", 0, 4)],
    )

  def passed(sampled):
    outputs = backend.forward_backward(batch(sampled))["0"].loss_fn_outputs
    pick = lambda name: [np.array(output[name]["data"]) for output in outputs]
    return pick("elementwise_loss"), pick("logprobs")

  zeros = [[0.0] * 8 for _ in sequences]
  _, log_probs = passed(zeros)
  sampled = [(x + 0.3 * rng.normal(size=8)).tolist() for x in log_probs]
  losses, log_probs = passed(sampled)
  mask = np.array([0.0] * 3 + [1.0] * 5, np.float32)
  expected = [
    per_token_loss(objective)(jnp.asarray(x, jnp.float32), mask, jnp.asarray(s, jnp.float32),
                              jnp.full(8, a))
    for x, s, a in zip(log_probs, sampled, advantages)
  ]  # fmt: skip
  np.testing.assert_allclose(np.array(losses), np.array(expected), rtol=1e-4, atol=1e-5)
  adam = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
  backend.optim_step("policy", types.OptimStepInput(adam_params=adam))
  after, _ = passed(sampled)
  assert np.sum(after) < np.sum(losses) - 1e-3
  assert index == 1
