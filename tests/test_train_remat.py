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
from uniq_jax.models.cifar_resnet import CifarResNet
from uniq_jax.train import compilation, remat, start
from uniq_jax.train.run import Run
from uniq_jax.train.state import Network, TrainState, split, train_step

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


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # NNX's batch norm.
def test_recomputed_blocks_have_the_same_gradients_and_keep_less():
    with jax.enable_x64(True):
        model = CifarResNet(
            8, num_classes=10, in_features=1, width=4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        quantize(model, rules.uniq_n2uq(2))
        program = dataclasses.replace(
            Run(make_spec()).program(make_spec().phases[0]),
            network=Network.of(model),
            dtype=jnp.dtype(jnp.float64),
            optimizer=optax.trace(0.9),  # Its state after a step is the gradient.
            ema_decay=0.0,
        )
        params, statistics = split(model)
        state = TrainState(
            jnp.zeros((), jnp.int32), params, statistics, program.optimizer.init(params)
        )
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (8, 8, 8, 1), np.uint8)
        batch = {"image": jnp.asarray(images), "label": jnp.arange(8)}
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


def test_training_in_bfloat16_keeps_everything_in_float32(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_options", lambda: QUICKLY)
    run, program, _, _ = abstract(dtype="bfloat16")
    phase = run.spec.phases[0]
    state = start.fresh_state(run.builder(phase), program, run.mesh)
    step, _ = run.compiled_step(phase, program, state, None)
    losses = []
    with run.train_batches() as batches:
        for _ in range(60):
            state, metrics = step(state, run.place(next(batches)), None)
            losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves(state)
    assert {str(leaf.dtype) for leaf in leaves} == {"float32", "int32"}  # Counts of steps.
    assert {str(leaf.dtype) for leaf in metrics.values()} == {"float32"}
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
