"""`quantize` on models of our own and of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from uniq_jax import models, rules
from uniq_jax.nn import (
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    PactActivation,
    QuantConv,
    QuantLinear,
    UniqActivation,
    UniqWeight,
    calibrate,
)
from uniq_jax.quantization import dequantize, quantize
from uniq_jax.rules import Rule

EVERYTHING = [Rule(".*", UniqWeight(2), UniqActivation(2))]
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        # All of one shape: what initializes and quantizes them compiles once.
        self.stem = nnx.Linear(6, 6, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


def flat(model):
    return {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}


def methods(layer):
    if not isinstance(layer, QuantConv | QuantLinear):
        return None
    quantizers = layer.weight_quantizer, layer.activation_quantizer
    return tuple(None if q is None else q.method for q in quantizers)


def test_the_first_matching_rule_decides():
    model = quantize(
        Mlp(nnx.Rngs(0)),
        [
            Rule("stem"),
            Rule("hidden/1", LsqWeight(3), LsqActivation(3)),
            Rule("hidden/.*", N2uqWeight(2), N2uqActivation(2)),
            Rule("head", UniqWeight(8)),
        ],
    )
    assert methods(model.stem) is None
    assert methods(model.hidden[0]) == (N2uqWeight(2), N2uqActivation(2))
    assert methods(model.hidden[1]) == (LsqWeight(3), LsqActivation(3))
    assert methods(model.head) == (UniqWeight(8), None)


def test_a_layer_that_no_rule_matches_stays_float():
    model = quantize(Mlp(nnx.Rngs(0)), [Rule("head", None, PactActivation(4))])
    assert methods(model.head) == (None, PactActivation(4))
    assert {methods(layer) for layer in (model.stem, *model.hidden)} == {None}


@pytest.mark.parametrize("bad", [Rule(".*", UniqWeight(2)), rules.uniq, ["head"], None])
def test_rules_are_a_list_of_rules(bad):
    with pytest.raises(TypeError, match=r"rules \(=.* must be a list of Rule"):
        quantize(Mlp(nnx.Rngs(0)), bad)


def test_a_model_without_values_is_quantized_where_its_shapes_are_found():
    with pytest.raises(TypeError, match=r"^head: kernel is a ShapeDtypeStruct"):
        quantize(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))), EVERYTHING)
    model = nnx.eval_shape(lambda: quantize(Mlp(nnx.Rngs(0)), EVERYTHING))
    assert methods(model.stem) == methods(model.head) == (UniqWeight(2), UniqActivation(2))


def test_a_model_is_one_of_nnx():
    with pytest.raises(TypeError, match=r"model \(a Dense\) .* uniq_jax\.linen"):
        quantize(linen.Dense(3), EVERYTHING)  # type: ignore
    with pytest.raises(TypeError, match=r"model \(a Dense\) .* uniq_jax\.linen\.calibrate"):
        calibrate(linen.Dense(3), [X])  # type: ignore


@pytest.mark.parametrize(
    "bad",
    [
        [*EVERYTHING, Rule("head", UniqWeight(8))],  # shadowed
        [Rule("nothing", UniqWeight(8)), *EVERYTHING],
        [Rule("tem|ead", UniqWeight(8)), *EVERYTHING],
    ],
)
def test_a_rule_that_decides_about_nothing_is_an_error_and_changes_nothing(bad):
    model = Mlp(nnx.Rngs(0))
    (pattern,) = (rule.path for rule in bad if rule.path != ".*")
    with pytest.raises(ValueError, match="no layer") as error:
        quantize(model, bad)
    assert f"path={pattern!r}" in str(error.value)
    assert "hidden/0, hidden/1" in str(error.value)
    assert "stem" in str(error.value)
    assert {methods(layer) for layer in (model.stem, *model.hidden, model.head)} == {None}
    optional = [Rule(r.path, r.weight, r.activation, optional=True) for r in bad]
    quantize(model, optional)
    assert methods(model.head) == (UniqWeight(2), UniqActivation(2))


def test_parameters_are_the_same_objects_at_the_same_paths():
    model = Mlp(nnx.Rngs(0))
    before = flat(model)
    kernel, bias = model.stem.kernel, model.stem.bias
    assert quantize(model, EVERYTHING) is model
    assert model.stem.kernel is kernel
    assert model.stem.bias is bias
    after = flat(model)
    assert after.keys() - before.keys() == {
        f"{layer}/{kind}_quantizer/step"
        for layer in ("stem", "hidden/0", "hidden/1", "head")
        for kind in ("weight", "activation")
    }
    for path, variable in before.items():
        np.testing.assert_array_equal(after[path][...], variable[...])


def test_weight_steps_start_from_the_present_kernel():
    model = Mlp(nnx.Rngs(0))
    model.stem.kernel[...] = model.stem.kernel[...] * 7
    quantize(model, [Rule(".*", UniqWeight(2, "channel"))])
    wanted = UniqWeight(2, "channel").initial(model.stem.kernel[...], -1)["step"]
    np.testing.assert_array_equal(model.stem.weight_quantizer.step[...], wanted)


def test_a_second_time_is_an_error():
    model = quantize(Mlp(nnx.Rngs(0)), [Rule("head", UniqWeight(2))])
    with pytest.raises(ValueError, match="quantized already, at head"):
        quantize(model, EVERYTHING)


def test_models_without_layers_and_layers_without_model():
    with pytest.raises(ValueError, match=r"\(no nnx\.Conv, nnx\.Linear, .*Einsum\)"):
        quantize(nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), EVERYTHING)
    with pytest.raises(ValueError, match=r"not be one \(a Linear\).*nnx\.Sequential"):
        quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), EVERYTHING)
    # Not even an optional rule makes a model of nothing.
    with pytest.raises(ValueError, match="no nnx"):
        quantize(nnx.Sequential(nnx.relu), [])


class Containers(nnx.Module):
    """A layer in every place that can hold one."""

    def __init__(self, rngs, *, with_tuple=False):
        def make():
            return nnx.Linear(6, 6, rngs=rngs)

        self.attribute = make()
        self.list = nnx.List([make(), nnx.List([make()])])
        self.dict = nnx.Dict({"key": make(), "list": nnx.List([make()])})
        self.plain = nnx.data({"key": make(), "list": [make()]})
        self.sequential = nnx.Sequential(make(), nnx.relu, nnx.Sequential(make()))
        if with_tuple:
            self.tuple = nnx.data((make(),))

    @property
    def layers(self):
        outer, inner = self.sequential.layers[0], self.sequential.layers[2].layers[0]
        return {
            "attribute": self.attribute,
            "list/0": self.list[0],
            "list/1/0": self.list[1][0],
            "dict/key": self.dict["key"],
            "dict/list/0": self.dict["list"][0],
            "plain/key": self.plain["key"],
            "plain/list/0": self.plain["list"][0],
            "sequential/layers/0": outer,
            "sequential/layers/2/layers/0": inner,
        }

    def __call__(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_layers_in_every_kind_of_container():
    names = Containers(nnx.Rngs(0)).layers.keys()
    for name in names:
        model = quantize(Containers(nnx.Rngs(0)), [Rule(name, UniqWeight(2))])
        for path, layer in model.layers.items():
            assert (methods(layer) is not None) == (path == name)
    model = quantize(Containers(nnx.Rngs(0)), EVERYTHING)
    assert all(methods(layer) for layer in model.layers.values())
    assert model.sequential.layers[1] is nnx.relu
    graphdef, state = nnx.split(model)
    np.testing.assert_allclose(nnx.merge(graphdef, state)(X), model(X), atol=1e-6)


def test_a_layer_in_a_tuple_is_an_error_and_nothing_changes():
    model = Containers(nnx.Rngs(0), with_tuple=True)
    with pytest.raises(ValueError, match=r"tuple/0 lies in a tuple.*nnx\.List"):
        quantize(model, EVERYTHING)
    assert {methods(layer) for layer in model.layers.values()} == {None}
    quantize(model, [Rule("tuple/0"), *EVERYTHING])
    assert methods(model.attribute) is not None


class Shared(nnx.Module):
    """One layer in three places, and a kernel that two layers share."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.again = self.first
        self.list = nnx.List([nnx.Linear(6, 6, rngs=rngs), self.first])
        self.tied = nnx.Linear(6, 6, rngs=rngs)
        self.tied.kernel = self.list[0].kernel

    def __call__(self, x):
        for layer in (self.first, self.list[0], self.again, self.tied, self.list[1]):
            x = layer(x)
        return x


def test_a_shared_layer_becomes_one_shared_layer():
    model = quantize(Shared(nnx.Rngs(0)), EVERYTHING)
    assert isinstance(model.first, QuantLinear)
    assert model.first is model.again is model.list[1]
    assert model.tied.kernel is model.list[0].kernel
    assert model.tied.weight_quantizer is not model.list[0].weight_quantizer
    assert sum("weight_quantizer" in path for path in flat(model)) == 3
    gradient = nnx.jit(nnx.grad(lambda m: jnp.sum(m(X) ** 2)))(model)
    assert len(nnx.to_flat_state(gradient)) == len(flat(model))
    calibrate(model, [X])
    clone = nnx.clone(model)
    assert clone.first is clone.again is clone.list[1]
    np.testing.assert_allclose(clone(X), model(X), atol=1e-6)


def test_a_layer_with_functions_of_its_own_is_an_error():
    def conv(*args, **kwargs):
        return jax.lax.conv_general_dilated(*args, **kwargs)

    def build():
        return nnx.Sequential(
            nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            nnx.Conv(2, 2, (1,), conv_general_dilated=conv, rngs=nnx.Rngs(0)),
        )

    model = build()
    with pytest.raises(TypeError, match=r"^layers/1: conv_general_dilated .* must be left out"):
        quantize(model, EVERYTHING)
    assert methods(model.layers[0]) is None
    quantize(model, [Rule("layers/1"), *EVERYTHING])
    assert methods(model.layers[0]) is not None


def test_an_accumulator_that_is_too_narrow_names_the_layer():
    model = nnx.Sequential(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        nnx.Linear(40_000, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)),
    )
    with pytest.raises(ValueError, match=r"^layers/1: 40000 products of 8-bit"):
        quantize(model, [Rule(".*", UniqWeight(8), UniqActivation(8))])
    assert methods(model.layers[0]) is None


class Small(nnx.Linear):
    """Adds a constructor, and a private method for it."""

    def __init__(self, features, rngs):
        super().__init__(features, features, kernel_init=self._init(), rngs=rngs)
        self.remark = "small"

    def _init(self):
        return nnx.initializers.normal(0.1)


class Tanh(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return jnp.tanh(super().__call__(inputs))


class Mixin:
    def penalty(self):
        return 0


class Penalized(Mixin, nnx.Linear):
    pass


def test_a_subclass_that_adds_a_constructor_is_replaced():
    model = nnx.Sequential(Small(6, nnx.Rngs(0)))
    wanted = model(X)
    quantize(model, EVERYTHING)
    assert type(model.layers[0]) is QuantLinear
    assert model.layers[0].remark == "small"
    dequantize(model)
    assert type(model.layers[0]) is Small
    np.testing.assert_array_equal(model(X), wanted)


@pytest.mark.parametrize(("kind", "name"), [(Tanh, "__call__"), (Penalized, "penalty")])
def test_a_subclass_with_a_call_of_its_own_is_an_error_and_not_passed_over(kind, name):
    """What somebody else's call does, a quantized layer cannot know."""

    def build():
        return nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), kind(6, 6, rngs=nnx.Rngs(0)))

    model = build()
    message = rf"^layers/1: {kind.__name__} is a subclass of nnx.Linear with {name} .*'layers/1'"
    with pytest.raises(TypeError, match=message):
        quantize(model, EVERYTHING)
    assert methods(model.layers[0]) is None
    # As the message says.
    quantize(model, [Rule("layers/1"), *EVERYTHING])
    assert [type(layer) for layer in model.layers] == [QuantLinear, kind]
    model = quantize(build(), [Rule("layers/0", UniqWeight(2))])
    assert type(model.layers[1]) is kind
    with pytest.raises(ValueError, match=rf"not be one \(a {kind.__name__}\)"):
        quantize(build().layers[1], EVERYTHING)


CONV_OPTIONS = {
    "strides": (2, 1),
    "padding": [(1, 0), (2, 1)],
    "input_dilation": (1, 2),
    "kernel_dilation": (1, 2),
    "feature_group_count": 2,
    "use_bias": False,
    "mask": jnp.ones((3, 2, 2, 4)),
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.float16,
    "precision": jax.lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
}


@pytest.mark.parametrize("name", CONV_OPTIONS)
def test_every_option_of_a_convolution_is_kept(name):
    options = {"padding": 1, name: CONV_OPTIONS[name]}
    layer = nnx.Conv(4, 4, (3, 2), rngs=nnx.Rngs(0), **{"feature_group_count": 2, **options})
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7, 4)), jnp.float32)
    wanted = layer(x)
    # A rule that quantizes, whose quantizers are then taken away again.
    model = quantize(nnx.Sequential(layer), [Rule(".*", None, UniqActivation(2))])
    quantized = model.layers[0]
    assert isinstance(quantized, QuantConv)
    assert np.any(quantized(x) != wanted)
    quantized.activation_quantizer = None
    np.testing.assert_array_equal(quantized(x), wanted)
    assert quantized(x).dtype == wanted.dtype
    assert all(
        vars(quantized)[key] is vars(layer)[key] or vars(quantized)[key] == vars(layer)[key]
        for key in CONV_OPTIONS
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_bias": False},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.float16},
        {"precision": jax.lax.Precision.HIGHEST},
        {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32},
    ],
)
def test_every_option_of_a_linear_layer_is_kept(options):
    layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0), **options)
    wanted = layer(X)
    quantized = quantize(nnx.Sequential(layer), [Rule(".*", UniqWeight(2))]).layers[0]
    assert np.any(quantized(X) != wanted)
    quantized.weight_quantizer = None
    np.testing.assert_array_equal(quantized(X), wanted)
    assert quantized(X).dtype == wanted.dtype
    for key in ("use_bias", "dtype", "param_dtype", "precision", "preferred_element_type"):
        assert getattr(quantized, key) == getattr(layer, key)


def test_metadata_of_parameters_is_kept():
    """Shardings by name, for example."""
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)))
    model.layers[0].kernel.set_metadata(belongs_to="left")
    names = dict(model.layers[0].kernel.get_metadata())
    assert names["belongs_to"] == "left"
    quantize(model, EVERYTHING)
    assert model.layers[0].kernel.get_metadata() == names


def test_a_foreign_mlp_from_float_to_two_bits():
    model = Mlp(nnx.Rngs(0))
    wanted = model(X)
    quantize(model, rules.uniq(2))
    assert methods(model.stem) == (UniqWeight(8), UniqActivation(8, signed=True))
    assert methods(model.head) == (UniqWeight(8), UniqActivation(8))
    assert methods(model.hidden[0]) == (UniqWeight(2), UniqActivation(2))
    calibrate(model, [X])
    trained = model(X)
    assert np.corrcoef(np.ravel(trained), np.ravel(wanted))[0, 1] > 0.5
    model.eval()
    np.testing.assert_allclose(model(X), trained, atol=1e-5)


def test_a_foreign_cnn_of_eight_bits_is_nearly_the_float_one():

    def numbers(key, shape, dtype):
        return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 8, (3, 3), kernel_init=numbers, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.relu,
        lambda x: nnx.max_pool(x, (2, 2), (2, 2)),
        nnx.Conv(8, 8, (3, 3), strides=2, kernel_init=numbers, rngs=rngs),
        nnx.relu,
        lambda x: x.reshape(len(x), -1),
        nnx.Linear(32, 10, kernel_init=numbers, rngs=rngs),
    )
    model.eval()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 3)), jnp.float32)
    call = nnx.jit(lambda model, x: model(x))
    wanted = np.asarray(call(model, x))
    eight = rules.uniq(8, first="layers/0", last="layers/7")
    quantize(model, eight)
    calibrate(model, [x])
    model.eval()
    assert np.abs(call(model, x) - wanted).max() < 0.05 * np.abs(wanted).max()


def test_quantize_needs_no_values():
    """Under eval_shape and jit, where shapes and shardings come from."""

    def build():
        return nnx.state(quantize(Mlp(nnx.Rngs(0)), rules.uniq(2)))

    shapes = jax.eval_shape(build)
    values = build()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), values
    )
    for jitted, eager in zip(jax.tree.leaves(jax.jit(build)()), jax.tree.leaves(values)):
        np.testing.assert_allclose(jitted, eager, rtol=1e-5)


def test_the_networks_take_every_method():
    for weight, activation in (
        (UniqWeight(2, "channel"), UniqActivation(2, signed=True)),
        (N2uqWeight(2), N2uqActivation(2)),
        (LsqWeight(2), PactActivation(2)),
    ):

        def shapes(weight=weight, activation=activation):
            model = models.CifarResNet(8, num_classes=3, shortcut="B", rngs=nnx.Rngs(0))
            quantize(model, [Rule(".*", weight, activation)])
            outputs = model(jnp.zeros((2, 8, 8, 3)))
            model.eval()
            return outputs, model(jnp.zeros((2, 8, 8, 3)))

        trained, evaluated = jax.eval_shape(shapes)
        assert trained.shape == evaluated.shape == (2, 3)


class Modes(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, rngs=rngs)


def test_new_layers_are_in_the_models_mode():
    def mode_of(change):
        model = Modes(nnx.Rngs(0))
        change(model)
        return quantize(model, [Rule("linear", UniqWeight(2))]).linear.deterministic

    assert mode_of(lambda model: model.eval()) is True
    assert mode_of(lambda model: model.train()) is False
    assert mode_of(lambda model: None) is False
    # Frozen statistics alone don't make an evaluation.
    assert mode_of(lambda model: model.norm.eval()) is False

    def without_dropout(model):
        model.norm.eval()
        del model.dropout

    assert mode_of(without_dropout) is True
    model = Mlp(nnx.Rngs(0))
    model.eval()  # Nothing in it has a mode.
    assert quantize(model, EVERYTHING).stem.deterministic is False


@pytest.mark.parametrize("build", [Containers, Shared, Modes])
def test_dequantize_undoes_quantize(build):
    model = build(nnx.Rngs(0))
    graphdef, before = nnx.graphdef(model), flat(model)
    for _ in range(2):
        quantize(model, EVERYTHING)
        assert nnx.graphdef(model) != graphdef
        assert dequantize(model) is model
        assert nnx.graphdef(model) == graphdef
        after = flat(model)
        assert after.keys() == before.keys()
    variables = {id(v) for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}
    fresh = build(nnx.Rngs(0))
    kept = {id(v) for _, v in nnx.iter_graph(quantize(fresh, EVERYTHING)) if type(v) is nnx.Param}
    dequantize(fresh)
    assert kept == {id(v) for _, v in nnx.iter_graph(fresh) if isinstance(v, nnx.Param)}
    assert len(kept) == len(variables)


def test_dequantize_puts_trained_parameters_into_the_float_network():
    model = quantize(Shared(nnx.Rngs(0)), EVERYTHING)
    model.first.kernel[...] = model.first.kernel[...] * 2
    # Split and merged meanwhile, as a training loop does.
    model = dequantize(nnx.merge(*nnx.split(model)))
    assert type(model.first) is nnx.Linear
    assert model.first is model.again is model.list[1]
    assert model.tied.kernel is model.list[0].kernel
    wanted = Shared(nnx.Rngs(0))
    wanted.first.kernel[...] = wanted.first.kernel[...] * 2
    np.testing.assert_array_equal(model(X), wanted(X))


def test_dequantize_makes_layers_float_that_never_were():
    model = nnx.Sequential(QuantConv(2, 3, (2,), weight=UniqWeight(2), rngs=nnx.Rngs(0)))
    dequantize(model)
    float_model = nnx.Sequential(nnx.Conv(2, 3, (2,), rngs=nnx.Rngs(0)))
    assert nnx.graphdef(model) == nnx.graphdef(float_model)


def test_errors_of_dequantize():
    with pytest.raises(ValueError, match="no quantized layer"):
        dequantize(Mlp(nnx.Rngs(0)))
    layer = QuantLinear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"not be one \(a QuantLinear\).*to_float"):
        dequantize(layer)
    model = nnx.Sequential(layer)
    model.tuple = nnx.data((QuantLinear(2, 3, rngs=nnx.Rngs(0)),))
    with pytest.raises(ValueError, match="tuple/0 lies in a tuple"):
        dequantize(model)
    assert model.layers[0] is layer
