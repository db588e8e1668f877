"""Algorithms, each one expression: the paper's choices of functions, its constants as defaults.

Every preset returns an `Objective`; `replace(slot=…)` returns another one. Where `beta` may be
None, that removes the divergence and with it the need for a reference policy. A preset with a clip
has `epsilon_low` and `epsilon_high`, how far a ratio may fall below 1 and rise above it; None makes
the second equal to the first.

To change a constant that a preset does not name, bind it:
`grpo().replace(advantage=partial(advantages.standardize, ddof=0, eps=1e-6))`.
"""

import inspect
from collections.abc import Callable
from functools import partial

import chex

from gpo_jax import advantages, corrections, divergences, levels, surrogates, weightings
from gpo_jax._inputs import check_number
from gpo_jax.objective import Objective

PRESETS: dict[str, Callable[..., Objective]] = {}  # by name, in the order of this page


def _preset(function: Callable[..., Objective]) -> Callable[..., Objective]:
  PRESETS[function.__name__] = function
  return function


def _clip(epsilon_low: chex.Numeric, epsilon_high: chex.Numeric | None) -> partial:
  return partial(surrogates.clip, epsilon_low=epsilon_low, epsilon_high=epsilon_high)


@_preset
def gpo(
  *,
  epsilon_low: chex.Numeric = 0.2,
  epsilon_high: chex.Numeric | None = None,
  beta: chex.Numeric | None = 0.01,
) -> Objective:
  """The written specification, on tokens: a clipped surrogate and an importance-weighted penalty.

  Its penalty is χ² − KL, stricter than a KL on tokens that the reference finds unlikely. Choose it
  to match `gpo_objective`; for a KL choose `deepseek_v32` or
  `.replace(divergence=divergences.unbiased)`.

  Args:
    beta: weight of the penalty.

  Returns:
    The objective. With advantages given, its loss is minus `gpo_objective` over the active tokens.

  Reference: the module `gpo_jax.specification`.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.token_mean,
    divergence=None if beta is None else divergences.chi2_minus_kl,
    beta=beta,
  )


@_preset
def grpo(
  *,
  epsilon_low: chex.Numeric = 0.2,
  epsilon_high: chex.Numeric | None = None,
  beta: chex.Numeric | None = 0.04,
) -> Objective:
  """GRPO: rewards standardised in their group take the place of a value function.

  Every response weighs the same, so a token of a long one weighs less. Choose it as the baseline
  that every other paper compares with.

  Args:
    beta: weight of the divergence `k3`.

  Example:
    >>> print(grpo(beta=None))
    Objective(surrogate=clip(epsilon_low=0.2), level=token, advantage=standardize, ...)

  Reference: Shao et al. (2024), arXiv:2402.03300, Eq. 3 and 4.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.sequence_mean,
    divergence=None if beta is None else divergences.k3,
    beta=beta,
  )


@_preset
def dr_grpo(
  *, length: chex.Numeric, epsilon_low: chex.Numeric = 0.2, epsilon_high: chex.Numeric | None = None
) -> Objective:
  """Dr. GRPO: no division by the group's standard deviation, none by the response's own length.

  Bad answers no longer gain by being long, nor easy and hard prompts by being one-sided. Choose it
  when responses grow longer without growing better.

  Args:
    length: a constant length, the longest allowed response; never the padded width.

  Reference: Liu et al. (2025), arXiv:2503.20783.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=advantages.center,
    weighting=partial(weightings.constant_length, length=length),
  )


@_preset
def dapo(*, epsilon_low: chex.Numeric = 0.2, epsilon_high: chex.Numeric = 0.28) -> Objective:
  """DAPO: more room upwards than downwards, every token weighs the same, no reference.

  Unlikely tokens of good answers can rise further before they are clipped, which keeps entropy up.
  Choose it for long reasoning; drop groups without variance before the step, as the paper does.

  Reference: Yu et al. (2025), arXiv:2503.14476, Eq. 8.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.token_mean,
  )


@_preset
def gspo(*, epsilon_low: chex.Numeric = 3e-4, epsilon_high: chex.Numeric = 4e-4) -> Objective:
  """GSPO: one ratio per response, the geometric mean of its tokens', clipped as a whole.

  Token ratios that disagree between engines or experts average out. Choose it for mixtures of
  experts and long responses; its clip range is hundreds of times narrower than a token's,
  and one update of a small model may leave it for nearly half of the tokens.

  Reference: Zheng et al. (2025), arXiv:2507.18071, Eq. 5 to 7.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.sequence,
    advantage=advantages.standardize,
    weighting=weightings.sequence_mean,
  )


@_preset
def gspo_token(*, epsilon_low: chex.Numeric = 3e-4, epsilon_high: chex.Numeric = 4e-4) -> Objective:
  """GSPO-token: GSPO's ratio in value, each token's own gradient.

  The same as `gspo` while a response has one advantage and one correction factor. Choose it when
  advantages differ from token to token.

  Reference: Zheng et al. (2025), arXiv:2507.18071, Eq. 13 and 14.
  """
  return gspo(epsilon_low=epsilon_low, epsilon_high=epsilon_high).replace(
    level=levels.sequence_token
  )


@_preset
def cispo(*, high: chex.Numeric = 4.0, low: chex.Numeric | None = None) -> Objective:
  """CISPO: clips the importance weight, never the token; every token keeps a gradient.

  Rare tokens at forks of the reasoning, which a clip would silence first, go on learning. Choose it
  when many updates are made on one batch.

  Args:
    high: the largest weight, an absolute bound. The paper does not disclose its own; 4 is
      tinker-cookbook's.
    low: the smallest weight, an absolute bound; None for no lower bound.

  Reference: MiniMax (2025), arXiv:2506.13585, Eq. 4 and 5.
  """
  return Objective(
    surrogate=partial(surrogates.cispo, low=low, high=high),
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.token_mean,
  )


@_preset
def sapo(*, temperature_pos: chex.Numeric = 1.0, temperature_neg: chex.Numeric = 1.05) -> Objective:
  """SAPO: a smooth gate in place of the clip, a little narrower for bad samples.

  Gradients fade as a ratio leaves 1 instead of stopping at a limit. Choose it when the clip's edge
  makes training unsteady.

  Args:
    temperature_pos: the gate's temperature for good samples; larger fades faster.
    temperature_neg: the same for bad samples.

  Reference: Gao et al. (2025), arXiv:2511.20347.
  """
  return Objective(
    surrogate=partial(
      surrogates.sapo, temperature_pos=temperature_pos, temperature_neg=temperature_neg
    ),
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.sequence_mean,
  )


@_preset
def gmpo(*, epsilon_low: chex.Numeric = 0.4, epsilon_high: chex.Numeric | None = None) -> Objective:
  """GMPO: the geometric mean of token ratios, each clipped in log space first.

  One outlying token cannot swing its response, and the clip range can be wide. Choose it between
  `grpo` and `gspo`.

  Args:
    epsilon_low: how far a token's log-ratio may fall below 0.
    epsilon_high: how far it may rise above 0.

  Reference: Zhao et al. (2025), arXiv:2507.20673.
  """
  return Objective(
    surrogate=surrogates.importance_weighted,
    level=partial(levels.clipped_sequence, low=epsilon_low, high=epsilon_high),
    advantage=advantages.standardize,
    weighting=weightings.sequence_mean,
  )


@_preset
def rloo() -> Objective:
  """RLOO: REINFORCE on whole responses, each against the mean of the others.

  Its expected gradient is the policy gradient, with no bias from the baseline. Choose it on-policy,
  one update per batch; put a KL penalty in the reward.

  Reference: Ahmadian et al. (2024), arXiv:2402.14740.
  """
  return Objective(
    surrogate=surrogates.reinforce,
    level=levels.token,
    advantage=advantages.leave_one_out,
    weighting=weightings.sequence_sum,
  )


@_preset
def reinforce_plus_plus(
  *, epsilon_low: chex.Numeric = 0.2, epsilon_high: chex.Numeric | None = None
) -> Objective:
  """REINFORCE++: rewards standardised over the whole batch, under PPO's clip.

  No group is needed. Choose it for one response per prompt and many prompts; put a KL penalty in
  the reward.

  Reference: Hu et al. (2025), arXiv:2501.03262.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=advantages.batch_standardize,
    weighting=weightings.token_mean,
  )


@_preset
def deepseek_v32(
  *,
  epsilon_low: chex.Numeric = 0.2,
  epsilon_high: chex.Numeric | None = None,
  beta: chex.Numeric | None = 0.001,
  threshold: chex.Numeric = 0.5,
) -> Objective:
  """DeepSeek-V3.2: GRPO with the unbiased KL, and without bad responses that have drifted away.

  The penalty's gradient is that of the KL off-policy too, and stale negatives stop pushing. Choose
  it off-policy with a reference policy, and pass the log-probabilities of the policy that sampled
  as `old_log_probs`. The paper does not disclose β and δ: those here are ours.

  Args:
    beta: weight of the divergence `unbiased`.
    threshold: δ of `off_policy_sequence_mask`, in nats per token.

  Reference: DeepSeek-AI (2025), arXiv:2512.02556, Eq. 7 to 9.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=advantages.center,
    weighting=weightings.sequence_mean,
    divergence=None if beta is None else divergences.unbiased,
    beta=beta,
    corrections=(partial(corrections.off_policy_sequence_mask, threshold=threshold),),
  )


@_preset
def r1(
  *,
  epsilon_low: chex.Numeric = 0.2,
  epsilon_high: chex.Numeric | None = None,
  beta: chex.Numeric | None = 0.001,
) -> Objective:
  """DeepSeek-R1 as it is written: the ratio, and k3, of whole responses, not divided by length.

  Ratios of long responses leave a clip range of ε = 0.2 at once, so it is an on-policy objective.
  Choose it to reproduce the paper's equations; β is the paper's, ε is GRPO's default.

  Args:
    beta: weight of the divergence `sequence_k3`.

  Reference: DeepSeek-AI (2025), arXiv:2501.12948.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.sequence_product,
    advantage=advantages.standardize,
    weighting=weightings.sequence_mean,
    divergence=None if beta is None else divergences.sequence_k3,
    beta=beta,
  )


@_preset
def vespo(
  *,
  k_pos: chex.Numeric = 2.0,
  lambda_pos: chex.Numeric = 3.0,
  k_neg: chex.Numeric = 3.0,
  lambda_neg: chex.Numeric = 2.0,
) -> Objective:
  """VESPO: a smooth kernel of the whole response's ratio, instead of a clip.

  It needs no division by length and fades out responses whose ratio is far from 1: bad ones sooner
  below 1, good ones sooner above. Choose it for asynchronous training with large staleness, and
  pass the log-probabilities of the policy that sampled as `old_log_probs`.

  Args:
    k_pos: k of the kernel where A ≥ 0.
    lambda_pos: λ of the kernel where A ≥ 0.
    k_neg: k of the kernel where A < 0.
    lambda_neg: λ of the kernel where A < 0.

  Reference: Shen et al. (2026), arXiv:2602.10693; weighted by token, as in TRL, which also puts the
  sampler's mismatch into W: for that, let `old_log_probs` be the sampler's.
  """
  kernel = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
  return Objective(
    surrogate=surrogates.reinforce,
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.token_mean,
    corrections=(partial(corrections.vespo, **kernel),),
  )


@_preset
def luspo(*, epsilon_low: chex.Numeric = 3e-4, epsilon_high: chex.Numeric = 4e-4) -> Objective:
  """LUSPO: GSPO with each response multiplied by its length.

  GSPO shrinks a long response's gradient by its length; this gives it back, and on-policy it is the
  policy gradient. Choose it when GSPO's responses shorten.

  Reference: LUSPO (2026), arXiv:2602.05261.
  """
  return gspo(epsilon_low=epsilon_low, epsilon_high=epsilon_high).replace(
    weighting=weightings.sequence_sum
  )


@_preset
def dppo(*, low: chex.Numeric = 0.2, high: chex.Numeric | None = None) -> Objective:
  """DPPO: clips by how far a token's probability has moved, not by its ratio.

  A rare token's ratio may be large while nothing has moved, and a likely token's small while much
  has. Choose it where ratios of rare tokens are clipped too often.

  Args:
    low: how far a token's probability may fall, ≥ 0.
    high: how far it may rise, ≥ 0; `low` if None.

  Reference: DPPO (2026), arXiv:2602.04879, binary total variation. There the ratio, too, is
  taken to the sampler: let `old_log_probs` be the sampler's to have that.
  """
  return Objective(
    surrogate=surrogates.importance_weighted,
    level=levels.token,
    advantage=advantages.standardize,
    weighting=weightings.token_mean,
    corrections=(partial(corrections.total_variation_mask, low=low, high=high),),
  )


@_preset
def topr() -> Objective:
  """TOPR: REINFORCE with bad responses tapered by their likelihood ratio, good ones left alone.

  Good samples teach even when they are old, bad ones stop once they are unlikely. Choose it for
  fully off-policy data, and pass the log-probabilities of the policy that sampled as
  `old_log_probs`.

  Reference: Le Roux et al. (2025), arXiv:2503.14286.
  """
  return Objective(
    surrogate=surrogates.reinforce,
    level=levels.token,
    advantage=advantages.center,
    weighting=weightings.sequence_sum,
    corrections=(corrections.topr,),
  )


@_preset
def gpg() -> Objective:
  """GPG: the plain policy gradient with the group's mean as baseline, averaged over tokens.

  No ratio, no clip, no reference. Choose it on-policy when simplicity counts: it does not see that
  samples are stale. (The paper's factor for groups without variance is left to you: a constant
  times the advantages.)

  Reference: Chu et al. (2025), arXiv:2504.02546.
  """
  return Objective(
    surrogate=surrogates.reinforce,
    level=levels.token,
    advantage=advantages.center,
    weighting=weightings.token_mean,
  )


@_preset
def max_rl() -> Objective:
  """MaxRL: advantages divided by the group's success rate, towards maximum likelihood of success.

  Rare successes count for more. Choose it on-policy with 0/1 rewards and many samples per prompt.

  Reference: MaxRL (2026), arXiv:2602.02710.
  """
  return Objective(
    surrogate=surrogates.reinforce,
    level=levels.token,
    advantage=advantages.max_rl,
    weighting=weightings.sequence_sum,
  )


@_preset
def ppo(*, epsilon_low: chex.Numeric = 0.2, epsilon_high: chex.Numeric | None = None) -> Objective:
  """PPO: the clipped surrogate, with advantages from a critic.

  Pass `prepare(advantages=advantages.generalized(rewards, values, mask), mask=mask, …)`. A KL
  penalty goes into the rewards of tokens, the critic's loss beside this one. Choose it with rewards
  of tokens or turns, or with one response per prompt; without a critic it is `reinforce_plus_plus`.

  Reference: Schulman et al. (2017), arXiv:1707.06347, Eq. 7.
  """
  return Objective(
    surrogate=_clip(epsilon_low, epsilon_high),
    level=levels.token,
    advantage=None,
    weighting=weightings.token_mean,
  )


@_preset
def distill(*, beta: chex.Numeric = 1.0) -> Objective:
  """On-policy distillation: the KL from a teacher, on the student's own samples, and no rewards.

  `prepare(mask=mask, ref_log_probs=teacher_log_probs, …)`; with `advantages=` too, rewards and
  teacher teach together. The gradient is that of KL(student‖teacher) of tokens, for samples of any
  `old_log_probs`, with states as these visited them; for the KL of whole responses
  `.replace(divergence=divergences.sequence_unbiased, weighting=weightings.sequence_sum)`. Choose it
  if a better model with the same tokens is at hand.

  Args:
    beta: weight of the divergence `unbiased`.

  Reference: Agarwal et al. (2024), arXiv:2306.13649, with the reverse KL of sampled tokens as in Lu
  (2025), "On-policy distillation".
  """
  return Objective(
    surrogate=surrogates.importance_weighted,
    level=levels.token,
    advantage=None,
    weighting=weightings.token_mean,
    divergence=divergences.unbiased,
    beta=beta,
  )


def preset(name: str, **numbers: chex.Numeric) -> Objective:
  """Makes the preset of a name, as read from a configuration file.

  Args:
    name: the name of a preset, such as "dapo".
    **numbers: its arguments.

  Returns:
    The objective.

  Raises:
    ValueError: for an unknown name, an unknown or missing argument, and numbers given as text or as
      a bool: YAML reads `3e-4` as text and `3.0e-4` as a number, `None` as text and `yes` as True.

  Example:
    >>> print(preset("gspo", epsilon_low=1e-3).surrogate.keywords["epsilon_low"])
    0.001
  """
  if not isinstance(name, str) or name not in PRESETS:
    raise ValueError(f"name must be one of {', '.join(PRESETS)}; got {name!r:.60}")
  function = PRESETS[name]
  known = ", ".join(inspect.signature(function).parameters) or "none"
  try:
    inspect.signature(function).bind(**numbers)
  except TypeError as error:
    raise ValueError(
      f"{name} takes {known}; got {', '.join(numbers) or 'none'}: {error}"
    ) from error
  for key, value in numbers.items():
    check_number(f"{key} of {name}", value)
  return function(**numbers)
