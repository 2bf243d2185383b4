"""Whole networks are the reference programs': logits, loss, gradients, statistics, trajectories.

Everything goes through the public functions, in float64: `models.create`, `load_torch_state_dict`,
`to_torch_state_dict`.
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uniq_jax import models
from uniq_jax.interop import load_torch_state_dict, to_torch_state_dict
from uniq_jax.nn import QuantizerParam

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def golden_dir(shared_dir):
    return shared_dir / "golden"


class Golden:
    """One golden file: its arrays, what it says of the network, and the drawn parameters."""

    def __init__(self, directory, name):
        spec = importlib.util.spec_from_file_location("golden_state", directory / "state.py")
        draw = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(draw)
        with np.load(directory / f"{name}.npz") as file:
            self.arrays = dict(file)
        self.meta = meta = json.loads(str(self.arrays["meta"]))
        self.state_dict = draw.make_state(meta["shapes"], meta["seed"])
        images, labels = draw.make_batch(
            seed=meta["seed"],
            batch=meta["batch"],
            channels=3,
            size=meta["size"],
            classes=meta["classes"],
        )
        self.images = images.transpose(0, 2, 3, 1)
        self.labels = labels
        self.probe = lambda name: draw.make_probe(name, meta["shapes"][name], meta["seed"])

    def build(self):
        """The network, with the golden parameters."""
        meta = self.meta
        model = models.create(
            meta["model"],
            num_classes=meta["classes"],
            rngs=nnx.Rngs(0),
            method=meta["quantizer"],
            weight_bits=meta["weight_bits"],
            activation_bits=meta["activation_bits"],
            granularity=meta.get("granularity", "layer_wise").removesuffix("_wise"),
            quantize_downsample=meta.get("quantize_downsample", True),
        )
        self.report = load_torch_state_dict(model, self.state_dict)
        return model

    def loss(self, graphdef, params, others):
        """Mean cross entropy in training mode; and the logits and new statistics."""
        model = nnx.merge(graphdef, params, nnx.clone(others))
        model.train()
        logits = model(jnp.asarray(self.images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(self.labels))
        return jnp.mean(losses), (logits, nnx.state(model, nnx.BatchStat))


def relative(found, wanted):
    return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(
    "name",
    [
        "uniq_preact_resnet32_w1a1",
        "uniq_preact_resnet32_w2a2",
        pytest.param("uniq_preact_resnet18_w2a2", marks=pytest.mark.slow),
        "n2uq_resnet18_w2a2",
        pytest.param("n2uq_mobilenet_v2_w4a4", marks=pytest.mark.slow),
    ],
)
def test_network(golden_dir, name):
    golden = Golden(golden_dir, name)
    with jax.enable_x64(True):
        model = golden.build()
        assert not golden.report.missing
        assert not golden.report.unexpected
        back = to_torch_state_dict(model)
        assert back.keys() == golden.state_dict.keys()
        for key, value in golden.state_dict.items():
            np.testing.assert_array_equal(back[key], value, strict=True, err_msg=key)

        graphdef, params, others = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def evaluate(params, others, images):
            model = nnx.merge(graphdef, params, others)
            model.eval()
            return model(images)

        eval_logits = evaluate(params, others, jnp.asarray(golden.images))
        (loss, (train_logits, statistics)), gradients = jax.jit(
            jax.value_and_grad(
                lambda params, others: golden.loss(graphdef, params, others), has_aux=True
            )
        )(params, others)
        nnx.update(model, gradients, statistics)
        after = to_torch_state_dict(model)

    assert relative(eval_logits, golden.arrays["eval_logits"]) < 1e-9
    assert relative(train_logits, golden.arrays["train_logits"]) < 1e-9
    assert relative(loss, golden.arrays["loss"]) < 1e-9
    norms = {
        key.removeprefix("grad_norm/"): norm
        for key, norm in golden.arrays.items()
        if key.startswith("grad_norm/")
    }
    learned = {key for key, path in golden.report.loaded.items() if path in _paths(gradients)}
    assert norms.keys() == learned
    largest = max(norms.values())
    for key, norm in norms.items():
        scale = max(norm, 1e-4 * largest)
        assert abs(np.linalg.norm(after[key]) - norm) < 1e-6 * scale, key
        probe = golden.probe(key)
        product = np.sum(after[key] * probe)
        tolerance = 1e-6 * scale * max(1, np.linalg.norm(probe))
        assert abs(product - golden.arrays[f"grad_probe/{key}"]) < tolerance, key
    checked = 0
    for key, norm in golden.arrays.items():
        if key.startswith("stat_norm/"):
            found = np.linalg.norm(after[key.removeprefix("stat_norm/")])
            assert abs(found - norm) < 1e-9 * norm, key
            checked += 1
    assert checked == len(nnx.to_flat_state(statistics))


def _paths(state):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


@pytest.mark.parametrize("name", ["uniq_preact_resnet32_w2a2", "n2uq_resnet18_w2a2"])
def test_trajectory(golden_dir, name):
    """The losses of the first steps on one batch, with the papers' optimizers."""
    golden = Golden(golden_dir, f"trajectory_{name}")
    meta = golden.meta
    with jax.enable_x64(True):
        model = golden.build()
        graphdef, params, others = nnx.split(model, nnx.Param, ...)
        learned = jax.tree.map(
            lambda variable: isinstance(variable, QuantizerParam),
            params,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        if meta["optimizer"] == "sgd":
            decayed = jax.tree.map(lambda is_learned: not is_learned, learned)
            optimizer = optax.chain(
                optax.add_decayed_weights(meta["weight_decay"], mask=decayed),
                optax.trace(meta["momentum"]),
                optax.scale(-meta["learning_rate"]),
            )
        else:
            slower = meta["threshold_learning_rate"] / meta["learning_rate"]
            optimizer = optax.chain(
                optax.scale_by_adam(meta["b1"], meta["b2"], meta["eps"]),
                optax.masked(optax.scale(slower), learned),
                optax.scale(-meta["learning_rate"]),
            )

        @jax.jit
        def step(params, others, moments):
            (loss, (_, statistics)), gradients = jax.value_and_grad(
                lambda params: golden.loss(graphdef, params, others), has_aux=True
            )(params)
            updates, moments = optimizer.update(gradients, moments, params)
            return loss, optax.apply_updates(params, updates), statistics, moments

        moments = optimizer.init(params)
        losses = []
        for _ in range(meta["steps"]):
            loss, params, others, moments = step(params, others, moments)
            losses.append(float(loss))
    np.testing.assert_allclose(losses, golden.arrays["losses"], rtol=1e-6)
