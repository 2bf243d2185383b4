"""What exported files can say of products and windows, and that all else is an error."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import uniq_jax
from uniq_jax import deploy, rules
from uniq_jax.nn import UniqActivation, UniqWeight

pytest.importorskip("onnxruntime")
pytest.importorskip("uniq_jax.deploy.onnx_export")

HAS_QONNX = importlib.util.find_spec("qonnx") is not None
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_qonnx = pytest.mark.skipif(not HAS_QONNX, reason="needs the extra uniq_jax[qonnx]")
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="needs the extra uniq_jax[openvino]")

WRITERS = [
    pytest.param("export_onnx", {"form": "qdq"}, id="qdq"),
    pytest.param("export_onnx", {"form": "integer"}, id="integer"),
    pytest.param("export_qonnx", {}, id="qonnx", marks=needs_qonnx),
    pytest.param("export_openvino", {}, id="openvino", marks=needs_openvino),
]


class Net(nnx.Module):
    """A stem, a convolution of one bit, `middle` between them, and the class of a mean."""

    def __init__(self, middle, rngs):
        self.middle = middle
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.conv(self.middle(self.stem(x)))
        return self.fc(jnp.max(x, axis=(1, 2)))


def frozen(model, shape, bits=1, **options):
    """With 8 bits in the first layer, and 4 where signs are to stay."""
    weight, activation = UniqWeight(bits, "channel"), UniqActivation(bits)
    stem = rules.Rule("stem", UniqWeight(8), UniqActivation(8, True))
    rows = rules.Rule("first|second", UniqWeight(4), UniqActivation(4, True), optional=True)
    uniq_jax.quantize(model, [stem, rows, rules.Rule(".*", weight, activation)])
    return deploy.freeze(model, shape, **options)


def images(count, shape):
    return np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)


def attention(x):
    """Of rows, whose products an exporter may take for one of matrices as they are."""
    rows = jnp.max(x, axis=1)
    mixed = jnp.einsum("btd,bsd->bts", rows, rows)
    return x + mixed.reshape(-1, 8, 8, 1)


def dilated(x):
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1,) * 4, "SAME", window_dilation=(1, 2, 2, 1)
    )


def convolution(x, **options):
    kernel = jnp.ones((1, 1, 8, 8)) / 8
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), options.pop("padding", "VALID"), dimension_numbers=numbers, **options
    )


REFUSED = [
    (attention, r"'dot_general' .* with dimension_numbers \(=.*\): it must be those of matrices"),
    (dilated, r"with window_dilation \(=\(1, 2, 2, 1\)\): it must be 1 along every axis"),
    (
        functools.partial(convolution, lhs_dilation=(2, 2), padding=((0, 0), (0, 0))),
        r"'conv_general_dilated' .* with lhs_dilation \(=\(2, 2\)\): it must be 1 along every axis",
    ),
    (
        functools.partial(convolution, padding=((-1, 0), (0, 0))),
        r"with padding \(=\(\(-1, 0\), \(0, 0\)\)\): it must be 0 or more at every end",
    ),
    (
        lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))),
        r"'pad' .* with padding_config \(=.*\): it must be without padding between numbers",
    ),
]


@pytest.mark.parametrize(("middle", "message"), REFUSED)
def test_what_no_file_says_is_refused_by_every_writer(middle, message, tmp_path):
    network = frozen(Net(middle, nnx.Rngs(0)), (8, 8, 3))
    for writer in WRITERS:
        if any(mark.args[0] for mark in writer.marks):
            continue
        name, options = writer.values
        path = tmp_path / "x.xml"
        with pytest.raises(NotImplementedError, match=message):
            getattr(deploy, name)(network, path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "options"), WRITERS)
def test_a_slice_of_channels_is_written(name, options, tmp_path):
    middle = lambda x: jnp.concatenate([x[..., 4:], x[..., :4]], axis=-1)  # noqa: E731
    network = frozen(Net(middle, nnx.Rngs(0)), (8, 8, 3))
    check(network, name, options, tmp_path, (8, 8, 3))


class Heads(nnx.Module):
    """Layers whose kernels are no matrices, each behind the other's sums or floats between."""

    def __init__(self, rngs):
        general = functools.partial(nnx.LinearGeneral, rngs=rngs)
        self.stem = general((4, 4), 6, axis=(-2, -1))
        self.out = general(6, (2, 3), use_bias=False)
        self.join = general((2, 3), (3, 2), axis=(-2, -1))
        self.fc = general((3, 2), 5, axis=(-2, -1))

    def __call__(self, x):
        return self.fc(nnx.relu(self.join(nnx.relu(self.out(nnx.relu(self.stem(x)))))))


@pytest.mark.parametrize("integer_thresholds", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(("name", "options"), WRITERS[:3])
def test_kernels_that_are_no_matrices(name, options, bits, integer_thresholds, tmp_path):
    network = frozen(Heads(nnx.Rngs(0)), (4, 4), bits, integer_thresholds=integer_thresholds)
    check(network, name, options, tmp_path, (4, 4))


@pytest.mark.parametrize("bits", [1, 8])
def test_networks_with_such_kernels_are_their_models(bits):
    model = Heads(nnx.Rngs(0))
    network = frozen(model, (4, 4), bits)
    model.eval()
    for count in (2, 4):
        batch = images(count, (4, 4))
        np.testing.assert_array_equal(network(batch), model(batch))


class Split(nnx.Module):
    """A binary convolution, and a layer whose kernel is no matrix."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.fc = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        rows = jnp.max(self.conv(self.stem(x)), axis=(1, 2))
        return self.fc(self.heads(rows).reshape(-1, 8))


@needs_openvino
def test_openvino_has_no_form_for_such_kernels(tmp_path):
    network = frozen(Split(nnx.Rngs(0)), (8, 8, 3))
    message = r"of layer 'heads' with a kernel of shape \(=\(8, 2, 4\)\): it must be that of a mat"
    with pytest.raises(NotImplementedError, match=message):
        deploy.export_openvino(network, tmp_path / "model.xml")


class Rows(nnx.Module):
    """Two layers on rows, with their channels last, behind a binary convolution."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        rows = jnp.max(self.conv(self.stem(x)), axis=(1, 2)).reshape(-1, 1, 8)
        rows = jnp.concatenate([rows, -rows], axis=1)
        return self.second(self.first(rows)).max(1)


@pytest.mark.parametrize(("name", "options"), WRITERS)
def test_thresholds_of_rows(name, options, tmp_path):
    """QONNX and OpenVINO count along axis 1, and must not take rows for channels."""
    network = frozen(Rows(nnx.Rngs(0)), (8, 8, 3))
    if name == "export_onnx":
        check(network, name, options, tmp_path, (8, 8, 3))
        return
    message = (
        r"'encode_sums' .* of layer 'second' with an output of shape \(=\(1, 2, 8\)\): it must"
    )
    with pytest.raises(NotImplementedError, match=message):
        getattr(deploy, name)(network, tmp_path / "model.xml", **options)
    network = frozen(Rows(nnx.Rngs(0)), (8, 8, 3), integer_thresholds=False)
    check(network, name, options, tmp_path, (8, 8, 3))


def check(network, name, options, folder, shape):
    """A file gives the logits of its network."""
    batch = images(4, shape)
    wanted = np.asarray(network(batch))
    if name == "export_onnx":
        deploy.export_onnx(network, folder / "model.onnx", **options)
        found = deploy.open_onnxruntime(folder / "model.onnx").run(None, {"images": batch})[0]
    elif name == "export_qonnx":
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx

        deploy.export_qonnx(network, folder / "model.onnx", batch=4)
        first = np.ascontiguousarray(batch.transpose(0, 3, 1, 2)) if len(shape) == 3 else batch
        found = execute_onnx(ModelWrapper(str(folder / "model.onnx")), {"images": first})["logits"]
    else:
        deploy.export_openvino(network, folder / "model.xml", batch=4)
        found = deploy.compile_openvino(folder / "model.xml")(batch)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.ptp(wanted) > 0.01
