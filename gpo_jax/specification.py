"""The written objective, exactly, in probability space.

    L_i = min(ρ_i A_i, clip(ρ_i, 1−ε, 1+ε) A_i)
    D_i = ρ_i (r_i − log r_i − 1),   r_i = π_current,i / π_ref,i
    J   = mean(L) − β mean(D)

What the penalty estimates: with samples from any μ and ρ = π_current/μ, mean(D) is unbiased, in
value and in gradient, for χ²(π_current‖π_ref) − KL(π_current‖π_ref). That is 0 only where the two
policies agree, and equals the KL to second order around there, but it is not a KL: below r = 0.203
it rewards pushing a likelihood further down. The unbiased estimator of KL(π_current‖π_ref) inverts
r, ρ_i (1/r_i + log r_i − 1) (DeepSeek-V3.2, 2025, arXiv:2512.02556, Eq. 7): swap the arguments
`pi_current` and `pi_ref` of `gpo_objective` to get it, and differentiate with `jax.grad`
(`gpo_value_and_grad` would then differentiate the reference).

The surrogate is Eq. 7 of Schulman et al. (2017), arXiv:1707.06347; the whole has the form of Eq. 3
of Shao et al. (2024), arXiv:2402.03300, with another penalty.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.typing import ArrayLike

from gpo_jax._inputs import as_array, as_scalar, check_same_shape, describe, promote
from gpo_jax._numerics import clip_ratio, exp_excess

P = ParamSpec("P")
R = TypeVar("R")


class GpoGradients(NamedTuple):
  """The gradient of J with respect to the two inputs that depend on the policy.

  Attributes:
    ratios: ∂J/∂ρ, of the shape and float dtype of `ratios`.
    pi_current: ∂J/∂π_current, of the shape and float dtype of `pi_current`.
  """

  ratios: chex.Array
  pi_current: chex.Array


def gpo_objective(
  ratios: ArrayLike,
  advantages: ArrayLike,
  pi_current: ArrayLike,
  pi_ref: ArrayLike,
  epsilon: chex.Numeric = 0.2,
  beta: chex.Numeric = 0.01,
) -> chex.Array:
  """Computes the group policy objective J, to be maximised.

      J = mean(min(ρA, clip(ρ, 1−ε, 1+ε)A)) − β mean(ρ(r − log r − 1)),   r = π_current / π_ref

  Compiled once per shape: `epsilon` and `beta` are traced. At a tie, ρ = 1±ε, the gradient is the
  unclipped branch's. With ρ = π_current/μ, mean(ρ(r − log r − 1)) is unbiased for χ² − KL of
  π_current from π_ref, not for the KL; with `pi_current` and `pi_ref` swapped it is unbiased for
  KL(π_current‖π_ref) (see the module's docstring).

  Args:
    ratios: ρ = π_current/π_old, shape `[N]`, positive.
    advantages: A, shape `[N]`, finite.
    pi_current: likelihoods under the current policy, shape `[N]`, positive; densities may exceed 1.
    pi_ref: likelihoods under the reference policy, shape `[N]`, positive.
    epsilon: half-width of the clip range, a scalar > 0.
    beta: weight of the penalty, a scalar ≥ 0.

  Returns:
    The scalar J, in the widest of the inputs' dtypes, float32 at least.

  Raises:
    ValueError: at trace time, if shapes differ, are empty or not `[N]`, or an input is not real.
      Values are checked by `check`.

  Example:
    >>> J = gpo_objective([1.2, 0.8, 1.1], [1, 1, 1], [0.9, 1.1, 1.0], [1.0, 0.5, 1.5])
    >>> print(f"{J:.5f}")
    1.03195

  Reference: the module's docstring.
  """
  return _objective(*_inputs(ratios, advantages, pi_current, pi_ref, epsilon, beta))


def gpo_value_and_grad(
  ratios: ArrayLike,
  advantages: ArrayLike,
  pi_current: ArrayLike,
  pi_ref: ArrayLike,
  epsilon: chex.Numeric = 0.2,
  beta: chex.Numeric = 0.01,
) -> tuple[chex.Array, GpoGradients]:
  """Computes J and its gradient with respect to the two inputs that depend on the policy.

      ∂J/∂ρ_i         = (A_i [not clipped] − β (r_i − log r_i − 1)) / N
      ∂J/∂π_current,i = −β ρ_i (1/π_ref,i − 1/π_current,i) / N

  For a policy with parameters θ, ρ and π_current both depend on θ and the chain rule adds the two.

  Args:
    ratios: as in `gpo_objective`, and so are the others.
    advantages: A.
    pi_current: current likelihoods.
    pi_ref: reference likelihoods.
    epsilon: half-width of the clip range.
    beta: weight of the penalty.

  Returns:
    J, and `GpoGradients(ratios, pi_current)`.

  Raises:
    ValueError: as `gpo_objective`.

  Example:
    >>> J, gradients = gpo_value_and_grad([1.5, 1.0], [1.0, 1.0], [0.5, 0.25], [0.5, 0.5], beta=1.0)
    >>> print(gradients.pi_current, [f"{x:.3f}" for x in gradients.ratios])  # the first is clipped
    [-0.  1.] ['0.000', '0.403']
  """
  return _value_and_grad(*_inputs(ratios, advantages, pi_current, pi_ref, epsilon, beta))


def gpo_objective_per_group(
  ratios: ArrayLike,
  advantages: ArrayLike,
  pi_current: ArrayLike,
  pi_ref: ArrayLike,
  epsilon: chex.Numeric = 0.2,
  beta: chex.Numeric = 0.01,
) -> chex.Array:
  """Computes J of each group: `jax.vmap` of `gpo_objective` over the leading axis.

      J_p = gpo_objective(ratios[p], advantages[p], pi_current[p], pi_ref[p], epsilon, beta)

  Args:
    ratios: ρ, shape `[P, N]`: P prompts of N samples each; otherwise as in `gpo_objective`.
    advantages: A, shape `[P, N]`.
    pi_current: current likelihoods, shape `[P, N]`.
    pi_ref: reference likelihoods, shape `[P, N]`.
    epsilon: half-width of the clip range, shared by the groups.
    beta: weight of the penalty, shared by the groups.

  Returns:
    J of each group, shape `[P]`.

  Raises:
    ValueError: as `gpo_objective`, for shapes other than `[P, N]`.

  Example:
    >>> ones = [[1.0, 1.0], [1.0, 1.0]]
    >>> print(gpo_objective_per_group(ones, [[1.0, 2.0], [3.0, 4.0]], ones, ones))
    [1.5 3.5]
  """
  return _objective_per_group(*_inputs(ratios, advantages, pi_current, pi_ref, epsilon, beta))


def gpo_loss(
  ratios: ArrayLike,
  advantages: ArrayLike,
  pi_current: ArrayLike,
  pi_ref: ArrayLike,
  epsilon: chex.Numeric = 0.2,
  beta: chex.Numeric = 0.01,
  *,
  where: ArrayLike | None = None,
) -> chex.Array:
  """Computes the loss of each sample, as optax's losses do: minimised, not reduced.

      loss_i = β ρ_i (r_i − log r_i − 1) − min(ρ_i A_i, clip(ρ_i, 1−ε, 1+ε) A_i)

  Its mean is −J. With a mask, reduce as `jnp.sum(gpo_loss(…, where=mask)) / jnp.sum(mask)`.

  Args:
    ratios: as in `gpo_objective`, and so are the others.
    advantages: A.
    pi_current: current likelihoods.
    pi_ref: reference likelihoods.
    epsilon: half-width of the clip range.
    beta: weight of the penalty.
    where: the samples that count, shape `[N]`, bool or 0/1; all by default. The others may hold
      anything, NaN included: their loss and their gradient are 0.

  Returns:
    The losses, shape `[N]`.

  Raises:
    ValueError: as `gpo_objective`, and if `where` has another shape.

  Example:
    >>> nan = float("nan")
    >>> print(gpo_loss([1.0, nan], [2.0, nan], [0.5, nan], [0.5, nan], where=[True, False]))
    [-2.  0.]
  """
  inputs = _inputs(ratios, advantages, pi_current, pi_ref, epsilon, beta)
  return _loss(*inputs, where=None if where is None else as_array("where", where))


def check(fn: Callable[P, R]) -> Callable[P, R]:
  """Checks the values of a function's arguments, in compiled code too.

  The arguments are known by the names that the functions of this module give them: `ratios`,
  `pi_current` and `pi_ref` must be positive and finite (and not subnormal: XLA may flush such
  numbers to 0), `advantages` finite, `epsilon` > 0 and `beta` ≥ 0; samples that an argument
  `where` masks are not checked. The checks are compiled. Inside your own `jax.jit`, wrap the
  step as every JAX check requires: `error, out = jax.jit(checkify.checkify(step))(…)`,
  `error.throw()`.

  Args:
    fn: a function of this module, or one with arguments of the same names.

  Returns:
    The same function, which raises on a bad value.

  Raises:
    ValueError: from `check`, if `fn` has none of these arguments; from the result, on a bad value
      (`checkify.JaxRuntimeError`, a `ValueError`): the argument and the first bad index.

  Example:
    >>> check(gpo_objective)([1.0, -1.0], [1.0, 1.0], [0.5, 0.5], [0.5, 0.5])
    Traceback (most recent call last):
      ...
    jax._src.checkify.JaxRuntimeError: ratios must be positive, finite and not subnormal; ...
  """
  signature = inspect.signature(fn)
  if not _REQUIREMENTS.keys() & signature.parameters.keys():
    raise ValueError(f"check needs a function with an argument among {sorted(_REQUIREMENTS)}")

  @functools.wraps(fn)
  def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if value is not None}
    checked = _REQUIREMENTS.keys() & given.keys() | {"where"} & given.keys()
    error, _ = _check_values({name: as_array(name, given[name]) for name in checked})
    checkify.check_error(error)
    return fn(*args, **kwargs)

  return wrapper


_NAMES = ("ratios", "advantages", "pi_current", "pi_ref")


def _inputs(*arguments: Any) -> tuple[Any, ...]:
  *arrays, epsilon, beta = arguments
  arrays = [as_array(name, value) for name, value in zip(_NAMES, arrays, strict=True)]
  return *arrays, as_scalar("epsilon", epsilon), as_scalar("beta", beta)


@jax.custom_jvp
def _log_quotient(x: jax.Array, y: jax.Array) -> jax.Array:
  # Near 1 it comes from the difference x − y, exact there: the rounded quotient has lost the digits
  # that matter. Where the quotient leaves the floats' range, the logarithms do not.
  excess, quotient = (x - y) / y, x / y
  in_range = (quotient >= jnp.finfo(x.dtype).tiny) & (quotient < jnp.inf)
  far = jnp.where(in_range, jnp.log(quotient), jnp.log(x) - jnp.log(y))
  return jnp.where(jnp.abs(excess) < 0.5, jnp.log1p(excess), far)


@_log_quotient.defjvp
def _log_quotient_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]):
  (x, y), (x_dot, y_dot) = primals, tangents
  return _log_quotient(x, y), x_dot / x - y_dot / y


def _per_sample(*inputs: jax.Array) -> jax.Array:
  ratios, advantages, pi_current, pi_ref = promote(*inputs[:4])
  epsilon, beta = (x.astype(ratios.dtype) for x in inputs[4:])
  limit = jnp.where(advantages > 0, 1 + epsilon, 1 - epsilon)
  surrogate = clip_ratio(ratios, advantages, limit) * advantages
  # β first: for β = 0 there is no penalty, even if the divergence leaves the floats' range.
  return beta * ratios * exp_excess(_log_quotient(pi_current, pi_ref)) - surrogate


def _check_shapes(axes: str, arrays: tuple[jax.Array, ...]) -> None:
  rank, shapes = axes.count(",") + 1, {x.shape for x in arrays}
  if len(shapes) > 1 or arrays[0].ndim != rank or 0 in arrays[0].shape:
    got = describe(**dict(zip(_NAMES, arrays, strict=True)))
    raise ValueError(
      f"{', '.join(_NAMES)} must have one shape {axes}, every axis at least 1; got {got}"
    )


@jax.jit
def _objective(*inputs: jax.Array) -> jax.Array:
  _check_shapes("[N]", inputs[:4])
  return -jnp.mean(_per_sample(*inputs))


@jax.jit
def _objective_per_group(*inputs: jax.Array) -> jax.Array:
  _check_shapes("[P, N]", inputs[:4])
  return jax.vmap(_objective, in_axes=(0, 0, 0, 0, None, None))(*inputs)


@jax.jit
def _value_and_grad(*inputs: jax.Array) -> tuple[jax.Array, GpoGradients]:
  value, gradients = jax.value_and_grad(_objective, argnums=(0, 2))(*inputs)
  return value, GpoGradients(*gradients)


@jax.jit
def _loss(*inputs: jax.Array, where: jax.Array | None) -> jax.Array:
  _check_shapes("[N]", inputs[:4])
  if where is None:
    return _per_sample(*inputs)
  check_same_shape(ratios=inputs[0], where=where)
  # Masking the inputs, not only the result, keeps a NaN at a masked sample out of the gradient.
  keep = where != 0
  arrays = [jnp.where(keep, x, jnp.ones_like(x)) for x in inputs[:4]]
  return jnp.where(keep, _per_sample(*arrays, *inputs[4:]), 0)


def _is_positive(x: jax.Array) -> jax.Array:
  (x,) = promote(x)
  return (x >= jnp.finfo(x.dtype).tiny) & jnp.isfinite(x)


_POSITIVE = ("positive, finite and not subnormal", _is_positive)
_REQUIREMENTS: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
  "ratios": _POSITIVE,
  "pi_current": _POSITIVE,
  "pi_ref": _POSITIVE,
  "advantages": ("finite", jnp.isfinite),
  "epsilon": ("greater than 0", lambda x: x > 0),
  "beta": ("at least 0 and finite", lambda x: (x >= 0) & jnp.isfinite(x)),
}


@jax.jit
@checkify.checkify
def _check_values(arguments: dict[str, jax.Array]) -> None:
  for name, (requirement, is_good) in _REQUIREMENTS.items():
    value = arguments.get(name)
    if value is None or not value.size:  # the function itself raises on an empty array
      continue
    value = jnp.asarray(value)
    bad = ~is_good(value)
    if value.ndim and "where" in arguments:
      check_same_shape(**{name: value, "where": arguments["where"]})
      bad &= arguments["where"] != 0
    first = jnp.argmax(bad)
    place = " at index {}" if value.ndim else ""
    checkify.check(
      ~jnp.any(bad),
      f"{name} must be {requirement}; got {{}}{place}",
      value.ravel()[first],
      jnp.array(jnp.unravel_index(first, value.shape) if value.ndim else first),
    )
