"""The training steps that benchmarks compile and time: networks, batches, and how they are jitted.

Building, lowering and compiling are separate: a timing needs arrays, a compilation shapes only.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from uniq_jax import calibrate, data_parallel, models
from uniq_jax.spec import LossSpec
from uniq_jax.train import sharding, start
from uniq_jax.train.compilation import compiler_options
from uniq_jax.train.network import Network, split
from uniq_jax.train.state import Program, TrainState
from uniq_jax.train.step import train_step

# Name: how it is created, pixels, batch, classes.
NETWORKS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "resnet18": ({"name": "resnet18"}, 224, 16, 1000),
    "n2uq_resnet18": ({"name": "resnet18", "activation": "biased_prelu"}, 224, 16, 1000),
    "preact_resnet32": ({"name": "preact_resnet32"}, 32, 128, 100),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, and how it is quantized.

    Attributes:
      network: of `NETWORKS`.
      method: of `uniq_jax.models.create`; None for the float network.
      bits: of weights and activations.
      batch: examples of a step, over all devices; None for the network's own number.
    """

    network: str
    method: str | None = None
    bits: int = 32
    batch: int | None = None

    def __str__(self) -> str:
        """Such as "resnet18 uniq W2A2"."""
        if self.method is None:
            return f"{self.network} float"
        return f"{self.network} {self.method} W{self.bits}A{self.bits}"

    @property
    def batch_size(self) -> int:
        """Examples of a step, over all devices."""
        return self.batch or NETWORKS[self.network][2]

    def create(self) -> Any:
        """The network, with random weights."""
        options, _, _, classes = NETWORKS[self.network]
        if self.method is not None:
            widths = {"weight_bits": self.bits, "activation_bits": self.bits}
            options = {**options, "method": self.method, **widths}
        return models.create(**options, num_classes=classes, rngs=nnx.Rngs(0))

    def program(self) -> Program:
        """What stays the same from step to step: SGD with momentum. Computes nothing."""
        rate = optax.constant_schedule(1e-4)
        return Program(
            network=Network.of(nnx.eval_shape(self.create)),
            mean=(127.5,) * 3,
            std=(64.0,) * 3,
            dtype=jnp.float32,
            optimizer=optax.sgd(rate, momentum=0.9),
            rate=rate,
            loss=_labels(),
            ema_decay=0.0,
            seed=0,
        )

    def state(self, program: Program) -> TrainState:
        """A state to train from, calibrated on random images."""
        _, size, _, _ = NETWORKS[self.network]
        model = self.create()
        if self.method is not None:
            images = np.random.default_rng(0).normal(size=(16, size, size, 3))
            calibrate(model, [images.astype(np.float32)])
        params, statistics = split(model)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            statistics=statistics,
            opt_state=program.optimizer.init(params),
        )

    def examples(self) -> dict[str, jax.Array]:
        """A random batch."""
        rng = np.random.default_rng(1)
        _, _, _, classes = NETWORKS[self.network]
        highest = {"image": 256, "label": classes}
        return {
            name: jnp.asarray(rng.integers(0, highest[name], shape), dtype)
            for name, (shape, dtype) in self._shapes().items()
        }

    def shapes(self, program: Program, mesh: Mesh) -> tuple[TrainState, Mapping[str, Any]]:
        """State and batch as `uniq_jax.main` lays them out on a mesh; nothing is computed."""
        spread = sharding.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=spread)
            for name, (shape, dtype) in self._shapes().items()
        }
        return start.abstract_state(self.create, program, mesh), batch

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        _, size, _, _ = NETWORKS[self.network]
        count = self.batch_size
        return {"image": ((count, size, size, 3), jnp.uint8), "label": ((count,), jnp.int32)}


def _labels() -> LossSpec:
    """The cross entropy of the labels."""
    return LossSpec(
        label_smoothing=0.0,
        mixup_alpha=0.0,
        teacher="",
        teacher_model="",
        teacher_options={},
        teacher_weight=1.0,
        teacher_temperature=1.0,
    )


def jitted(program: Program, *, tuned: bool = True) -> Any:
    """The step of one device, to be lowered.

    Args:
      program: static.
      tuned: with this package's compiler options, else with XLA's defaults.
    """
    return jax.jit(
        functools.partial(train_step, program),
        donate_argnums=0,
        compiler_options=compiler_options() if tuned else None,
    )


def jitted_on(mesh: Mesh, program: Program, state: TrainState, *, tuned: bool = True) -> Any:
    """The step on a mesh, as `uniq_jax.train.run.Run.train_step` jits it.

    Args:
      mesh: of devices, or descriptions of some.
      program: static.
      state: arrays, or their shapes, with shardings.
      tuned: with this package's compiler options for the platform of this process.
    """
    placed = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(
        data_parallel.on_mesh(mesh, train_step, program),
        donate_argnums=0,
        out_shardings=(placed, sharding.replicated(mesh)),
        compiler_options=compiler_options() if tuned else None,
    )
