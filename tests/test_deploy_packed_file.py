"""The packed file: what is in it, how small it is, and what is refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from uniq_jax import deploy, models
from uniq_jax.deploy import packed_file

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def frozen():
    model = models.create(
        "resnet8",
        num_classes=3,
        rngs=nnx.Rngs(0),
        width=8,
        method="uniq_n2uq",
        weight_bits=3,
        activation_bits=2,
    )
    about = deploy.About("a network", ("cat", "dog", "ship"), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 9)
    network = deploy.freeze(model, SHAPE)
    return deploy.FrozenNetwork(network.graph, network.arrays, about)


@pytest.fixture
def file(frozen, tmp_path):
    path = tmp_path / "network.safetensors"
    deploy.save(frozen, path)
    return path


def changed(file, *, checksum=True, **metadata):
    """The file with other metadata, and by default with the checksum that belongs to them."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    old = json.loads(data[8 : 8 + size])["__metadata__"]
    arrays = safetensors.numpy.load(data)
    new = {**old, **metadata}
    if checksum:
        new.pop("checksum")
        new["checksum"] = packed_file._checksum(new, arrays)
    file.write_bytes(safetensors.numpy.save(arrays, new))


def test_what_is_loaded_is_what_was_saved(frozen, file):
    loaded = deploy.load(file)
    assert loaded.graph == frozen.graph
    assert loaded.about == frozen.about
    assert loaded.arrays.keys() == frozen.arrays.keys()
    for name, array in frozen.arrays.items():
        assert loaded.arrays[name].dtype == array.dtype, name
        np.testing.assert_array_equal(loaded.arrays[name], array, err_msg=name)
    images = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    np.testing.assert_array_equal(jax.jit(loaded)(images), jax.jit(frozen)(images))


def test_the_same_network_gives_the_same_bytes_and_no_other_file(frozen, file):
    first = file.read_bytes()
    assert deploy.save(frozen, file) == len(first)
    assert file.read_bytes() == first
    assert list(file.parent.iterdir()) == [file]


def test_codes_are_dense(frozen, file):
    arrays = safetensors.numpy.load_file(file)
    node = next(n for n in reversed(frozen.graph.nodes) if n.operation == "integer_product")
    kernel = frozen.arrays[node.inputs[1]]
    assert node["weight"] == (8, 127.5)
    assert arrays[node.inputs[1]].size == kernel.size
    node = next(n for n in frozen.graph.nodes if dict(n.attributes).get("weight") == (3, 3.5))
    kernel = frozen.arrays[node.inputs[1]]
    assert arrays[node.inputs[1]].size == -(-kernel.size * 3 // 8)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"network\.safetensors is truncated"):
        deploy.load(file)


def test_an_altered_file_is_refused(file):
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="was altered"):
        deploy.load(file)


def test_altered_metadata_are_refused(file):
    changed(file, checksum=False, about=json.dumps({"name": "another"}))
    with pytest.raises(ValueError, match="was altered"):
        deploy.load(file)


def test_a_newer_file_is_refused(file):
    changed(file, format_version="2")
    with pytest.raises(ValueError, match="has format version 2, and this package knows 1"):
        deploy.load(file)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no frozen network"):
        deploy.load(path)
    for dtype, size in (("BF16", 2), ("F8_E4M3", 1)):
        tensor = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}
        path.write_bytes(described({"w": tensor}) + bytes(4 * size))
        with pytest.raises(ValueError, match="holds no frozen network"):
            deploy.load(path)
        metadata = {"format": "uniq_jax.frozen", "format_version": "1"}
        path.write_bytes(described({"__metadata__": metadata, "w": tensor}) + bytes(4 * size))
        with pytest.raises(ValueError, match=f"has a tensor of dtype '{dtype}', which no frozen"):
            deploy.load(path)
    for header in ([], {"__metadata__": 3}):
        path.write_bytes(described(header))
        with pytest.raises(ValueError, match=r"no \.safetensors file"):
            deploy.load(path)


def described(header):
    """The header of a .safetensors file."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([["a", "__import__", ["input"], [], ""]], "operation '__import__'"),
        ([["a", "abs", ["nothing"], [], ""]], "input 'nothing' is not there"),
        ([["a", "abs", ["input"]], 3], "describes no network"),
        ([], "output 'a'"),
    ],
)
def test_a_graph_that_makes_no_sense_is_refused(file, nodes, message):
    graph = {"nodes": nodes, "output": "a", "image_shape": [8, 8, 3]}
    changed(file, graph=json.dumps(graph))
    with pytest.raises(ValueError, match=message):
        deploy.load(file)


def test_an_unwritable_place_is_an_error_and_leaves_nothing(frozen, tmp_path):
    with pytest.raises(OSError, match="missing"):
        deploy.save(frozen, tmp_path / "missing" / "network.safetensors")


def test_a_resnet18_at_two_bits_is_a_thirteenth(tmp_path):
    """With 8-bit ends; bytes on disk."""
    model = models.create(
        "resnet18",
        num_classes=1000,
        rngs=nnx.Rngs(0),
        method="uniq",
        weight_bits=2,
        activation_bits=2,
    )
    path = tmp_path / "network.safetensors"
    deploy.save(deploy.freeze(model, (32, 32, 3)), path)
    floats = sum(v.size for v in jax.tree.leaves(nnx.state(model, nnx.Param, nnx.BatchStat))) * 4
    assert floats / path.stat().st_size >= 13


def test_it_runs_without_the_trainer(frozen, file):
    script = f"""
import sys
from uniq_jax import deploy
import jax.numpy as jnp
network = deploy.load({str(file)!r})
print(network.about.labels, network(jnp.ones((1, 8, 8, 3)))[0].tolist())
wrong = {{"optax", "orbax", "grain", "tensorflow_datasets"}} & set(sys.modules)
assert not wrong, wrong
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    logits = jax.jit(frozen)(jnp.ones((1, *SHAPE)))[0].tolist()
    assert process.stdout.startswith("('cat', 'dog', 'ship')")
    np.testing.assert_allclose(
        json.loads(process.stdout.partition(") ")[2]), logits, rtol=1e-6, atol=1e-6
    )
