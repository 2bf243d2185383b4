"""The packed file: a frozen network in a .safetensors file, its codes as dense bits.

The format, version 1. Its tensors are the network's arrays. The kernels of integer products are
uint8 tensors, the codes in row-major order as a little-endian bit stream (`quantizers.pack_codes`);
all others are as they are in memory. The header's metadata, all of them strings, are

    format          "uniq_jax.frozen"
    format_version  "1"
    graph           JSON: {"nodes": [[name, operation, inputs, attributes, layer], …], "output",
                    "image_shape"}; a node's attributes are pairs of a name and a value
    packed          JSON: kernel → [bits, offset, shape]
    about           JSON: labels, normalization, and where the network comes from
    checksum        BLAKE2b, 16 bytes, in hexadecimal, of the other metadata and of all tensors

Nothing in a file is executed: operations are names of what the package has.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from uniq_jax.deploy import integers, operations
from uniq_jax.deploy.graph import Graph, Node
from uniq_jax.deploy.network import About, FrozenNetwork
from uniq_jax.deploy.whole_files import written
from uniq_jax.quantizers import pack_codes, unpack_codes

_FORMAT = "uniq_jax.frozen"
_VERSION = 1


def save(network: FrozenNetwork, path: str | os.PathLike[str]) -> int:
    """Writes a frozen network to a file, as a whole or not at all.

    Args:
      network: of `uniq_jax.freeze`.
      path: of the file, by custom ending in .safetensors.

    Returns:
      The file's bytes.

    Raises:
      OSError: if it cannot be written.
    """
    arrays = {name: np.asarray(array) for name, array in network.arrays.items()}
    packed: dict[str, Any] = {}
    for node in network.graph.nodes:
        name = node.inputs[1] if node.operation == "integer_product" else None
        if name is not None and name not in packed:
            bits, offset = node["weight"]
            codes = integers.codes_of(arrays[name], integers.form(bits, offset))
            packed[name] = [bits, offset, list(codes.shape)]
            arrays[name] = pack_codes(codes, bits=bits)
    graph = {
        "nodes": [dataclasses.astuple(node) for node in network.graph.nodes],
        "output": network.graph.output,
        "image_shape": network.graph.image_shape,
    }
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "graph": json.dumps(graph),
        "packed": json.dumps(packed),
        "about": json.dumps(dataclasses.asdict(network.about)),
    }
    metadata["checksum"] = _checksum(metadata, arrays)
    data = _with_metadata(safetensors.numpy.save(arrays), metadata)
    with written(Path(path)) as (file,):
        file.write_bytes(data)
    return len(data)


def load(path: str | os.PathLike[str]) -> FrozenNetwork:
    """Reads a frozen network from a file.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it is no packed file, is truncated or altered, or of a newer version.
    """
    data = Path(path).read_bytes()
    try:
        metadata, arrays = _read(data)
        return _network(metadata, arrays)
    except _Refused as error:
        raise ValueError(f"{path} {error}") from error


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The file with metadata in its header, whose order safetensors itself leaves to chance."""
    size = int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(metadata), **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


class _Refused(ValueError):
    """Why a file is not loaded."""


def _read(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of a file whose checksum is right."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
        is_frozen = metadata.get("format") == _FORMAT
    except (AttributeError, ValueError) as error:
        raise _Refused(f"is truncated, or no .safetensors file: {error}") from error
    if not is_frozen:
        raise _Refused("is a .safetensors file, but holds no frozen network")
    version = metadata.get("format_version", "")
    if not version.isdecimal():
        raise _Refused(f"has the format version {version!r}, which is no number")
    if int(version) > _VERSION:
        raise _Refused(
            f"has format version {version}, and this package knows {_VERSION}; it takes a newer "
            "uniq_jax"
        )
    try:
        arrays = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise _Refused(f"is truncated, or no .safetensors file: {error}") from error
    except KeyError as error:
        raise _Refused(f"has a tensor of dtype {error}, which no frozen network has") from error
    given = metadata.pop("checksum", "")
    if given != _checksum(metadata, arrays):
        raise _Refused("was altered: its checksum is not that of its content")
    return metadata, arrays


def _network(metadata: Mapping[str, str], arrays: dict[str, np.ndarray]) -> FrozenNetwork:
    try:
        graph = json.loads(metadata["graph"])
        nodes = tuple(Node(*_tuples(values)) for values in graph["nodes"])
        about = About(**json.loads(metadata["about"]))
        for name, (bits, offset, shape) in json.loads(metadata["packed"]).items():
            codes = unpack_codes(arrays[name], bits=bits, shape=tuple(shape))
            arrays[name] = np.asarray(
                integers.operand(jnp.asarray(codes), integers.form(bits, offset))
            )
        _check(nodes, graph["output"], arrays)
        whole = Graph(nodes, graph["output"], _tuples(graph["image_shape"]))
    except _Refused:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise _Refused(f"describes no network of version {_VERSION}: {error!r}") from error
    return FrozenNetwork(whole, {k: jnp.asarray(v) for k, v in arrays.items()}, about)


def _check(nodes: tuple[Node, ...], output: str, arrays: Mapping[str, Any]) -> None:
    known = {"input", *arrays}
    for node in nodes:
        if node.operation not in operations.NAMES:
            raise _Refused(f"has an operation {node.operation!r}, which this package doesn't know")
        if missing := [name for name in node.inputs if name not in known]:
            raise _Refused(f"has a node {node.name!r} whose input {missing[0]!r} is not there")
        known.add(node.name)
    if output not in known:
        raise _Refused(f"has the output {output!r}, which no node gives")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _checksum(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for key in sorted(metadata):
        total.update(f"{key}\0{metadata[key]}\0".encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        total.update(array.tobytes())
    return total.hexdigest()
