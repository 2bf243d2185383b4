"""What the phases of a run share: data, mesh, and how networks and steps are made."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax import data, data_parallel
from uniq_jax.spec import PhaseSpec, RunSpec
from uniq_jax.train import (
    averages,
    compilation,
    memory,
    optimizer,
    oscillation,
    preemption,
    processes,
    remat,
    sharding,
    start,
    teacher,
)
from uniq_jax.train.network import Arrays, Network, Teacher, quantizer_state
from uniq_jax.train.state import Program, TrainState
from uniq_jax.train.step import eval_step, train_step

_logger = logging.getLogger(__name__)

# Pixels of a batch of `test_batches`, whose codes are kept for all layers at once.
_LARGEST_TEST = 2**20


class Run:
    """Data and devices of one run; reads, but writes nothing.

    Args:
      spec: what to do.
      note: is told of broken images.

    Raises:
      ValueError, FileNotFoundError: if data or devices don't fit the spec.
    """

    def __init__(self, spec: RunSpec, note: Callable[[str], None] = _logger.warning):
        self.spec = spec
        # Every evaluation meets the same broken images: what was said is not said again.
        self._note = functools.cache(note)
        self.mesh = sharding.create_mesh(spec.mesh)
        processes.check_mesh(self.mesh)
        processes.connect_devices(self.mesh)
        for key in ("batch_size", "eval_batch_size"):
            sharding.check_batch(self.mesh, key, getattr(spec.data, key))
        for phase in spec.phases:
            key, count = f"config.{phase.name}.accumulation_steps", phase.accumulation_steps
            sharding.check_microbatches(self.mesh, key, spec.data.batch_size, count)
        is_resized = spec.data.augment == data.RESIZED_CROP  # of images as they are stored
        self.train_data, self.test_data = (
            data.load_as(
                in_memory,
                spec.data.name,
                split=which,
                data_dir=spec.data.data_dir or None,
                image_size=spec.data.image_size or None,
                resize_size=spec.data.resize_size or None,
            )
            for which, in_memory in (
                (spec.data.train_split, "never" if is_resized else spec.data.in_memory),
                (spec.data.test_split, spec.data.in_memory),
            )
        )
        self.steps_per_epoch = len(self.train_data) // spec.data.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"config.data.batch_size (={spec.data.batch_size}) must be at most the number of "
                f"training examples, {len(self.train_data)}"
            )
        mean, std = spec.data.mean, spec.data.std
        if not mean:
            mean, std = self._statistics()
        channels = self.train_data.image_shape[-1]
        if len(mean) != channels:
            raise ValueError(
                f"config.data.mean (={tuple(mean)}) must have as many entries as the images have "
                f"channels, {channels}"
            )
        self._mean, self._std = (tuple(255 * float(v) for v in values) for values in (mean, std))

    def _statistics(self) -> tuple[Any, Any]:
        if isinstance(self.train_data, data.ImageData):
            return data.statistics(self.spec.data.name, self.train_data.images)
        try:
            return data.statistics(self.spec.data.name)
        except ValueError as error:
            raise ValueError(
                f"config.data.mean and config.data.std must be given for {self.spec.data.name!r}, "
                "which is not in memory and has no known ones; those of ImageNet are "
                "(0.485, 0.456, 0.406) and (0.229, 0.224, 0.225)"
            ) from error

    def total_steps(self, phase: PhaseSpec) -> int:
        """Steps of a phase."""
        return max(round(phase.total_epochs * self.steps_per_epoch), 1)

    def builder(self, phase: PhaseSpec) -> Callable[[], nnx.Module]:
        """Makes the phase's network with fresh parameters."""
        return functools.partial(
            start.build_model,
            self.spec.model,
            phase,
            num_classes=self.train_data.num_classes,
            in_features=self.train_data.image_shape[-1],
            seed=self.spec.seed,
        )

    def program(self, phase: PhaseSpec) -> Program:
        """Traces the phase's network for what stays the same in all steps; computes nothing."""
        model: nnx.Module = nnx.eval_shape(self.builder(phase))
        network = Network.of(model)
        if self.spec.model.remat != "none" and not remat.blocks(model):
            raise ValueError(
                f"config.model.remat (={self.spec.model.remat!r}) must be 'none' for "
                f"{self.spec.model.name!r}, which has no residual blocks"
            )
        rate = optimizer.schedule(
            phase.optimizer,
            total_steps=self.total_steps(phase),
            steps_per_epoch=self.steps_per_epoch,
        )
        return Program(
            network=network,
            mean=self._mean,
            std=self._std,
            dtype=jnp.dtype(self.spec.model.dtype),
            optimizer=optimizer.optimizer(
                phase.optimizer,
                rate,
                quantizer_state(network.variables),
                total_steps=self.total_steps(phase),
            ),
            rate=rate,
            loss=phase.loss,
            ema_decay=phase.ema_decay,
            seed=self.spec.seed,
            accumulation_steps=phase.accumulation_steps,
            remat=self.spec.model.remat,
            oscillation=oscillation.plan(phase.oscillation, self.total_steps(phase)),
        )

    def teacher(self, phase: PhaseSpec) -> Teacher | None:
        """Reads the network whose output the phase learns; None where there is none."""
        return teacher.read(
            self.spec.model,
            phase,
            self.mesh,
            num_classes=self.train_data.num_classes,
            in_features=self.train_data.image_shape[-1],
        )

    def train_batches(self) -> data.TrainIterator:
        """Batches of this process, without end."""
        return data.train_iterator(
            self.train_data,
            batch_size=self.spec.data.batch_size,
            seed=self.spec.seed,
            augment=self.spec.data.augment,
            pad=self.spec.data.pad_pixels,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.spec.data.workers,
            on_broken_image=self.spec.data.on_broken_image,
            note=self._note,
        )

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the mesh's devices."""
        return sharding.to_devices(batch, sharding.batch_sharding(self.mesh))

    def train_step(self, program: Program, state: TrainState) -> Callable[..., Any]:
        """`train_step`, compiled for states that lie as `state` does, which it gives up."""
        placed = jax.tree.map(lambda array: array.sharding, state)
        return jax.jit(
            data_parallel.on_mesh(self.mesh, train_step, program),
            donate_argnums=0,
            out_shardings=(placed, sharding.replicated(self.mesh)),
            compiler_options=compilation.compiler_options(),
        )

    def compiled_step(
        self, phase: PhaseSpec, program: Program, state: TrainState, taught: Teacher | None
    ) -> tuple[Callable[..., Any], str]:
        """`train_step`, compiled ahead of time; with a line on the memory it takes.

        Raises:
          MemoryShortage: if a device cannot hold what a step takes; the message gives advice.
        """
        shapes = {"image": (self.train_data.image_shape, np.uint8), "label": ((), np.int32)}
        spread = sharding.batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((self.spec.data.batch_size, *shape), kind, sharding=spread)
            for name, (shape, kind) in shapes.items()
        }
        return memory.compile_step(
            self.train_step(program, state),
            (state, batch, taught),
            limit_gib=self.spec.memory_limit_gib,
            advice=memory.advice(self.spec, phase),
        )

    def estimate_statistics(
        self,
        program: Program,
        params: Arrays,
        statistics: Arrays,
        count: int,
        stop: preemption.Stop = preemption.never,
    ) -> Arrays:
        """`statistics`, with those of batch norms over the first `count` training batches."""
        step = jax.jit(
            data_parallel.on_mesh(self.mesh, averages.batch_statistics, program),
            out_shardings=sharding.replicated(self.mesh),
            compiler_options=compilation.compiler_options(),
        )
        with self.train_batches() as batches:
            found = averages.pooled(
                jax.device_get(step(params, statistics, self.place(batch)))
                for batch in preemption.until(stop, itertools.islice(batches, count))
            )
        return {
            path: sharding.put(found[path].astype(old.dtype), old.sharding)
            if path in found
            else old
            for path, old in statistics.items()
        }

    def test_batches(self, count: int) -> Iterator[Mapping[str, np.ndarray]]:
        """The first `count` test images, or a few less, in batches of one size; on every process.

        Yields:
          "image", "label" and "mask", which is False for a broken image, a black one here.
        """
        height, width, _ = self.test_data.image_shape
        count = min(count, len(self.test_data))
        largest = min(self.spec.data.eval_batch_size, max(_LARGEST_TEST // (height * width), 1))
        batches = -(-count // largest)
        found = data.eval_batches(
            self.test_data,
            batch_size=count // batches,
            workers=self.spec.data.workers,
            on_broken_image=self.spec.data.on_broken_image,
            note=self._note,
        )
        yield from itertools.islice(found, batches)

    def evaluator(
        self, program: Program, stop: preemption.Stop = preemption.never
    ) -> Callable[[Arrays, Arrays], dict[str, float]]:
        """A function of parameters and statistics that evaluates every test example once.

        It raises Stopped when `stop` says so.
        """
        step = jax.jit(
            functools.partial(eval_step, program),
            out_shardings=sharding.replicated(self.mesh),
            compiler_options=compilation.compiler_options(),
        )

        def evaluate(params: Arrays, statistics: Arrays) -> dict[str, float]:
            batches = data.eval_batches(
                self.test_data,
                batch_size=self.spec.data.eval_batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                workers=self.spec.data.workers,
                on_broken_image=self.spec.data.on_broken_image,
                note=self._note,
            )
            sums: list[Any] = []
            for batch in batches:
                preemption.check(stop)
                sums.append(step(params, statistics, self.place(batch)))
                # Only two batches at a time are on the devices.
                jax.block_until_ready(sums[-2:-1])
            totals = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
            left_out = self.spec.data.on_broken_image == "skip"
            assert left_out or totals["count"] == len(self.test_data), totals
            return {
                "test_accuracy": totals["correct"] / totals["count"],
                "test_loss": totals["loss"] / totals["count"],
                "test_count": int(totals["count"]),
            }

        return evaluate
