"""Unmodified models, quantized by qwix with this package's quantizers."""

import functools
import importlib
import importlib.metadata
import pathlib
import sys
import tomllib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import uniq_jax.nn as qnn
from uniq_jax import quantize, rules
from uniq_jax.linen import QuantConv, QuantDense, calibrate, is_quantizer_state
from uniq_jax.nn import N2uqActivation, N2uqWeight, UniqActivation, UniqWeight
from uniq_jax.qwix import RuleProvider

# qwix 0.1.8 calls what Flax 0.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The 'm.iter_modules:DeprecationWarning")

METHODS = {
    "uniq": (UniqWeight(2), UniqActivation(2)),
    "uniq-channel-n2uq": (UniqWeight(3, "channel"), N2uqActivation(2)),
    "n2uq-only-weights": (N2uqWeight(2), None),
}


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def kernels(key, shape, dtype):
    del key
    return numbers(*shape, seed=sum(shape)).astype(dtype)


class Network(nn.Module):
    """Two layers from factories; by default it knows nothing of quantizers."""

    conv: Any = nn.Conv
    dense: Any = nn.Dense
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        options = {"kernel_init": kernels, "dtype": self.dtype}
        x = self.conv(4, (3, 3), strides=2, use_bias=False, **options)(x)
        return self.dense(5, **options)(nn.relu(x))


def value_and_gradient(model, variables, x):
    return jax.value_and_grad(lambda v: jnp.sum(jnp.sin(model.apply(v, x)).astype(jnp.float32)))(
        variables
    )


def assert_learned(gradient, scalars):
    """Every learned scalar of a params tree has a gradient, and there are as many of them."""
    selected = jax.tree.leaves(is_quantizer_state(gradient))
    found = [g for g, q in zip(jax.tree.leaves(gradient), selected) if q]
    assert len(found) == scalars
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in found)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("uniq", jnp.bfloat16), ("uniq-channel-n2uq", None), ("n2uq-only-weights", None)],
)
def test_a_linen_model_equals_one_of_our_layers(name, dtype):
    weight, activation = METHODS[name]
    methods = {"weight": weight, "activation": activation}
    ours = [
        Network(
            functools.partial(QuantConv, **methods, deterministic=exact),
            functools.partial(QuantDense, **methods, deterministic=exact),
            dtype,
        )
        for exact in (False, True)
    ]
    plain = Network(dtype=dtype)
    theirs = [
        qwix.quantize_model(
            plain, RuleProvider([rules.Rule(".*", weight, activation)], deterministic=exact)
        )
        for exact in (False, True)
    ]
    x = numbers(2, 6, 6, 3)
    variables = jax.jit(theirs[0].init)(jax.random.key(0), x)
    start = calibrate(theirs[0], variables, [x])
    jax.tree.map(np.testing.assert_array_equal, start, calibrate(ours[0], variables, [x]))

    @jax.jit
    def run(variables):
        return [value_and_gradient(model, variables, x) for model in (*theirs, *ours)]

    results = run(start)
    jax.tree.map(np.testing.assert_array_equal, results[:2], results[2:])
    learned = [len(m.parameter_types) for m in METHODS[name] if m is not None]
    assert_learned(results[0][1], 2 * sum(learned))


class Encoder(nn.Module):
    """A transformer's block, of Flax's own attention."""

    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="mlp")(nn.gelu(nn.Dense(8, name="up")(x)))


class Transformer(nn.Module):
    block: Any = Encoder

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(self.block(name="block")(x))


BODY = rules.Rule("block/.*", UniqWeight(2, "channel"), UniqActivation(3, signed=True))


def test_linen_attention_and_remat():
    x = numbers(2, 5, 4)
    plain, remat = (
        qwix.quantize_model(Transformer(block), RuleProvider([BODY]))
        for block in (Encoder, nn.remat(Encoder))
    )
    variables = calibrate(plain, jax.jit(plain.init)(jax.random.key(0), x), [x, 2 * x])
    block = variables["params"]["block"]
    assert block["attention"]["query"]["weight_quantizer"]["step"].shape == (1, 4)
    assert variables["params"]["head"].keys() == {"kernel", "bias"}

    @jax.jit
    def run(variables):
        return [value_and_gradient(model, variables, x) for model in (plain, remat)]

    first, second = run(variables)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), first, second)
    assert_learned(first[1], 6 * 2)


def test_a_dense_general_layer_equals_that_of_nnx():
    x = numbers(3, 2, 4)
    method = {"weight": UniqWeight(3), "activation": UniqActivation(3, signed=True)}
    theirs = qnn.QuantLinearGeneral((2, 4), (3, 2), axis=(1, 2), **method, rngs=nnx.Rngs(0))
    layer = nn.Sequential([nn.DenseGeneral((3, 2), axis=(1, 2))])
    rule = rules.Rule("layers_0", **method)
    for exact in (False, True):
        ours = qwix.quantize_model(layer, RuleProvider([rule], deterministic=exact))
        params = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
        theirs.eval() if exact else theirs.train()
        found = jax.jit(ours.apply)({"params": {"layers_0": params}}, x)
        np.testing.assert_array_equal(found, nnx.jit(lambda m, x: m(x))(theirs, x))


class NnxNetwork(nnx.Module):
    def __init__(self):
        options = {"kernel_init": kernels, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(3, 4, (3, 3), strides=2, **options)
        self.dense = nnx.Linear(4, 5, **options)

    @nnx.remat
    def body(self, x):
        return self.conv(x)

    def __call__(self, x):
        return self.dense(nnx.relu(self.body(x)))


def test_an_nnx_model_equals_one_of_our_layers():
    methods = METHODS["uniq-channel-n2uq"]
    body = [rules.Rule(".*", *methods)]
    plain, x = NnxNetwork(), numbers(2, 6, 6, 3)
    theirs = qwix.quantize_model(plain, RuleProvider(body), x)
    assert type(plain.conv) is nnx.Conv
    ours = quantize(NnxNetwork(), body)
    for model in (theirs, ours):
        qnn.calibrate(model, [x])

    @nnx.jit
    def run(model, x):
        return nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)

    for mode in ("train", "eval"):
        results = []
        for model in (theirs, ours):
            getattr(model, mode)()
            value, gradient = run(model, x)
            results.append((value, nnx.to_pure_dict(gradient)))
        jax.tree.map(np.testing.assert_array_equal, *results)
        assert_learned(results[0][1], 2 * sum(len(m.parameter_types) for m in methods))
    assert isinstance(theirs.dense.weight_quantizer.step, qnn.Step)
    assert len(jax.tree.leaves(nnx.state(theirs, qnn.QuantizerParam))) == 10


class HalfQuantized(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.one = qnn.QuantLinear(4, 4, weight=UniqWeight(8), rngs=rngs)
        self.two = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.two(self.one(x))


def test_a_model_with_quantized_layers_of_its_own_is_an_error():
    provider = RuleProvider([rules.Rule("two", UniqWeight(2))])
    with pytest.raises(ValueError, match="already, at one"):
        qwix.quantize_model(HalfQuantized(nnx.Rngs(0)), provider, numbers(2, 4))


def test_other_rules_for_a_quantized_model_are_an_error():
    layers = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)))
    first, other = (RuleProvider([rules.Rule(".*", UniqWeight(bits))]) for bits in (2, 3))
    model = qwix.quantize_model(layers, first, numbers(2, 4))
    again = qwix.quantize_model(model, first, numbers(2, 4))
    np.testing.assert_array_equal(again(numbers(2, 4)), model(numbers(2, 4)))
    with pytest.raises(ValueError, match="already, at layers"):
        qwix.quantize_model(model, other, numbers(2, 4))


def test_a_rule_that_decides_nothing_is_an_error_that_lists_the_paths():
    def provider(**options):
        return RuleProvider([rules.Rule("nowhere", UniqWeight(2), **options), BODY])

    x = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)
    model = qwix.quantize_model(Transformer(), provider())
    with pytest.raises(ValueError, match=r"path='nowhere' decides .*block/attention/query, .*head"):
        jax.eval_shape(model.init, jax.random.key(0), x)
    jax.eval_shape(
        qwix.quantize_model(Transformer(), provider(optional=True)).init, jax.random.key(0), x
    )
    with pytest.raises(ValueError, match=r"path='nowhere' decides about no layer.*conv, dense"):
        qwix.quantize_model(NnxNetwork(), provider(), numbers(2, 6, 6, 3))


def test_what_cannot_be_quantized():
    with pytest.raises(TypeError, match="must be a list of Rule"):
        RuleProvider([qwix.QuantizationRule(weight_qtype="int8")])  # type: ignore

    def initialize(layer, *shape):
        rule = rules.Rule(".*", *METHODS["uniq"])
        model = qwix.quantize_model(nn.Sequential([layer]), RuleProvider([rule]))
        return jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))

    with pytest.raises(ValueError, match="layers_0: mask must be None"):
        initialize(nn.Conv(6, (3, 3), mask=jnp.ones((3, 3, 4, 6))), 1, 5, 5, 4)
    with pytest.raises(ValueError, match=r"layers_0: batch_dims \(=\(0,\)\) must be \(\)"):
        initialize(nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), 2, 4)


def test_layers_with_a_product_of_their_own_are_left_alone():
    """Ours have one: nothing is quantized twice."""
    rule = rules.Rule(".*", UniqWeight(2), UniqActivation(2), optional=True)
    x = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)
    for conv, dense in (
        (functools.partial(nn.Conv, conv_general_dilated=jax.lax.conv_general_dilated),
         functools.partial(nn.Dense, dot_general_cls=lambda: jax.lax.dot_general)),
        (QuantConv, QuantDense),
    ):  # fmt: skip
        model = qwix.quantize_model(Network(conv, dense), RuleProvider([rule]))
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        assert {path[-1] for path in flatten_dict(params)} == {"kernel", "bias"}


# The pinned release


def reimport(monkeypatch):
    monkeypatch.delitem(sys.modules, "uniq_jax.qwix")
    importlib.import_module("uniq_jax.qwix")


@pytest.mark.parametrize("version", ["0.1.7", "0.1.9", "0.2.0", "1.0", "0.1.9.dev1"])
def test_another_release_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"needs qwix>=0.1.8,<0.1.9; .*\({version} is installed"):
        reimport(monkeypatch)


def test_a_missing_qwix_is_an_error_that_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'uniq_jax\[qwix\]' \(none is installed\)"):
        reimport(monkeypatch)


def test_the_extra_is_pinned_to_the_releases_that_are_accepted():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert extras["qwix"] == ["qwix>=0.1.8,<0.1.9"]
    assert "qwix" in extras["test"][0].removeprefix("uniq_jax[").rstrip("]").split(",")
