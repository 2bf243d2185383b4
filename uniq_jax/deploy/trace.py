"""From a model to a graph: its evaluation is traced, and every primitive becomes a node."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from uniq_jax.deploy.graph import Graph, Node, pruned
from uniq_jax.nn import capture

# Primitives that work number by number and broadcast, with the attributes they need.
ELEMENTWISE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "exp", "log", "tanh"), ()
    ),
    **dict.fromkeys(("logistic", "sqrt", "rsqrt", "erf", "floor", "round_even", "square"), ()),
    **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "select_n"), ()),
    "integer_pow": ("y",),
    "convert_element_type": ("new_dtype",),
}

_OTHERS: Mapping[str, tuple[str, ...]] = {
    "reshape": ("new_sizes",),
    "transpose": ("permutation",),
    "broadcast_in_dim": ("shape", "broadcast_dimensions"),
    "squeeze": ("dimensions",),
    "slice": ("start_indices", "limit_indices", "strides"),
    "pad": ("padding_config",),
    "concatenate": ("dimension",),
    "reduce_sum": ("axes",),
    "reduce_max": ("axes",),
    "argmax": ("axes", "index_dtype"),
    "reduce_window_max": (
        "window_dimensions",
        "window_strides",
        "padding",
        "base_dilation",
        "window_dilation",
    ),
    "dot_general": ("dimension_numbers",),
    "conv_general_dilated": (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
    ),
}

# Functions of `uniq_jax.exact` that are one node each, by the name under which JAX traces them.
_NAMED = {
    "exact_prelu": "prelu",
    "exact_mean": "mean_pixels",
}

# A model is traced at two sizes of the batch: what differs depends on it.
_BATCHES = (2, 3)

# Names of what a call primitive calls.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Traced:
    """A graph of the primitives of a model's evaluation.

    Attributes:
      graph: with the operations "encode" (of layer i, to its levels) and "rescale".
      arrays: constants, by name.
      layers: the quantized layers, as the attribute `layer` of nodes counts them.
      paths: of these layers in the model.
    """

    graph: Graph
    arrays: dict[str, np.ndarray]
    layers: list[Any]
    paths: list[str]


def trace(model: nnx.Module, image_shape: tuple[int, ...]) -> Traced:
    """The graph of a model's evaluation.

    Args:
      model: in evaluation mode.
      image_shape: of one input, without the batch.

    Raises:
      ValueError: if the model computes in another dtype than float32, or returns other things than
        logits.
      NotImplementedError: if the model does something that no frozen network can; the message
        names the primitive and the line of the model.
    """
    names = {id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    try:
        programs, layers = _programs(model, image_shape)
    except capture.NotRecordableError as error:
        name = names.get(id(error.layer), f"of type {type(error.layer).__name__}")
        raise error.kind(f"the layer {name} {error.reason}") from None
    outputs = programs[0].out_avals
    if len(outputs) != 1:
        raise ValueError(f"model must return one array, the logits; it returns {len(outputs)}")
    if outputs[0].dtype != jnp.float32:
        raise ValueError(f"model must return float32 logits; it returns {outputs[0].dtype}")
    paths = [names.get(id(layer), f"layer{i}") for i, layer in enumerate(layers)]
    builder = _Builder(paths)
    jaxprs = tuple(program.jaxpr for program in programs)
    output = builder.run(jaxprs, programs[0].consts, ["input"])[0]
    graph = Graph(tuple(builder.nodes), builder.named(output), tuple(image_shape))
    graph, arrays = pruned(graph, builder.arrays)
    return Traced(graph, arrays, layers, builder.paths)


def _programs(
    model: nnx.Module, image_shape: tuple[int, ...]
) -> tuple[list[ClosedJaxpr], list[Any]]:
    """The model's evaluation at each of `_BATCHES`, and the quantized layers that it calls."""
    call: Any = model
    programs, layers = [], []
    for batch in _BATCHES:
        images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
        try:
            with capture.recording() as layers:
                programs.append(jax.make_jaxpr(lambda images: call(images))(images))
        except ValueError as error:
            if "trace level" not in str(error):  # What Flax says of its transforms.
                raise
            raise NotImplementedError(
                "a frozen network cannot hold layers that lie in a transform of Flax, such as "
                "nnx.scan"
            ) from error
        except TypeError as error:
            error.add_note(f"image_shape (={image_shape!r}) may not be what the model takes")
            raise
    return programs, layers


@dataclasses.dataclass(frozen=True)
class _Constant:
    """An array known now; `shape` is the larger one it stands for, whose sizes may be batches."""

    value: Any
    shape: tuple[Any, ...]


class _Builder:
    """Makes nodes of the equations of a jaxpr; what depends on constants alone is calculated."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.nodes: list[Node] = []
        # The calls that what is looked at now lies in.
        self.callers: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}

    def run(self, jaxprs: tuple[Jaxpr, ...], consts: Any, inputs: list[Any]) -> list[Any]:
        """Values of the outputs, names of nodes or constants, of one program at both batches."""
        jaxpr = jaxprs[0]
        values: dict[Any, Any] = {}

        def read(var: Any) -> Any:
            if isinstance(var, Literal):
                return _Constant(np.asarray(var.val, var.aval.dtype), ())  # pyright: ignore
            return values[var]

        for var, const in zip(jaxpr.constvars, consts):
            values[var] = _Constant(const, np.shape(const))
        values.update(zip(jaxpr.invars, inputs))
        for equations in zip(*(jaxpr.eqns for jaxpr in jaxprs)):
            outputs = self._equations(equations, [read(var) for var in equations[0].invars])
            values.update(zip(equations[0].outvars, outputs))
        return [read(var) for var in jaxpr.outvars]

    def named(self, value: Any, *, whole: bool = True) -> str:
        """The name of a value; a constant becomes an array, and a node where it is to be whole."""
        if not isinstance(value, _Constant):
            return value
        array = np.asarray(value.value)
        name = f"constant{len(self.arrays)}"
        self.arrays[name] = array
        if not whole or array.shape == tuple(value.shape):
            return name
        axes = tuple(range(len(value.shape) - array.ndim, len(value.shape)))
        attributes = {"shape": value.shape, "broadcast_dimensions": axes}
        return self._node("broadcast_in_dim", [name], attributes)

    def _equations(self, equations: tuple[Any, ...], inputs: list[Any]) -> list[Any]:
        equation = equations[0]
        name, params = equation.primitive.name, equation.params
        if name == "broadcast_in_dim" and isinstance(inputs[0], _Constant):
            return [_broadcast(inputs[0], equations)]
        if all(isinstance(value, _Constant) for value in inputs):
            is_static = _is_static(equations) and not any(map(_repeats_with_batch, inputs))
            if is_static or name in ELEMENTWISE:
                values = [_whole(v) for v in inputs] if is_static else _compact(inputs)
                with jax.ensure_compile_time_eval():
                    results = equation.primitive.bind(*values, **params)
                results = results if equation.primitive.multiple_results else [results]
                outputs = zip(*(e.outvars for e in equations))
                shapes = [_merged(*(var.aval.shape for var in pair)) for pair in outputs]
                return [_Constant(result, shape) for result, shape in zip(results, shapes)]
        if name == "jit" and params["name"] in _NAMED:
            return [self._node(_NAMED[params["name"]], [self.named(v) for v in inputs], {})]
        key = next((key for key in _CALLED if key in params), None)
        if key is not None and name not in ("scan", "while", "cond"):
            inner = [e.params[key] for e in equations]
            called = [i if isinstance(i, ClosedJaxpr) else ClosedJaxpr(i, ()) for i in inner]
            jaxprs = tuple(closed.jaxpr for closed in called)
            self.callers.append(equation)
            results = self.run(jaxprs, called[0].consts, inputs[-len(jaxprs[0].invars) :])
            self.callers.pop()
            return results
        if name in ("stop_gradient", "copy", "copy_p", "optimization_barrier"):
            return inputs
        return [self._primitive(equations, name, inputs)]

    def _primitive(self, equations: tuple[Any, ...], name: str, inputs: list[Any]) -> str:
        params = equations[0].params
        if name == capture.encode_mark.name:
            return self._node("encode", [self.named(inputs[0])], {}, layer=params["layer"])
        if name == capture.rescale_mark.name:
            sums, scale = self.named(inputs[0]), self.named(inputs[1], whole=False)
            return self._node("rescale", [sums, scale], {}, layer=params["layer"])
        if name == "round" and "EVEN" in str(params["rounding_method"]):
            name = "round_even"
        kept = ELEMENTWISE.get(name, _OTHERS.get(name))
        if kept is None:
            origin = _origin([*self.callers, equations[0]])
            raise NotImplementedError(f"a frozen network has no operation for {name!r}{origin}")
        named = [self.named(v, whole=name not in ELEMENTWISE) for v in inputs]
        attributes = {key: _merged(*(e.params[key] for e in equations)) for key in kept}
        return self._node(name, named, attributes)

    def _node(
        self, operation: str, inputs: list[str], attributes: Mapping[str, Any], layer: int = -1
    ) -> str:
        plain = tuple((key, value) for key, value in attributes.items())
        name = f"{operation}{len(self.nodes)}"
        if layer >= 0:
            plain = (*plain, ("layer", layer))
        path = self.paths[layer] if layer >= 0 else ""
        self.nodes.append(Node(name, operation, tuple(inputs), plain, path))
        return name


def _is_static(equations: tuple[Any, ...]) -> bool:
    """Whether no size of an output depends on the batch."""
    shapes = [[var.aval.shape for var in equation.outvars] for equation in equations]
    return shapes[0] == shapes[1]


def _merged(first: Any, second: Any) -> Any:
    """A parameter of a primitive, as numbers, strings and tuples, from its values at both batches.

    What is proportional to the batch becomes `("batch", how many times)`.
    """
    if first is None or isinstance(first, str | bool):
        return first
    if isinstance(first, int | np.integer):
        if first == second:
            return int(first)
        if first * _BATCHES[1] == second * _BATCHES[0]:
            return ("batch", int(first) // _BATCHES[0])
    if isinstance(first, np.dtype):
        return first.name
    if isinstance(first, tuple | list) and len(first) == len(second):
        return tuple(_merged(a, b) for a, b in zip(first, second))
    raise NotImplementedError(f"a frozen network cannot hold the parameter {first!r}")


def _repeats_with_batch(constant: _Constant) -> bool:
    return any(isinstance(size, tuple) for size in constant.shape)


def _whole(constant: _Constant) -> Any:
    return jnp.broadcast_to(constant.value, constant.shape)


def _compact(constants: list[_Constant]) -> list[Any]:
    """Operands of an elementwise operation, repeated along those axes only that one of them has."""
    return jnp.broadcast_arrays(*(constant.value for constant in constants))


def _broadcast(constant: _Constant, equations: tuple[Any, ...]) -> _Constant:
    """The constant in its new rank, with a size of 1 along every axis that repeats it."""
    shape = _merged(*(equation.params["shape"] for equation in equations))
    sizes = [1] * len(shape)
    value = constant.value
    for size, axis in zip(np.shape(value), equations[0].params["broadcast_dimensions"]):
        sizes[axis] = size
    return _Constant(jnp.reshape(value, sizes), shape)


def _origin(calls: list[Any]) -> str:
    """The line of a model that the last of nested calls comes from, as far as it is known."""
    for equation in reversed(calls):
        traceback = equation.source_info.traceback
        for frame in traceback.frames if traceback is not None else []:
            if not any(f"/{package}/" in frame.file_name for package in ("jax", "flax", "deploy")):
                return f", at {frame.file_name}:{frame.line_num}"
    return ""
