"""Types of learned quantizer state, by which optimizers, shardings and checkpoints select it."""

from flax import nnx


class QuantizerParam(nnx.Param):
    """Any learned parameter of a quantizer; not to be decayed, and often given a rate of its own.

    `is_quantizer_state` tells an optimizer which these are.
    """


class Step(QuantizerParam):
    """The distance of two levels and of two thresholds: UniQ's Δ, LSQ's s."""


class Threshold(QuantizerParam):
    """Where codes step up: N2UQ's start and intervals."""


class Scale(QuantizerParam):
    """A factor on a quantizer's input or output: N2UQ's β₁ and β₂."""


class Clip(QuantizerParam):
    """The upper bound of a clipped activation: PACT's c."""


def is_quantizer_state(model: nnx.Module) -> nnx.State:
    """Which of a model's params are learned by quantizers, as a tree of bools.

    Such a tree is what `optax.masked` takes, and `jax.tree.map` makes labels of it for
    `optax.multi_transform`. `nnx.Optimizer` shows optax arrays without their types, so that a
    function of the params in its place could not tell.

    Args:
      model: any NNX module.

    Returns:
      A tree like `nnx.state(model, nnx.Param)`, for an optimizer with `wrt=nnx.Param`.

    Example:
      >>> import jax, optax
      >>> from flax import nnx
      >>> from uniq_jax.nn import QuantLinear, UniqWeight, is_quantizer_state
      >>> model = QuantLinear(2, 3, weight=UniqWeight(2), rngs=nnx.Rngs(0))
      >>> learned = is_quantizer_state(model)
      >>> nnx.to_pure_dict(learned)
      {'bias': False, 'kernel': False, 'weight_quantizer': {'step': True}}
      >>> decayed = jax.tree.map(lambda is_learned: not is_learned, learned)
      >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3, mask=decayed), wrt=nnx.Param)
    """
    return nnx.map_state(
        lambda _, variable: isinstance(variable, QuantizerParam), nnx.state(model, nnx.Param)
    )
