"""What every module of a network receives, returns and multiplies, found by tracing it once."""

import collections
import contextlib
import dataclasses
import math
import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

Shape = tuple[int, ...]

# Every module's call is traced in a scope of this name and the module's number. Products carry it
# through jit, scan, vmap and remat, where counting calls in Python would miss cached traces.
_SCOPE = "uniq_jax.summary."
_NUMBER = re.compile(re.escape(_SCOPE) + r"(\d+)")
_MARK = "_uniq_jax_summary_mark"

# Calls are watched by replacing `__call__` of classes, which all threads share.
_lock = threading.RLock()


@dataclasses.dataclass
class Trace:
    """What a call of a model does, by the number of the module in `nnx.iter_modules`.

    Attributes:
      shapes: of the first array in and out, at the module's first call; in the order of calls.
      macs: multiply-accumulates of all calls, but those inside modules below.
    """

    shapes: dict[int, tuple[Shape | None, Shape | None]]
    macs: collections.Counter[int]


@dataclasses.dataclass(frozen=True, eq=False)
class _Mark:
    """Which module of which trace an instance is; survives split and merge as a static attribute.

    Equal to itself only, so that no function that JAX has cached for an earlier trace is used.
    """

    number: int
    trace: Trace


def trace(model: nnx.Module, arguments: tuple[Any, ...]) -> Trace:
    """Traces a copy of `model` in evaluation mode, computing nothing.

    Args:
      model: any NNX module; its arrays may be ShapeDtypeStructs.
      arguments: of the call; arrays and ShapeDtypeStructs in them are traced, all else is static.
    """
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(arguments)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}
    found = Trace({}, collections.Counter())

    def run(state: Any, arrays: dict[int, Any]) -> None:
        copy: Any = nnx.merge(graphdef, state)
        copy.eval()
        modules: list[tuple[Any, Any]] = list(nnx.iter_modules(copy))
        for number, (_, module) in enumerate(modules):
            if callable(module):
                setattr(module, _MARK, _Mark(number, found))
            if hasattr(module, "weight_quantizer"):
                # In evaluation a product may be taken of digits, several times.
                module.deterministic = False
        copy(*jax.tree.unflatten(structure, [arrays.get(i, v) for i, v in enumerate(leaves)]))

    with _watched({type(module) for _, module in nnx.iter_modules(model)}):
        jaxpr = jax.make_jaxpr(run)(state, arrays)
    found.macs.update(_products(jaxpr.jaxpr, owner=0))
    return found


@contextlib.contextmanager
def _watched(classes: Iterable[Any]) -> Iterator[None]:
    """Marked instances of these classes leave their shapes, and their scope, when called."""
    with _lock:
        calls = {}
        for cls in classes:
            # Not getattr, which finds the metaclass's for classes that cannot be called.
            owner = next((base for base in cls.__mro__ if "__call__" in vars(base)), None)
            if owner is not None:
                calls[cls] = (owner, vars(owner)["__call__"])
        try:
            for cls, (_, call) in calls.items():
                cls.__call__ = _watching(call)
            yield
        finally:
            for cls, (owner, call) in calls.items():
                if cls is owner:
                    cls.__call__ = call
                else:
                    del cls.__call__


def _watching(call: Any) -> Any:
    def __call__(self, *args, **kwargs):
        bound = call.__get__(self, type(self))
        mark = getattr(self, _MARK, None)
        if mark is None:
            return bound(*args, **kwargs)
        shapes, number = mark.trace.shapes, mark.number
        is_first = number not in shapes
        if is_first:
            shapes[number] = _first_shape((args, kwargs)), None
        with jax.named_scope(f"{_SCOPE}{number}"):
            result = bound(*args, **kwargs)
        if is_first:
            shapes[number] = shapes[number][0], _first_shape(result)
        return result

    return __call__


def _first_shape(tree: Any) -> Shape | None:
    shapes = (leaf.shape for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))
    return next(shapes, None)


def _products(jaxpr: Jaxpr, owner: int) -> collections.Counter[int]:
    """Multiply-accumulates by module; those outside every scope are the module's `owner`."""
    macs = collections.Counter()
    for equation in jaxpr.eqns:
        numbers = _NUMBER.findall(str(equation.source_info.name_stack))
        number = int(numbers[-1]) if numbers else owner
        macs[number] += _macs(equation)
        inner = [_products(below, number) for below in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":
            # Only one branch is taken.
            inner = [max(inner, key=lambda branch: branch.total())]
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for counted in inner:
            for below, count in counted.items():
                macs[below] += repeats * count
    return macs


def _macs(equation: JaxprEqn) -> int:
    kind, parameters = equation.primitive.name, equation.params
    if kind not in ("dot_general", "conv_general_dilated"):
        return 0
    operands: Any = (*equation.invars, *equation.outvars)
    left, right, result = (operand.aval.shape for operand in operands)
    outputs = math.prod(result)
    numbers = parameters["dimension_numbers"]
    if kind == "dot_general":
        (contracted, _), _ = numbers
        return outputs * math.prod(left[axis] for axis in contracted)
    if any(factor != 1 for factor in parameters["lhs_dilation"]):
        # A transposed convolution: each input meets the kernel, and the zeros between nothing.
        return math.prod(left) // left[numbers.lhs_spec[1]] * math.prod(right)
    return outputs // right[numbers.rhs_spec[0]] * math.prod(right)
