"""Blocks that are computed again, and computation in bfloat16."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uniq_jax import config as c
from uniq_jax import quantize, rules
from uniq_jax.models.resnet import BasicBlock
from uniq_jax.train import remat, start
from uniq_jax.train.network import Network, split
from uniq_jax.train.run import Run
from uniq_jax.train.state import TrainState
from uniq_jax.train.step import train_step

# Most of the time is compilation.
QUICKLY = {"xla_backend_optimization_level": 0}


def make_spec(*, dtype="float32", name="resnet8", which="none"):
    config = c.base()
    config.data.batch_size = 32
    config.model.name = name
    config.model.options = {"width": 4} if "resnet" in name else {}
    config.model.dtype = dtype
    config.model.remat = which
    config.phases = ("quantized",)
    widths = {"weight_bits": 2, "activation_bits": 2}
    optimizer = {"learning_rate": 0.05}
    config.quantized = c.phase("uniq_n2uq", **widths, ema_decay=0.9, optimizer=optimizer)
    return c.run_spec(config)


def abstract(**values):
    """Run, program, and shapes of a state and a batch."""
    run = Run(make_spec(**values))
    phase = run.spec.phases[0]
    program = run.program(phase)
    state = start.abstract_state(run.builder(phase), program, run.mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((32,), jnp.int32),
    }
    return run, program, state, batch


def residual_bytes(program, state, batch, which):
    """Bytes of what the backward pass gets from the forward pass, the parameters included."""

    def pullback(params, images):
        def loss(params):
            model = program.build(params, state.statistics)
            model.train()
            remat.rematerialize(model, which)
            return jnp.sum(model(program.normalize(images)))

        return jax.vjp(loss, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, state.params, batch["image"]))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in kept)


class Small(nnx.Module):
    """One residual block between the ends."""

    def __init__(self, **options):
        self.conv1 = nnx.Conv(1, 8, (3, 3), **options)
        self.blocks = nnx.List([BasicBlock(8, 8, 1, **options)])
        self.fc = nnx.Linear(8, 10, **options)

    def __call__(self, x):
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


def small(dtype, param_dtype, optimizer):
    """Program, state and a batch; no parameter's initialization is compiled."""

    def build():
        model = Small(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        return quantize(model, rules.uniq_n2uq(2))

    model = nnx.eval_shape(build)
    shapes = jax.eval_shape(lambda: split(build()))
    rng = np.random.default_rng(0)
    params, statistics = jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.1, 0.9, a.shape) - (a.ndim > 1) * 0.5, a.dtype),
        shapes,
    )
    run, phase = Run(make_spec()), make_spec().phases[0]
    program = dataclasses.replace(
        run.program(phase),
        network=Network.of(model),
        dtype=jnp.dtype(dtype),
        optimizer=optimizer,
        ema_decay=0.0,
    )
    labels = np.arange(16) % 10
    images = rng.integers(0, 64, (16, 8, 8, 1)) + 20 * labels[:, None, None, None]
    state = TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))
    return program, state, {"image": images.astype(np.uint8), "label": labels.astype(np.int32)}


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # NNX's batch norm.
def test_recomputed_blocks_have_the_same_gradients_and_keep_less():
    with jax.enable_x64(True):
        trace = optax.trace(0.9)  # Its state after a step is the gradient.
        program, state, batch = small(jnp.float64, jnp.float64, trace)
        kept, found = {}, {}
        for which in ("none", "convolutions", "blocks"):
            one = dataclasses.replace(program, remat=which)
            kept[which] = residual_bytes(program, state, batch, which)
            step = jax.jit(functools.partial(train_step, one), compiler_options=QUICKLY)
            found[which] = step(state, batch)
        assert kept["blocks"] < 0.8 * kept["convolutions"], kept
        assert kept["convolutions"] < 0.6 * kept["none"], kept
        plain, metrics = found.pop("none")
        for other, other_metrics in found.values():
            np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-12)
            largest = max(float(jnp.linalg.norm(g)) for g in plain.opt_state.trace.values())
            for path, gradient in plain.opt_state.trace.items():
                other_gradient = other.opt_state.trace[path]
                np.testing.assert_allclose(
                    other_gradient, gradient, rtol=1e-8, atol=1e-10 * largest, err_msg=path
                )
            for path, statistic in plain.statistics.items():
                assert not np.array_equal(statistic, state.statistics[path]), path
                np.testing.assert_allclose(other.statistics[path], statistic, rtol=1e-6)


def test_blocks_are_found_and_keep_their_paths():
    _, program, state, _ = abstract()
    model = program.build(state.params, state.statistics)
    types = [type(block) for block in remat.blocks(model)]
    assert len(types) == 3
    remat.rematerialize(model, "none")
    assert [type(block) for block in remat.blocks(model)] == types
    paths = Network.of(model).variables
    remat.rematerialize(model, "blocks")
    for block, kind in zip(remat.blocks(model), types):
        assert isinstance(block, kind)
        assert type(block) is not kind
    assert Network.of(model).variables == paths


def test_a_network_without_blocks_is_named():
    message = r"config.model.remat \(='blocks'\) must be 'none' for 'alexnet', which has no"
    with pytest.raises(ValueError, match=message):
        abstract(name="alexnet", which="blocks")
    with pytest.raises(c.ConfigError, match=r"config.model.remat \(='block'\).*'blocks'"):
        make_spec(which="block")


def operand_dtypes(program, state, batch, *primitives):
    """The dtypes of what goes into these primitives, forward and backward."""
    found = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in primitives:
                found.update(str(v.aval.dtype) for v in equation.invars)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(value, "eqns"):
                    visit(getattr(value, "jaxpr", value))

    visit(jax.make_jaxpr(functools.partial(train_step, program))(state, batch).jaxpr)
    return found


PRODUCTS = ("conv_general_dilated", "dot_general")
LOSS = ("exp", "log")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_of_the_models_dtype_and_losses_of_float32(dtype):
    _, program, state, batch = abstract(dtype=dtype)
    assert operand_dtypes(program, state, batch, *PRODUCTS) == {dtype}
    assert operand_dtypes(program, state, batch, *LOSS) == {"float32"}


def test_training_in_bfloat16_keeps_everything_in_float32():
    optimizer = optax.chain(optax.trace(0.9), optax.scale(-0.01))
    program, state, batch = small(jnp.bfloat16, jnp.float32, optimizer)
    assert operand_dtypes(program, state, batch, *PRODUCTS) == {"bfloat16"}
    step = jax.jit(functools.partial(train_step, program), compiler_options=QUICKLY)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves((state, metrics))}
    assert kinds == {"float32", "int32"}  # int32 is the count of steps.
    assert losses[-1] < 0.8 * losses[0]
