"""What a trained network becomes where it is deployed: frozen, compared with training, timed."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uniq_jax import deploy
from uniq_jax.quantization import dequantize
from uniq_jax.spec import PhaseSpec
from uniq_jax.train import compilation, sharding
from uniq_jax.train.network import Arrays
from uniq_jax.train.run import Run
from uniq_jax.train.state import TrainState

# A network is called so often, or for so long, to be timed.
_REPEATS = 30
_TIMING_S = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A trained network and its integer form.

    Attributes:
      model: as training evaluates it, on one device.
      network: with integer thresholds wherever there can be some.
      check: of both, on test images.
    """

    model: nnx.Module
    network: deploy.FrozenNetwork
    check: deploy.Verification


def freeze(run: Run, phase: PhaseSpec, state: TrainState) -> Frozen:
    """Freezes the network that a phase evaluates, and compares all codes on test images.

    Raises:
      ValueError: if it cannot be frozen (see `uniq_jax.freeze`), or this process does not hold all
        parameters.
      NotImplementedError: as `uniq_jax.freeze`.
    """
    program = run.program(phase)
    model = program.build(*(_here(arrays) for arrays in state.evaluated))
    about = deploy.About(
        name=_name(run, phase),
        labels=run.test_data.class_names,
        mean=program.mean,
        std=program.std,
        resize_size=run.spec.data.resize_size,
    )
    network = deploy.freeze(model, run.test_data.image_shape, about=about)
    return Frozen(model, network, check(run, phase, model, network))


def check(
    run: Run, phase: PhaseSpec, model: nnx.Module, network: deploy.FrozenNetwork
) -> deploy.Verification:
    """Compares the evaluation of training with a frozen network, on `export.check_images`."""
    normalize = jax.jit(run.program(phase).normalize)
    batches = run.test_batches(run.spec.export.check_images)
    return deploy.verify(model, network, (normalize(batch["image"]) for batch in batches))


def milliseconds(frozen: Frozen) -> tuple[float, float]:
    """Time of one image in the float network and in the integer network, each on its own.

    The float network is the same one without quantizers. Both are compiled with constant weights,
    and called in turns; each time is a median.
    """
    floats = dequantize(nnx.clone(frozen.model))
    floats.eval()
    graphdef, state = nnx.split(floats)

    def run_float(image: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, state)
        return model(image)

    image = jnp.zeros((1, *frozen.network.graph.image_shape), jnp.float32)
    # The options that float convolutions are faster with make int8 ones slower by far.
    programs = [
        jax.jit(function, compiler_options=options).lower(image).compile()
        for function, options in (
            (run_float, compilation.compiler_options()),
            (frozen.network, None),
        )
    ]
    times: list[list[float]] = [[], []]
    begin = time.perf_counter()
    for repeat in range(_REPEATS + 1):
        for program, found in zip(programs, times):
            start = time.perf_counter()
            jax.block_until_ready(program(image))
            if repeat:  # The first call is slower.
                found.append(time.perf_counter() - start)
        if repeat and time.perf_counter() - begin > _TIMING_S:
            break
    float_s, integer_s = map(statistics.median, times)
    return 1e3 * float_s, 1e3 * integer_s


def _here(arrays: Arrays) -> Arrays:
    """The arrays on this process's default device."""
    found: dict[str, jax.Array] = {}
    for path, array in arrays.items():
        whole: np.ndarray | None = sharding.whole(array)
        if whole is None:
            raise ValueError(
                f"{path} lies in parts on the devices of several processes; --mode=export in one "
                "process freezes the network"
            )
        found[path] = jnp.asarray(whole)
    return found


def _name(run: Run, phase: PhaseSpec) -> str:
    widths = f"W{phase.weight_bits}A{phase.activation_bits}"
    return f"{run.spec.model.name} {phase.method} {widths} on {run.spec.data.name}"
