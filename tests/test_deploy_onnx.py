"""ONNX files of frozen networks: their codes and logits in both runtimes, and what is in them."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_deploy_freeze import images, network, unsettled

from uniq_jax import calibrate, deploy, models
from uniq_jax import nn as qnn
from uniq_jax.deploy import onnx_arithmetic
from uniq_jax.deploy.digits import kernel_digits
from uniq_jax.deploy.graph import Graph, Node
from uniq_jax.deploy.network import About, FrozenNetwork
from uniq_jax.deploy.thresholds import ALWAYS, NEVER
from uniq_jax.models import blocks

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
# Not openvino itself, which is to be imported in one way (`runtimes.load_openvino`).
pytest.importorskip("uniq_jax.deploy.openvino_values")

SHAPE = (16, 16, 3)

# Method, bits of weights and of activations. N2UQ keeps its first and last layer in float.
METHODS = [
    ("uniq", 1, 1),
    ("uniq", 4, 4),
    ("uniq_n2uq", 2, 3),
    pytest.param("uniq", 8, 8, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def frozen():
    """A function: the frozen network of a method and its widths, made once."""
    made: dict = {}

    def freeze(method, weight_bits, activation_bits, integer_thresholds=True):
        key = method, weight_bits, activation_bits, integer_thresholds
        if key not in made:
            model = network(*key[:3])
            for _, module in nnx.iter_modules(model):
                if isinstance(getattr(module, "intervals", None), qnn.Threshold):
                    module.intervals[...] *= jnp.linspace(0.7, 1.4, module.intervals.size)
            made[key] = deploy.freeze(model, SHAPE, integer_thresholds=integer_thresholds)
        return made[key]

    return freeze


@pytest.mark.parametrize(("method", "weight_bits", "activation_bits"), METHODS)
@pytest.mark.parametrize(
    ("form", "runtime"),
    [("qdq", "openvino"), ("qdq", "onnxruntime"), ("integer", "onnxruntime")],
)
def test_exact_files_have_every_code(
    frozen, tmp_path, method, weight_bits, activation_bits, form, runtime
):
    file = tmp_path / "model.onnx"
    made = frozen(method, weight_bits, activation_bits)
    deploy.export_onnx(made, file, form=form)
    found = deploy.compare_onnx(made, file, [images(5, shape=SHAPE)], runtime=runtime)
    assert found.mismatches == 0, found.layers
    assert found.codes > 10_000
    assert found.class_mismatches == 0
    assert found.logit_difference <= 1e-6
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=form == "qdq")
    if form == "integer" and method == "uniq":
        operations = {node.op_type for node in model.graph.node}
        assert ("QLinearConv" in operations) == (weight_bits < 8)
        assert ("MatMulIntegerToFloat" in operations) == (weight_bits < 8)


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_float_layers_and_n2uq(frozen, tmp_path, form):
    """With the first and last layer in float; sums of floats are a runtime's own."""
    made = frozen("n2uq", 2, 2)
    deploy.export_onnx(made, tmp_path / "model.onnx", form=form)
    found = deploy.compare_onnx(made, tmp_path / "model.onnx", [images(5, shape=SHAPE)])
    assert found.mismatches <= found.codes // 1000
    assert found.class_mismatches == 0


@pytest.mark.parametrize(("method", "bits"), [("uniq", 4), ("n2uq", 2)])
@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_fast_files_have_nearly_every_code(frozen, tmp_path, method, bits, runtime):
    made = frozen(method, bits, bits, integer_thresholds=False)
    deploy.export_onnx(made, tmp_path / "fast.onnx", batch=5)
    batch = images(5, shape=SHAPE)
    found = deploy.compare_onnx(made, tmp_path / "fast.onnx", [batch], runtime=runtime)
    assert found.mismatches <= found.codes // 200
    assert found.class_mismatches <= 1
    deploy.export_onnx(frozen(method, bits, bits), tmp_path / "exact.onnx")
    nodes = [len(onnx.load(tmp_path / f"{n}.onnx").graph.node) for n in ("fast", "exact")]
    assert nodes[0] < nodes[1]


@pytest.mark.parametrize("integer_thresholds", [True, False])
@pytest.mark.parametrize(("method", "bits"), [("uniq", 4), ("n2uq", 2)])
def test_openvino_runs_quantized_convolutions_in_int8(
    frozen, tmp_path, method, bits, integer_thresholds
):
    made = frozen(method, bits, bits, integer_thresholds)
    deploy.export_onnx(made, tmp_path / "model.onnx", batch=1)
    runtime = deploy.compile_openvino(tmp_path / "model.onnx", threads=1).get_runtime_model()
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in runtime.get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
    ]
    quantized = [
        node
        for node in made.graph.nodes
        if "window_strides" in dict(node.attributes)
        and "product" in node.operation
        # Exact sums of 8-bit codes are those of floats.
        and (max(node["activation"][0], node["weight"][0]) < 8 or not integer_thresholds)
    ]
    assert len(quantized) >= 6
    # An 8-bit layer has another one, which sums its windows.
    wide = sum(node["weight"][0] == 8 for node in quantized)
    assert sum(kind in ("u8", "i8") for kind in kinds) == len(quantized) + wide


def sums_saturate():
    """Whether int8 sums may saturate here: on x86 processors without VNNI instructions they do."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx2" in text and "vnni" not in text


@pytest.mark.skipif(sums_saturate(), reason="int8 sums saturate on this processor: it has no VNNI")
def test_fast_files_of_8_bits_differ_by_roundings_alone(frozen, tmp_path):
    """Stems are int8 convolutions of shifted codes, whose borders see fewer pixels."""
    made = frozen("uniq", 8, 8, integer_thresholds=False)
    deploy.export_onnx(made, tmp_path / "fast.onnx")
    for runtime in ("openvino", "onnxruntime"):
        batch = images(5, shape=SHAPE)
        found = deploy.compare_onnx(made, tmp_path / "fast.onnx", [batch], runtime=runtime)
        assert found.mismatches <= found.codes // 200, runtime
        assert found.class_mismatches == 0, runtime


def test_a_wrong_file_is_noticed(frozen, tmp_path):
    made = frozen("uniq", 4, 4)
    deploy.export_onnx(made, tmp_path / "model.onnx", form="integer")
    name = next(n.inputs[1] for n in made.graph.nodes if n.operation == "encode_sums")
    moved = {**made.arrays, name: jnp.full_like(made.arrays[name], -(2**30))}
    other = dataclasses.replace(made, arrays=moved)
    found = deploy.compare_onnx(other, tmp_path / "model.onnx", [images(5, shape=SHAPE)])
    assert found.mismatches > 0
    assert next(layer.path for layer in found.layers if layer.mismatches) == "layer1/0/conv1"
    assert f"mismatching codes: {found.mismatches} of" in found.summary()
    with pytest.raises(ValueError, match="no codes of"):
        deploy.compare_onnx(frozen("n2uq", 2, 2), tmp_path / "model.onnx", [images(5, shape=SHAPE)])
    with pytest.raises(ValueError, match="at least one batch"):
        deploy.compare_onnx(made, tmp_path / "model.onnx", [])
    with pytest.raises(ValueError, match=r"runtime \(='tflite'\) must be one of"):
        deploy.compare_onnx(made, tmp_path / "model.onnx", [], runtime="tflite")


def test_any_function_of_images_can_be_compared(frozen, tmp_path):
    made = frozen("uniq", 4, 4)
    deploy.export_onnx(made, tmp_path / "model.onnx")
    session = deploy.open_onnxruntime(tmp_path / "model.onnx")

    def logits(batch):
        return session.run(["logits"], {"images": batch})[0]

    found = deploy.compare_onnx(made, logits, [images(5, shape=SHAPE)])
    assert (found.images, found.class_mismatches, found.layers) == (5, 0, ())
    assert found.logit_difference <= 1e-6


def test_batches_and_metadata(frozen, tmp_path):
    about = About("net", ("a", "b", "c", "d", "e"), (1.5, 2.0, 3.0), (4.0, 5.0, 6.0), 20)
    made = dataclasses.replace(frozen("uniq", 4, 4), about=about)
    for batch, shape in ((None, ["batch", *SHAPE]), (3, [3, *SHAPE])):
        deploy.export_onnx(made, tmp_path / "model.onnx", form="integer", batch=batch)
        session = deploy.open_onnxruntime(tmp_path / "model.onnx", threads=1)
        (image,), (logits,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.shape, image.type) == ("images", shape, "tensor(float)")
        assert (logits.name, logits.shape) == ("logits", [shape[0], 5])
    metadata = session.get_modelmeta().custom_metadata_map
    assert deploy.onnx_about(metadata) == about
    assert (metadata["format"], metadata["form"]) == ("uniq_jax.onnx", "integer")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(ValueError, match="newer uniq_jax"):
        deploy.onnx_about({**metadata, "format_version": "2"})
    with pytest.raises(ValueError, match="not written by export_onnx"):
        deploy.onnx_about({"about": json.dumps({})})


def test_kernels_are_stored_packed(frozen, tmp_path):
    sizes = {}
    for bits in (1, 2, 4):
        made = frozen("uniq_n2uq", 2, 3) if bits == 2 else frozen("uniq", bits, bits)
        deploy.export_onnx(made, tmp_path / "model.onnx")
        model = onnx.load(tmp_path / "model.onnx")
        sizes[bits] = sum(t.ByteSize() for t in model.graph.initializer if t.data_type == 2)
        kernels = [n for n in made.graph.nodes if "product" in n.operation]
        low = [n for n in kernels if n["weight"][0] == bits]
        packed = sum(np.prod(made.arrays[n.inputs[1]].shape) * bits / 8 for n in low)
        ends = sum(made.arrays[n.inputs[1]].size for n in kernels if n not in low)
        # Headers, and the tables of 256 rows.
        assert packed <= sizes[bits] <= packed + ends + 2500
    assert sizes[1] < sizes[2] < sizes[4]


def test_what_cannot_be_written_is_an_error(frozen, tmp_path):
    made = frozen("uniq", 4, 4)
    with pytest.raises(ValueError, match=r"form \(='qonnx'\) must be one of 'qdq', 'integer'"):
        deploy.export_onnx(made, tmp_path / "x.onnx", form="qonnx")
    with pytest.raises(ValueError, match=r"batch \(=0\) must be an integer, at least 1, or None"):
        deploy.export_onnx(made, tmp_path / "x.onnx", batch=0)
    nodes = (
        Node("arg0", "argmax", ("input",), (("axes", (3,)), ("index_dtype", "int32")), "head"),
    )
    other = FrozenNetwork(Graph(nodes, "arg0", SHAPE), {})
    with pytest.raises(NotImplementedError, match=r"'argmax' \(node 'arg0'\) of layer 'head'"):
        deploy.export_onnx(other, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_depthwise_layers_and_signed_inputs(tmp_path, mobilenet, form):
    deploy.export_onnx(mobilenet, tmp_path / "model.onnx", form=form)
    batch = images(2, shape=(16, 16, 3))
    runtime = "openvino" if form == "qdq" else "onnxruntime"
    found = deploy.compare_onnx(mobilenet, tmp_path / "model.onnx", [batch], runtime=runtime)
    assert found.mismatches == 0, found.layers
    assert found.class_mismatches == 0
    if form == "integer":
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        made = {output: node for node in nodes for output in node.output}
        (pool,) = (node for node in nodes if node.op_type == "MaxPool")
        # In front of scale and batch norm, some of whose channels fall.
        transposed = made[pool.input[0]]
        assert made[transposed.input[0]].op_type == "MatMulIntegerToFloat"
        assert np.any(np.asarray(mobilenet.arrays["constant3"]) < 0)


def test_no_factor_moves_into_a_convolution_of_floats(tmp_path):
    """As ONNX Runtime would do it with the 8-bit layers, whose levels no int8 holds."""
    options = {"method": "uniq", "weight_bits": 8, "activation_bits": 8}
    model = models.create("resnet8", num_classes=10, rngs=nnx.Rngs(0), **options)
    batch = np.random.default_rng(0).uniform(size=(16, *SHAPE)).astype(np.float32)
    calibrate(model, [batch])
    frozen = deploy.freeze(model, SHAPE)
    deploy.export_onnx(frozen, tmp_path / "model.onnx", form="integer")
    found = deploy.compare_onnx(frozen, tmp_path / "model.onnx", [batch])
    assert found.codes > 100_000
    assert found.mismatches == 0, found.layers


@pytest.fixture(scope="module")
def mobilenet():
    """Layers as MobileNet-V2 has them, depthwise and with signed inputs, and a pooling."""

    class Bottleneck(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            conv = {"weight": qnn.UniqWeight(4), "use_bias": False, "rngs": rngs}
            signed = qnn.UniqActivation(4, signed=True)
            self.expand = qnn.QuantConv(3, 16, (1, 1), activation=signed, **conv)
            self.first = qnn.BatchNorm(16, rngs=rngs)
            unsigned = qnn.UniqActivation(4)
            self.depthwise = qnn.QuantConv(
                16, 16, (3, 3), activation=unsigned, feature_group_count=16, strides=2,
                padding=((1, 1), (1, 1)), **conv,
            )  # fmt: skip
            self.second = qnn.BatchNorm(16, rngs=rngs)
            self.project = qnn.QuantConv(16, 8, (1, 1), activation=unsigned, **conv)
            self.third = qnn.BatchNorm(8, rngs=rngs)
            self.last = qnn.QuantConv(8, 8, (1, 1), activation=signed, **conv)

        def __call__(self, x):
            x = blocks.max_pool(jnp.clip(self.first(self.expand(x)), 0, 6))
            x = jnp.clip(self.second(self.depthwise(x)), 0, 6)
            x = self.third(self.project(x))
            return jnp.mean(self.last(x) + x, (1, 2))

    return deploy.freeze(unsettled(Bottleneck()), (16, 16, 3))


# Formulas for thresholds


@pytest.mark.parametrize("count", [1, 3, 7, 15])
def test_quotients_have_the_codes_of_thresholds(count):
    rng = np.random.default_rng(count)
    codes = np.arange(1, count + 1)
    for step in rng.uniform(0.01, 2, 5).astype(np.float32):
        on = step * (codes - 0.5).astype(np.float32)
        limits = np.where(codes % 2 == 0, on, np.nextafter(on, np.float32(np.inf)))
        factor, divisor = onnx_arithmetic.quotient(limits)
        near = limits.view(np.int32)[:, None] + np.arange(-9, 10)
        x = near.astype(np.int32).view(np.float32).ravel()
        x = np.concatenate([x, rng.normal(0, count * step, 5000).astype(np.float32)])
        found = np.clip(np.rint(x * factor / divisor), 0, count)
        np.testing.assert_array_equal(found, (x[:, None] >= limits).sum(1))
    assert onnx_arithmetic.quotient(np.float32([0.1, 0.2, 0.4])) is None


def test_lines_have_the_codes_of_thresholds():
    rng = np.random.default_rng(0)
    largest = 500
    signs = np.where(rng.random(40) < 0.5, -1, 1)
    exact = rng.uniform(-300, 300, 40) + rng.uniform(3, 40, 40) * np.arange(1, 8)[:, None]
    limits = np.ceil(exact).astype(np.int64)
    limits = np.where(limits > largest, NEVER, np.where(limits <= -largest, ALWAYS, limits))
    factor, summand = onnx_arithmetic.line(limits, signs, largest)
    sums = np.arange(-largest, largest + 1)[:, None]
    wanted = (sums * signs >= limits[:, None]).sum(0)
    found = np.clip(np.rint(factor * sums.astype(np.float32) + summand), 0, 7)
    np.testing.assert_array_equal(found, wanted)
    bent = limits.copy()
    bent[4:, 0] += 90
    assert onnx_arithmetic.line(bent, signs, largest) is None


def test_integer_lines_have_the_codes_of_thresholds():
    rng = np.random.default_rng(1)
    largest = 500
    signs = np.where(rng.random(40) < 0.5, -1, 1)
    exact = rng.uniform(-300, 100, 40) + rng.uniform(9, 60, 40) * np.arange(1, 8)[:, None]
    limits = np.ceil(exact).astype(np.int64)
    limits = np.where(limits > largest, NEVER, np.where(limits <= -largest, ALWAYS, limits))
    sums = np.arange(-largest, largest + 1)[:, None]
    wanted = (sums * signs >= limits[:, None]).sum(0)
    for stretch in (1, 2):
        factors, summands, scales = onnx_arithmetic.integer_line(limits, signs, largest, 9, stretch)
        assert np.all(factors * signs >= 1)
        assert np.abs(factors).max() <= 9
        whole = (stretch * factors * sums + summands).astype(np.float32)
        np.testing.assert_array_equal(np.clip(np.rint(whole * scales), 0, 7), wanted)
    assert onnx_arithmetic.integer_line(limits, signs, 2**23, 9) is None
    bent = limits.copy()
    bent[4:, 0] += 90
    assert onnx_arithmetic.integer_line(bent, signs, largest, 9) is None


@pytest.mark.parametrize("grid", [(8, 127.5), (8, 128.0), (4, 7.5)])
def test_digits_sum_to_levels_and_stay_exact(grid):
    codes = np.arange(2 ** grid[0], dtype=np.int16)
    factor = 2 if grid[1] != int(grid[1]) else 1
    whole = max(factor * grid[1], factor * (2 ** grid[0] - 1 - grid[1]))
    for taps in (9, 1000, 20000, 60000):
        largest = int(taps * 255 * whole)
        digits = kernel_digits(codes, grid, largest)
        total = sum(place * digit.astype(np.int64) for place, digit in digits)
        np.testing.assert_array_equal(total, factor * codes - factor * grid[1])
        biggest = max(np.abs(digit.astype(int)).max() for _, digit in digits)
        assert taps * 255 * biggest < 2**24
