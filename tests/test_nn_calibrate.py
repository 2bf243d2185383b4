"""Calibration: initial quantizer parameters from weights and data, and nothing else changed."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import quantizers, rules
from uniq_jax.nn import (
    ActivationQuantizer,
    LsqActivation,
    LsqWeight,
    N2uqActivation,
    N2uqWeight,
    PactActivation,
    QuantLinear,
    UniqActivation,
    UniqWeight,
    calibrate,
)
from uniq_jax.quantization import quantize


class Network(nnx.Module):
    """Two layers with batch norm, dropout, and a quantizer that no layer owns."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.own = ActivationQuantizer(UniqActivation(2))
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.second(self.dropout(self.own(x)))


UNIQ_WEIGHT, UNIQ_ACTIVATION = UniqWeight(2), UniqActivation(2)


def network(weight=UNIQ_WEIGHT, activation=UNIQ_ACTIVATION):
    return quantize(Network(nnx.Rngs(0)), [rules.Rule(".*", weight, activation)])


def batches(count=3, seed=0, size=16):
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.5, 2, count)
    return [jnp.asarray(rng.normal(scale=scale, size=(size, 4)), jnp.float32) for scale in sizes]


def arrays(model):
    return {
        "/".join(map(str, path)): np.asarray(v[...])
        for path, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngKey)))
    }


def float_activations(x):
    """What arrives at `second` (and `own`) in the float network, in evaluation mode."""
    return _float_activations(Network(nnx.Rngs(0)), x)


@nnx.jit
def _float_activations(model, x):
    model.eval()
    return nnx.relu(model.norm(model.first(x)))


@nnx.jit
def call(model, x):
    return model(x)


STATISTICS = {
    UniqActivation(3): lambda x: quantizers.uniq_activation_initial_step(x, bits=3),
    UniqActivation(8, signed=True): lambda x: quantizers.uniq_activation_fitted_step(
        x, bits=8, signed=True
    ),
    LsqActivation(2): lambda x: quantizers.lsq_initial_step(x, bits=2, signed=False),
    LsqActivation(4, signed=True): lambda x: quantizers.lsq_initial_step(x, bits=4, signed=True),
    PactActivation(2): lambda x: quantizers.pact_initial_clip(x, bits=2),
}


@pytest.mark.parametrize("method", STATISTICS, ids=str)
def test_activations_start_from_the_largest_statistic_of_the_float_network(method):
    model = network(activation=method)
    data = batches()
    assert calibrate(model, data) == 3
    (name,) = method.parameter_types
    for layer, inputs in (
        (model.first, data),
        (model.second, [float_activations(x) for x in data]),
    ):
        statistics = [float(STATISTICS[method](x)) for x in inputs]
        assert len(set(statistics)) == 3
        found = float(getattr(layer.activation_quantizer, name)[...])
        np.testing.assert_allclose(found, max(statistics), rtol=1e-6)
    own = [
        float(quantizers.uniq_activation_initial_step(x, bits=2))
        for x in map(float_activations, data)
    ]
    np.testing.assert_allclose(model.own.step[...], max(own), rtol=1e-6)


def test_the_order_of_batches_and_of_passes_does_not_matter():
    data = batches(4)
    models = [network() for _ in range(3)]
    calibrate(models[0], data)
    calibrate(models[1], reversed(data))
    # A second calibration starts anew and not from the first one's steps.
    calibrate(models[2], [x * 100 for x in data])
    calibrate(models[2], iter(data))
    for other in models[1:]:
        for path, array in arrays(models[0]).items():
            np.testing.assert_array_equal(arrays(other)[path], array, err_msg=path)


@pytest.mark.parametrize("method", [UniqWeight(2), None])
def test_no_weight_quantizer_is_active_meanwhile(method):
    """Not even that of a layer without an activation quantizer, on the way to one that has it."""
    model = quantize(
        Network(nnx.Rngs(0)),
        [rules.Rule("first", method), rules.Rule("second", None, UniqActivation(2))],
    )
    data = batches()
    calibrate(model, data)
    statistics = [
        quantizers.uniq_activation_initial_step(float_activations(x), bits=2) for x in data
    ]
    np.testing.assert_allclose(
        model.second.activation_quantizer.step[...], max(statistics), rtol=1e-6
    )


def test_only_quantizer_parameters_change():
    model = network()
    before = arrays(model)
    calibrate(model, batches())
    after = arrays(model)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert before.keys() == after.keys()
    assert changed == {
        "first/activation_quantizer/step",
        "second/activation_quantizer/step",
        "own/step",
    }
    # The test can see drift: training mode moves the statistics and the dropout's counter.
    call(model, batches()[0])
    drifted = arrays(model)
    assert np.any(drifted["norm/mean"] != after["norm/mean"])
    assert drifted["dropout/rngs/count"] != after["dropout/rngs/count"]


def modes(model):
    return {
        (path, name): getattr(module, name)
        for path, module in nnx.iter_modules(model)
        for name in ("deterministic", "use_running_average", "calibrating")
        if hasattr(module, name)
    }


def test_modes_come_back_module_by_module():
    model = network()
    model.eval()
    model.first.train()
    model.dropout.train()
    before = modes(model)
    assert set(before.values()) == {True, False}
    calibrate(model, batches())
    assert modes(model) == before


class Failure(BaseException):
    pass


def test_an_exception_changes_nothing():
    model = network()
    model.norm.eval()
    model.first.kernel[...] = model.first.kernel[...] * 3
    before, before_modes = arrays(model), modes(model)
    outputs = model(batches()[0])
    count = int(model.dropout.rngs.count[...])

    def interrupted():
        yield batches()[0]
        raise Failure

    def fails(model, batch):
        model(batch)
        raise Failure

    def check(error, data, **options):
        with pytest.raises(error[0], match=error[1]):
            calibrate(model, data, **options)
        model.dropout.rngs.count[...] = jnp.asarray(count - 1, jnp.uint32)
        found = arrays(model)
        assert found.keys() == before.keys()
        for path, array in before.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
        assert modes(model) == before_modes
        np.testing.assert_array_equal(model(batches()[0]), outputs)

    check((Failure, None), interrupted())
    check((Failure, None), batches(), apply=fails)
    check((ValueError, "batches is empty"), [])
    nan = batches()[0].at[0, 0].set(jnp.nan)
    check((ValueError, "nan or infinite.*first/activation_quantizer"), [*batches(), nan, nan * 0])
    infinite = batches()[0].at[0, 0].set(jnp.inf)
    check((ValueError, "nan or infinite"), [infinite])


def test_errors():
    with pytest.raises(ValueError, match="no quantized layer"):
        calibrate(Network(nnx.Rngs(0)), batches())
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(network(), iter(()))
    for array in (batches()[0], np.asarray(batches()[0])):
        with pytest.raises(TypeError, match=r"not one array .*write \[array\]"):
            calibrate(network(), array)


def test_weights_alone_need_no_batches_and_start_from_the_present_kernel():
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    quantize(model, [rules.Rule(".*", UniqWeight(2))])
    first, second = model.layers
    first.kernel[...] = first.kernel[...] * 5
    assert calibrate(model, []) == 0
    for layer in (first, second):
        wanted = quantizers.uniq_weight_initial_step(layer.kernel[...], bits=2)
        assert layer.weight_quantizer.step[...] == wanted


@pytest.mark.parametrize(
    ("method", "initial"),
    [
        (
            UniqWeight(3, "channel"),
            lambda w: quantizers.uniq_weight_initial_step(w, bits=3, channel_axis=-1),
        ),
        (LsqWeight(4), lambda w: quantizers.lsq_initial_step(w, bits=4)),
    ],
    ids=["uniq", "lsq"],
)
def test_weight_steps_start_anew_from_a_loaded_kernel(method, initial):
    model = network(method, UniqActivation(2))
    model.second.kernel[...] = jnp.asarray(
        np.random.default_rng(1).normal(size=(8, 3)), jnp.float32
    )
    stale = np.asarray(model.second.weight_quantizer.step[...])
    calibrate(model, batches(1))
    found = np.asarray(model.second.weight_quantizer.step[...])
    np.testing.assert_array_equal(found, initial(model.second.kernel[...]))
    assert np.any(found != stale)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_n2uq_starts_as_the_uniform_quantizer_of_uniq(bits):
    thresholds, uniform = (
        network(N2uqWeight(2), N2uqActivation(bits)),
        network(N2uqWeight(2), UniqActivation(bits)),
    )
    data = batches()
    calibrate(thresholds, data)
    calibrate(uniform, data)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(50, 4)), jnp.float32)
    found = thresholds.first.activation_quantizer.encode(x)
    wanted = uniform.first.activation_quantizer.encode(x)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-6)
    thresholds.eval()
    uniform.eval()
    np.testing.assert_allclose(call(thresholds, x), call(uniform, x), rtol=1e-5, atol=1e-5)


def test_equal_shapes_compile_once():
    traces = []

    def apply(model, batch):
        traces.append(batch["x"].shape)
        return model(batch["x"])

    data = [{"x": x} for x in batches(4)]
    calibrate(network(), [*data, {"x": data[0]["x"][:5]}], apply=apply)
    assert traces == [(16, 4), (5, 4)]


def test_a_quantizer_that_nothing_reaches_keeps_its_start():
    model = network()
    calibrate(model, batches(), apply=lambda model, x: model.first(x))
    fresh = network()
    assert (
        model.second.activation_quantizer.step[...] == fresh.second.activation_quantizer.step[...]
    )
    assert model.first.activation_quantizer.step[...] != fresh.first.activation_quantizer.step[...]


def test_float64_keeps_its_digits():
    with jax.enable_x64(True):
        layer = QuantLinear(
            4,
            2,
            weight=UniqWeight(2),
            activation=UniqActivation(2),
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)))
        calibrate(layer, [x])
        wanted = quantizers.uniq_activation_initial_step(x, bits=2)
        np.testing.assert_allclose(layer.activation_quantizer.step[...], wanted, rtol=1e-15)


def test_uncalibrated_steps_are_those_of_a_unit_normal():
    x = np.random.default_rng(0).normal(size=200_000)
    for method in (*STATISTICS, N2uqActivation(3)):
        start = method.initial()
        signed = getattr(method, "signed", False)
        inputs = jnp.asarray(x if signed else np.maximum(x, 0), jnp.float32)
        if isinstance(method, N2uqActivation):
            np.testing.assert_allclose(start["intervals"], 2 / 7)
        elif isinstance(method, LsqActivation):
            wanted = quantizers.optimal_step(
                method.bits, "normal" if signed else "rectified_normal"
            )
            np.testing.assert_allclose(start["step"], wanted, rtol=1e-6)
        else:
            ((name, wanted),) = method.from_statistic(method.statistic(inputs)).items()
            np.testing.assert_allclose(start[name], wanted, rtol=0.02)


MESH = """
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from uniq_jax import nn, rules
    from uniq_jax.quantization import quantize

    def build():
        def numbers(key, shape, dtype):
            return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)

        options = {"kernel_init": numbers, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        model = nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), strides=2, **options),
            nnx.relu,
            nnx.Conv(4, 4, (3, 3), **options),
            lambda x: x.mean((1, 2)),
            nnx.Linear(4, 3, **options),
        )
        return quantize(model, rules.uniq_n2uq(2, first="layers/0", last="layers/4"))

    def steps(model):
        flat = nnx.to_flat_state(nnx.state(model, nn.QuantizerParam))
        return {"/".join(map(str, p)): np.asarray(v[...]) for p, v in flat}

    assert len(jax.devices()) == 4
    rng = np.random.default_rng(0)
    data = [rng.normal(scale=s, size=(8, 8, 8, 3)) for s in (1.0, 2.0, 0.5)]
    alone, sharded = build(), build()
    nn.calibrate(alone, map(jnp.asarray, data))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    placed = NamedSharding(mesh, P("data"))
    graphdef, state = nnx.split(sharded)
    sharded = nnx.merge(graphdef, jax.device_put(state, NamedSharding(mesh, P())))
    batches = [jax.device_put(x, placed) for x in data]
    assert len(batches[0].addressable_shards) == 4
    nn.calibrate(sharded, batches)
    fresh, wanted, found = steps(build()), steps(alone), steps(sharded)
    assert wanted.keys() == found.keys()
    for path in wanted:
        assert found[path].dtype == np.float64, path
        np.testing.assert_allclose(found[path], wanted[path], rtol=1e-12, err_msg=path)
    assert any(np.any(fresh[path] != wanted[path]) for path in wanted)
    print("checked", len(wanted))
"""


def test_batches_that_lie_on_four_devices_calibrate_as_on_one():
    environment = {
        "PATH": "/usr/bin:/bin",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MESH)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("checked")
