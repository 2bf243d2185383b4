"""What is counted in each layer, against NumPy, the step itself, and other devices."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uniq_jax import nn
from uniq_jax.spec import LossSpec
from uniq_jax.train import layer_metrics, layer_summary
from uniq_jax.train.network import Network, split
from uniq_jax.train.state import Program, TrainState
from uniq_jax.train.step import train_step

METHODS = {
    "ends": (nn.UniqWeight(8), nn.UniqActivation(8, signed=True)),
    "uniq": (nn.UniqWeight(2, granularity="channel"), nn.UniqActivation(2)),
    "n2uq": (nn.N2uqWeight(3), nn.N2uqActivation(2)),
    "binary": (nn.UniqWeight(1), nn.N2uqActivation(1)),
    "lsq": (nn.LsqWeight(4), nn.LsqActivation(3, signed=True)),
    "pact": (None, nn.PactActivation(4)),
    "weights": (nn.UniqWeight(5), None),
}


class Net(nnx.Module):
    """A dense layer for each pair of methods, and a float one at the end."""

    def __init__(self, names, dtype):
        options = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
        self.names = tuple(names)
        for name in names:
            weight, activation = METHODS[name]
            layer = nn.QuantLinear(16, 16, weight=weight, activation=activation, **options)
            setattr(self, name, layer)
        self.last = nnx.Linear(16, 10, **options)

    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.last(x)


LOSS = LossSpec(
    label_smoothing=0.0,
    mixup_alpha=0.0,
    teacher="",
    teacher_model="",
    teacher_options={},
    teacher_weight=1.0,
    teacher_temperature=1.0,
)


def make_model(names=tuple(METHODS), dtype="float32"):
    return nnx.jit(lambda: Net(names, jnp.dtype(dtype)))()


def make_program(model, learning_rate=0.5, dtype="float32"):
    return Program(
        network=Network.of(model),
        mean=(128.0,),
        std=(64.0,),
        dtype=jnp.dtype(dtype),
        optimizer=optax.sgd(learning_rate),
        rate=optax.constant_schedule(learning_rate),
        loss=LOSS,
        ema_decay=0.0,
        seed=0,
    )


def make_state(program, model):
    params, statistics = split(model)
    opt_state = program.optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, statistics, opt_state)


@pytest.fixture(scope="module")
def measured():
    """A model, its state before and after a step, its inputs by layer, and what is measured."""
    model = make_model()
    # Large: clipped values, dead levels and flips are to occur.
    for name in METHODS:
        layer = getattr(model, name)
        layer.kernel[...] = 1.5 * layer.kernel[...].at[:, 0].set(0.0)
    model.n2uq.activation_quantizer.intervals[...] = jnp.array([0.4, 0.9, 0.2])
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (24, 4, 4, 1)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 10, 24), jnp.int32),
    }
    program = make_program(model)
    state = make_state(program, model)

    def loss_of(params):
        model = program.build(params, {})
        model.train()
        x = program.normalize(batch["image"]).reshape(24, -1)
        inputs = {}
        for name in METHODS:
            inputs[name] = x
            x = getattr(model, name)(x)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            model.last(x), batch["label"]
        )
        return losses.mean(), inputs

    @jax.jit
    def everything(state):
        after, _ = train_step(program, state, batch)
        gradients, inputs = jax.grad(loss_of, has_aux=True)(state.params)
        return after.params, inputs, gradients, layer_metrics.measure(program, state, batch)

    after, *others = everything(state)
    return model, program.build(after, {}), *jax.tree.map(np.asarray, others)


def test_every_quantized_layer_is_measured_and_no_other(measured):
    *_, found = measured
    assert sorted(found) == sorted(METHODS)
    assert "weight_codes" not in found["pact"]
    assert "input_codes" not in found["weights"]


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_numpy(measured, name):
    model, later, inputs, _, found = measured
    layer, found = getattr(model, name), found[name]
    parts = []
    if layer.weight_quantizer is not None:
        kernel = layer.kernel[...]
        codes, scale, offset = layer.weight_quantizer.encode(kernel)
        last = layer.weight_quantizer.method.grid.max_code - offset
        in_steps = np.asarray(kernel) / np.where(scale == 0, 1, scale)
        parts.append(("weight", codes, in_steps, -offset, last))
        new = getattr(later, name)
        flipped = np.sum(np.asarray(codes) != new.weight_quantizer.encode(new.kernel[...]).codes)
        assert found["weight_flipped"] == flipped
        np.testing.assert_array_equal(found["weight_step"], np.ravel(scale))
    if layer.activation_quantizer is not None:
        x = inputs[name]
        encoded = layer.activation_quantizer.encode(x)
        edges = np.asarray(found["input_edges"])
        if name == "n2uq":
            stops = np.cumsum([0.0, 0.4, 0.9, 0.2], dtype=np.float32)
            np.testing.assert_allclose(edges, stops / 1.0, rtol=1e-6)
        elif name == "pact":
            clip = float(layer.activation_quantizer.clip[...])
            np.testing.assert_allclose(edges, np.linspace(0, clip, 16), rtol=1e-5)
        parts.append(("input", encoded.codes, x, edges.min(), edges.max()))
    for what, codes, values, low, high in parts:
        method = getattr(
            layer, "weight_quantizer" if what == "weight" else "activation_quantizer"
        ).method
        tally = np.bincount(np.ravel(codes), minlength=2**method.bits)
        np.testing.assert_array_equal(found[f"{what}_codes"], tally)
        clipped = [np.sum(values < low), np.sum(values > high)]
        np.testing.assert_array_equal(found[f"{what}_clipped"], clipped)
        start, end = layer_metrics.histogram_range(low, high, method.bits)
        edges = np.linspace(start, end, layer_metrics.HISTOGRAM_BINS + 1)
        expected, _ = np.histogram(np.clip(values, start, end), edges)
        histogram = found[f"{what}_histogram"]
        assert histogram.sum() == values.size
        # A value on an edge may fall on either side of it.
        difference = np.cumsum(histogram) - np.cumsum(expected)
        assert np.abs(difference).max() <= 0.02 * values.size


def test_there_is_something_to_count(measured):
    """Or the comparison with NumPy would hold of zeros."""
    *_, found = measured
    assert sum(int(layer.get("weight_flipped", 0)) for layer in found.values()) > 0
    for what in ("weight", "input"):
        clipped = sum(
            layer[f"{what}_clipped"] for layer in found.values() if f"{what}_codes" in layer
        )
        assert clipped.min() > 0
    numbers = {name: layer_summary.layer_numbers(layer) for name, layer in found.items()}
    assert numbers["ends"]["weight_dead_levels"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_loss(measured, name):
    model, _, _, gradients, found = measured
    layer = getattr(model, name)
    for kind, prefix in (("weight", "weight"), ("activation", "input")):
        quantizer = getattr(layer, f"{kind}_quantizer")
        for parameter in quantizer.parameters if quantizer is not None else ():
            gradient = gradients[f"{name}/{kind}_quantizer/{parameter}"]
            norm = found[name]["gradients"][f"{prefix}_{parameter}"]
            np.testing.assert_allclose(norm, np.linalg.norm(gradient), rtol=1e-4, atol=1e-7)
            value = found[name]["parameters"][f"{prefix}_{parameter}"]
            np.testing.assert_array_equal(value, quantizer.parameters[parameter])


def test_numbers_say_what_the_counts_say():
    found = {
        "weight_codes": np.array([4, 4, 0, 0]),
        "weight_clipped": np.array([1, 2]),
        "weight_flipped": np.array(2),
        "weight_step": np.array([0.5, 1.5]),
        "input_codes": np.array([3, 1]),
        "input_clipped": np.array([0, 1]),
        "input_edges": np.array([0.0, 3.0]),
        "parameters": {
            "weight_step": np.array([0.5, 1.5]),
            "input_intervals": np.array([1.0, 2.0, 6.0]),
            "input_start": np.array(1 / 3, np.float32),
        },
        "gradients": {
            "weight_step": np.array(2.0),
            "input_intervals": np.array(np.nan),
            "input_start": np.array(0.0),
        },
    }
    numbers = layer_summary.layer_numbers(found)
    assert np.isnan(numbers.pop("input_intervals_gradient"))
    assert numbers == {
        "weight_entropy": 1.0,
        "weight_clipped_low": 0.125,
        "weight_clipped_high": 0.25,
        "weight_dead_levels": 2,
        "weight_flip_rate": 0.25,
        "weight_step_min": 0.5,
        "weight_step_mean": 1.0,
        "weight_step_max": 1.5,
        "weight_step_gradient": 2.0,
        "input_entropy": 0.811278,
        "input_clipped_low": 0.0,
        "input_clipped_high": 0.25,
        "input_dead_levels": 0,
        "input_threshold_first": 1.5,
        "input_threshold_last": 1.5,
        "input_intervals_min": 1.0,
        "input_intervals_mean": 3.0,
        "input_intervals_max": 6.0,
        "input_start": 0.333333,
        "input_start_gradient": 0.0,
    }


def test_the_table_of_layers(measured):
    model, _, _, _, found = measured
    table = json.loads(json.dumps(layer_summary.layers_table(model, found)))
    rows = {row["path"]: row for row in table["layers"]}
    assert list(rows) == sorted(METHODS)
    assert rows["uniq"]["packed_bytes"] == 16 * 16 * 2 // 8
    assert rows["pact"]["packed_bytes"] == rows["pact"]["float_bytes"] == 1024
    assert rows["uniq"]["weight"]["levels"] == [-1.5, -0.5, 0.5, 1.5]
    assert rows["uniq"]["weight"]["thresholds"] == [-1.0, 0.0, 1.0]
    assert rows["lsq"]["weight"]["levels"] == [*range(-8, 8)]
    assert "weight" not in rows["pact"]
    assert "input" not in rows["weights"]
    # Halfway between 0, 0.4, 1.3 and 1.5: not evenly spaced.
    np.testing.assert_allclose(rows["n2uq"]["input"]["thresholds"], [0.2, 0.85, 1.4], rtol=1e-6)
    # The float layer, biases and learned state.
    assert table["other_float_bytes"] == 4 * (170 + 7 * 16)
    state = sum(
        value.size
        for name in METHODS
        for q in (getattr(model, name).weight_quantizer, getattr(model, name).activation_quantizer)
        if q is not None
        for value in q.parameters.values()
    )
    # N2UQ's weights learn no scale, but each channel has one.
    assert table["other_packed_bytes"] == table["other_float_bytes"] + 4 * state
    assert rows["n2uq"]["packed_bytes"] == 16 * 16 * 3 // 8 + 4 * 16


def test_a_large_input_is_counted_in_part(monkeypatch, measured):
    monkeypatch.setattr(layer_metrics, "_MOST_INPUTS", 100)
    x = jnp.arange(24.0 * 6 * 4).reshape(24, 6, 4)
    part = layer_metrics._spread_out(x)
    assert part.shape == (24, 4)  # Every seventh: not always the same of 4 channels.
    assert len(set((np.asarray(part[0]) % 4).tolist())) == 4


CHILD = """
import dataclasses, functools, sys
import jax, numpy as np
jax.config.update("jax_enable_x64", True)  # Sums in another order flip no code.
sys.path.insert(0, sys.argv[1])
from test_train_layer_metrics import make_model, make_program, make_state
from uniq_jax.train import layer_metrics, sharding

rng = np.random.default_rng(0)
batch = {
    "image": rng.integers(0, 256, (32, 4, 4, 1)).astype(np.uint8),
    "label": rng.integers(0, 10, 32).astype(np.int32),
}
model = make_model(("uniq", "n2uq"), "float64")
program = make_program(model, dtype="float64")
state = make_state(program, model)
# Fresh biases are 0, and a few low-bit products may sum to 0, where a segment begins.
moved = {p: v + 0.01 * rng.standard_normal(v.shape) for p, v in state.params.items()}
state = dataclasses.replace(state, params=moved)
found = []
for axes, count in (({"data": 1, "model": 1}, 1), ({"data": 2, "model": 2}, 4)):
    mesh = sharding.create_mesh(axes, jax.devices()[:count])
    placed = jax.tree.map(jax.device_put, state, sharding.state_shardings(mesh, state))
    images = sharding.to_devices(batch, sharding.batch_sharding(mesh))
    measure = functools.partial(layer_metrics.measure, program)
    step = jax.jit(measure, out_shardings=sharding.replicated(mesh))
    found.append(jax.device_get(step(placed, images)))
assert len(images["image"].sharding.device_set) == 4
one, four = found
for path in one:
    for name, value in one[path].items():
        for key in value if isinstance(value, dict) else [None]:
            pair = [f[path][name] if key is None else f[path][name][key] for f in found]
            np.testing.assert_allclose(*pair, rtol=1e-9, atol=1e-12, err_msg=f"{path} {name} {key}")
print("agree")
"""


def test_four_devices_count_the_whole_batch():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    root = pathlib.Path(__file__).parents[1]
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    command = [sys.executable, "-c", CHILD, str(root / "tests")]
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "agree" in result.stdout


def test_measuring_needs_no_average_and_keeps_the_state(measured):
    """A state with averages is measured too; nothing of it is given up."""
    model, *_ = measured
    program = dataclasses.replace(make_program(model), ema_decay=0.9)
    state = make_state(program, model)
    averages = {**state.params, **state.statistics}
    state = dataclasses.replace(state, averages=averages)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 4, 4, 1), "uint8"),
        "label": jax.ShapeDtypeStruct((8,), "int32"),
    }
    shapes = jax.eval_shape(functools.partial(layer_metrics.measure, program), state, batch)
    assert sorted(shapes) == sorted(METHODS)
