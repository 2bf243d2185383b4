"""StableHLO: a frozen network as a program that JAX runs without this package."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from uniq_jax.deploy.network import FrozenNetwork
from uniq_jax.deploy.whole_files import written

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_stablehlo(
    network: FrozenNetwork,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch: int | None = None,
) -> None:
    """Writes the network's program, its arrays inside, as `jax.export` serializes it.

    `jax.export.deserialize(open(path, "rb").read()).call(images)` gives the logits; it
    takes JAX, and nothing of this package. Beside it, `path` with ".json" behind its name says what
    the images are: shape, normalization, labels.

    Args:
      network: of `uniq_jax.freeze`.
      path: of the program, by custom ending in .stablehlo.
      platforms: that the one file is for: any of "cpu", "cuda", "rocm", "tpu".
      batch: how many images a call takes; None for any number.

    Raises:
      ValueError: if a platform is unknown or `batch` is below 1.
      OSError: if a file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from flax import nnx
      >>> from uniq_jax import deploy, nn
      >>> layer = nn.QuantLinear(4, 3, weight=nn.UniqWeight(2), activation=nn.UniqActivation(2),
      ...                        rngs=nnx.Rngs(0))
      >>> path = pathlib.Path(tempfile.mkdtemp(), "linear.stablehlo")
      >>> deploy.export_stablehlo(deploy.freeze(layer, (4,)), path, platforms=["cpu"])
      >>> program = jax.export.deserialize(path.read_bytes())
      >>> program.platforms, program.call(jnp.zeros((5, 4))).shape
      (('cpu',), (5, 3))
    """
    path, platforms = Path(path), tuple(platforms)
    for platform in platforms:
        if platform not in _PLATFORMS:
            allowed = ", ".join(map(repr, _PLATFORMS))
            raise ValueError(f"platforms (={platforms!r}) must be of {allowed}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch (={batch}) must be at least 1, or None for any number")
    (size,) = (batch,) if batch is not None else export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((size, *network.graph.image_shape), jnp.float32)
    try:
        program = export.export(jax.jit(network), platforms=platforms)(images)
    except Exception as error:
        if batch is None:
            error.add_note("batch (=None) asked for a program of any batch; a number may do")
        raise
    about = {
        "format": "jax.export",
        "jax_version": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
        "platforms": program.platforms,
        "input": {"shape": [batch, *network.graph.image_shape], "dtype": "float32"},
        "output": {"shape": [batch, *program.out_avals[0].shape[1:]], "dtype": "float32"},
        **dataclasses.asdict(network.about),
    }
    with written(path.with_name(path.name + ".json"), path) as (described, exported):
        described.write_text(json.dumps(about, indent=2) + "\n")
        exported.write_bytes(program.serialize())
