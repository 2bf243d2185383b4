"""Runs that compile in a second: a network of three layers on few digits. Also a config file, and
a program for tests of several processes or other devices.
"""

import io
import pathlib
import sys

import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from uniq_jax import config as c
from uniq_jax.models import registry
from uniq_jax.train import loop, preemption


class Small(nnx.Module):
    def __init__(self, *, num_classes, in_features, rngs, dtype=None, param_dtype=jnp.float32):
        def conv(inputs):
            return nnx.Conv(inputs, 8, (3, 3), strides=2, use_bias=False, **types)

        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1, self.bn1 = conv(in_features), nnx.BatchNorm(8, **types)
        self.conv2, self.bn2 = conv(8), nnx.BatchNorm(8, **types)
        self.fc = nnx.Linear(8, num_classes, **types)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((1, 2)))


def get_config(arg=None):
    """A float phase of 3 steps and a quantized one of 6; makes the network known."""
    del arg
    registry.MODELS["small"] = Small  # type: ignore[index]
    config = c.base()
    config.data.update(batch_size=32, eval_batch_size=52, augment="crop", pad_pixels=1)
    config.data.update(train_split="train[:96]", test_split="test[:200]")
    config.model.name = "small"
    config.phases = ("float", "quantized")
    config.float = c.phase("float")
    config.quantized = c.phase(
        "uniq",
        weight_bits=2,
        activation_bits=2,
        total_epochs=2.0,
        calibration_batches=2,
        batch_norm_batches=1,
        optimizer={"learning_rate": 0.01},
    )
    config.checkpoint_every_steps = 0
    config.log_every_steps = 1
    config.layer_metrics_every_steps = 0
    config.tensorboard = False
    config.export.formats = ""
    return config


class StopAt:
    """Says stop from its n-th call on."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left <= 0


def train(config, workdir, stop=preemption.never):
    """Returns what was printed; with the message where the run was stopped."""
    console = Console(file=io.StringIO(), width=200)
    try:
        loop.train(c.run_spec(config), pathlib.Path(workdir), console, stop)
    except preemption.Stopped as stopped:
        console.print(f"Stopped: {stopped}")
    return console.file.getvalue()


def main(workdir, stop_at, mesh, process=None, port=None):
    """Trains as a command does, with an exit code."""
    config = get_config()
    config.mesh.data, config.mesh.model = map(int, mesh.split("x"))
    if process is not None:
        import jax

        jax.distributed.initialize(f"localhost:{port}", 2, int(process))
        config.quantized.total_epochs = 10000.0
        config.eval_every_epochs = 20.0
    else:
        config.model.dtype = config.model.param_dtype = "float64"
    with preemption.listening() as hears:
        output = train(config, workdir, StopAt(int(stop_at)) if int(stop_at) else hears)
    print(output, flush=True)
    sys.exit(preemption.EXIT_CODE if "Stopped" in output else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
