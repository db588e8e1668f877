"""EasyDeL's GRPO trainer, which has no hook for a loss, with an objective's loss and advantages.

pip install easydel pillow torch, in an environment of its own. A tiny Llama learns to say "w1".

EasyDeL subtracts a group's mean from its rewards before they get here, so the advantage must be one
that this does not change: `standardize`, `center` or `leave_one_out`. There are no old
log-probabilities: one update per batch, and a ratio of 1.
"""

import functools
import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

import easydel
import jax
import jax.numpy as jnp
from datasets import Dataset
from easydel.trainers.group_relative_policy_optimization import _fn, grpo_trainer
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import gpo_jax as gpo

objective = gpo.grpo(beta=0.001)


class Trainer(easydel.GRPOTrainer):
  """Replaces the step, and what is left of the advantages."""

  def configure_functions(self):
    """Compiles the step below in place of EasyDeL's."""
    functions = super().configure_functions()
    everywhere = jax.NamedSharding(self.model.mesh, jax.P())
    given = (self.state_shardings, everywhere)
    train, evaluate = (functools.partial(step, self, training) for training in (True, False))
    train = grpo_trainer.ejit(train, in_shardings=given, out_shardings=given, donate_argnums=(0,))
    evaluate = grpo_trainer.ejit(evaluate, in_shardings=given, out_shardings=everywhere)
    train.static_argnums_ = evaluate.static_argnums_ = ()
    self._train_shared_fn_static_args = self._eval_shared_fn_static_args = ()
    functions.sharded_training_step_function = train
    functions.sharded_evaluation_step_function = evaluate
    self.scale_rewards = "none"  # which leaves rewards less their group's mean
    return functions

  def _preprocess_batch_input(self, state, batch, is_train):
    batch, metrics = super()._preprocess_batch_input(state, batch, is_train)
    rewards, present = batch["advantages"], batch["completion_mask"].any(1)
    rewards, present = (x.reshape(len(batch["prompt_ids"]), -1) for x in (rewards, present))
    batch["advantages"] = objective.advantage(rewards, present).reshape(-1)
    return batch, metrics


def step(trainer, training, state, batch):
  settings, mask = trainer.arguments, batch["completion_mask"].astype(bool)
  pieces = settings.gradient_accumulation_steps if training else 1
  batch = {name: x for name, x in batch.items() if name != "num_items_in_batch"}
  for name in ("prompt_ids", "prompt_mask"):
    batch[name] = jnp.repeat(batch[name], len(mask) // len(batch[name]), axis=0)
  # Of the whole batch, so that accumulation is exact; EasyDeL averages over pieces.
  batch |= {"completion_mask": mask, "weights": pieces * objective.weighting(mask, None)}

  def loss_fn(tree, piece):
    ids = jnp.concatenate([piece["prompt_ids"], piece["completion_ids"]], axis=1)
    attention = jnp.concatenate([piece["prompt_mask"], piece["completion_mask"]], axis=1)
    length = piece["prompt_ids"].shape[1]
    log_probs = _fn.get_per_token_logps(state.merge(tree), ids, attention, length)
    rollout = gpo.Rollout(
      advantages=piece["advantages"],
      mask=piece["completion_mask"],
      weights=piece["weights"],
      ref_log_probs=piece["ref_per_token_logps"],
    )
    loss, terms = objective(log_probs, rollout)
    metrics = gpo.summarize(terms, rollout)
    return loss, _fn.LossMetrics(loss=loss, accuracy=1, other_metrics=metrics)

  if not training:
    return loss_fn(state.graphstate, batch)[1]
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  gradients, metrics = _fn.minibatch_call(state, batch, len(mask) // pieces, grad_fn)
  metrics = _fn.update_metrics(metrics, trainer.scheduler, state.step, gradients)
  state = _fn.update_state_respectfully(state, gradients, settings.loss_config, metrics)
  return state, metrics


def reward(completions, **_):
  rewards = [text.split().count("w1") / 8 for text in completions]
  history.append(sum(rewards) / len(rewards))
  return rewards


words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(13)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
config = easydel.LlamaConfig(
  vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
  num_key_value_heads=2, max_position_embeddings=64, **ids,
)  # fmt: skip
dtypes = {"dtype": jnp.float32, "param_dtype": jnp.float32}
model = easydel.LlamaForCausalLM(config=config, rngs=nnx.Rngs(0), **dtypes)
model.generation_config = GenerationConfig(**ids)
history = []
trainer = Trainer(
  arguments=easydel.GRPOConfig(
    save_directory=tempfile.mkdtemp(), total_batch_size=4, max_training_steps=24,
    num_train_epochs=2, learning_rate=3e-2, max_prompt_length=8, max_completion_length=8,
    max_length=16, num_return_sequences=8, num_generations=8, use_esurge_generation=False,
    log_steps=1, report_steps=1, do_last_save=False, save_steps=None, use_wandb=False,
    gradient_accumulation_steps=2,
  ),
  model=model,
  reward_funcs=reward,
  train_dataset=Dataset.from_dict({"prompt": ["w1 w2", "w3", "w4 w5", "w6"] * 16}),
  processing_class=tokenizer,
)  # fmt: skip
trainer.train()
print(f"reward {history[0]:.2f} before, {history[-1]:.2f} after")
