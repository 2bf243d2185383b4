"""Exported ResNet-20s with trained weights, on real images, in their runtimes: `make exports`."""

import jax
import numpy as np
import pytest
from flax import nnx
from test_cifar10_networks import images_of

from uniq_jax import calibrate, deploy, models, quantize, rules
from uniq_jax.deploy import integers
from uniq_jax.interop import load_torch_state_dict

pytestmark = [pytest.mark.slow, pytest.mark.data]

COUNT = 500
PRESETS = {"UniQ": rules.uniq, "N2UQ": rules.n2uq}


@pytest.fixture(scope="module")
def test_images(shared_dir):
    return images_of(shared_dir / "data" / "cifar10" / "test_a.npz", count=COUNT)[0]


def network_of(shared_dir, method, bits, **options):
    """Trained in float, then quantized: not accurate, but with real weights and activations."""
    data = shared_dir / "data"
    model = models.create("resnet20", num_classes=10, rngs=nnx.Rngs(0))
    with np.load(data / "weights" / "cifar10_resnet20.npz") as file:
        load_torch_state_dict(model, dict(file), strict=True)
    quantize(model, PRESETS[method](bits=bits))
    calibrate(model, [images_of(data / "cifar10" / "train.npz", count=200)[0]])
    return deploy.freeze(model, (32, 32, 3), **options)


def compared(network, images, run):
    """(codes that differ, codes, classes that differ); `run` gives logits, and levels by name."""
    encodes = [node for node in network.graph.nodes if node.operation.startswith("encode")]

    @jax.jit
    def wanted_of(batch):
        values = network.values(batch)
        codes = [integers.codes_of(values[n.name], integers.form(*n["grid"])) for n in encodes]
        return values[network.graph.output], codes

    different = total = classes = 0
    for batch in np.split(images, COUNT // 50):
        logits, codes = jax.tree.map(np.asarray, wanted_of(batch))
        found_logits, found = run(batch)
        for node, wanted in zip(encodes, codes):
            bits, offset = node["grid"]
            levels = np.moveaxis(found[node.name], 1, -1)
            half = offset != int(offset)
            found_codes = (levels + 2**bits - 1) / 2 if half else levels + offset
            different += int(np.sum(np.rint(found_codes) != wanted))
            total += wanted.size
        classes += int(np.sum(found_logits.argmax(1) != logits.argmax(1)))
    return different, total, classes


def report(capsys, name, different, total, classes):
    with capsys.disabled():
        print(f"\n{name}: mismatching codes: {different} of {total}, classes: {classes} of {COUNT}")


@pytest.mark.parametrize("method", PRESETS)
def test_binary_in_openvino(method, shared_dir, test_images, capsys):
    from uniq_jax.deploy import openvino_operations
    from uniq_jax.deploy.channels_first import channels_first
    from uniq_jax.deploy.runtimes import load_openvino

    network = network_of(shared_dir, method, 1)
    names = [n.name for n in network.graph.nodes if n.operation.startswith("encode")]
    form = channels_first(network.graph, network.arrays)
    core, options = load_openvino().Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    with_codes, plain = (
        core.compile_model(openvino_operations.model(form, 50, outputs=outputs), "CPU", options)
        for outputs in (names, ())
    )

    def run(batch):
        values = with_codes(batch)
        # The network without these outputs is another program.
        return plain(batch)["logits"], {name: values[name] for name in names}

    different, total, classes = compared(network, test_images, run)
    report(capsys, f"{method} W1A1, OpenVINO", different, total, classes)
    assert classes == 0
    # A float stem's sums are in the runtime's order.
    assert different <= total / 1e5


@pytest.mark.parametrize("integer_thresholds", [True, False])
@pytest.mark.parametrize("method", PRESETS)
def test_qonnx(method, integer_thresholds, shared_dir, test_images, tmp_path, capsys):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    network = network_of(shared_dir, method, 2, integer_thresholds=integer_thresholds)
    deploy.export_qonnx(network, tmp_path / "network.onnx", batch=50)
    model = ModelWrapper(str(tmp_path / "network.onnx"))

    def run(batch):
        first = {"images": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))}
        values = execute_onnx(model, first, return_full_exec_context=True)
        for name in [name for name in values if name.endswith("_values") and "encode" in name]:
            # Of values: step * (code - offset), where the level may be twice that.
            name = name.removesuffix("_values")
            half = values[f"{name}_zeropt"] % 1 != 0
            values[name] = values[f"{name}_values"] / values[f"{name}_scale"] * (1 + half)
        return values["logits"], values

    different, total, classes = compared(network, test_images, run)
    form = "levels" if integer_thresholds else "values"
    report(capsys, f"{method} W2A2, QONNX of {form}", different, total, classes)
    assert classes <= (0 if integer_thresholds else COUNT / 100)
    assert different <= (total / 1e5 if integer_thresholds else total / 100)
