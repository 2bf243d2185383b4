"""Networks that others trained on CIFAR-10: their accuracy here, float and at 8 bits.

`make cifar-networks` prints the README's table.
"""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uniq_jax import calibrate, models, quantize, rules
from uniq_jax.interop import load_torch_state_dict, to_torch_state_dict

pytestmark = pytest.mark.data


def images_of(path, count=None):
    """The first images (count, 32, 32, 3), normalized as these networks want them, and labels."""
    from PIL import Image

    with np.load(path) as data:
        blob, offsets, labels = data["blob"].tobytes(), data["offsets"], data["labels"]
    strips, decoded = [], 0
    for start, stop in itertools.pairwise(offsets):
        if decoded >= (count or len(labels)):
            break
        strip = np.asarray(Image.open(io.BytesIO(blob[start:stop])).convert("RGB"))
        strips.append(strip.reshape(-1, 32, 32, 3))
        decoded += len(strips[-1])
    x = np.concatenate(strips)[:count] / 255
    x = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return x.astype(np.float32), labels[:count]


@pytest.fixture(scope="module")
def test_set(shared_dir):
    images, labels = images_of(shared_dir / "data" / "cifar10" / "test_a.npz")
    assert images.shape == (5000, 32, 32, 3)
    return images, labels


def accuracy(model, images, labels):
    """In per cent, in evaluation mode."""
    graphdef, state = nnx.split(nnx.clone(model))

    @jax.jit
    def predict(state, x):
        model = nnx.merge(graphdef, state)
        model.eval()
        return jnp.argmax(model(x), axis=-1)

    found = [predict(state, x) for x in np.split(images, 10)]
    return 100 * np.mean(np.concatenate(found) == labels)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "percent"), [(20, 91.30), (56, 93.00)])
def test_float_and_w8a8(shared_dir, test_set, depth, percent, capsys):
    """The published weights reach their accuracy; 8 bits, calibrated alone, cost 0.3 at most."""
    images, labels = test_set
    with np.load(shared_dir / "data" / "weights" / f"cifar10_resnet{depth}.npz") as file:
        state_dict = dict(file)
    model = models.create(f"resnet{depth}", num_classes=10, rngs=nnx.Rngs(0))
    report = load_torch_state_dict(model, state_dict, strict=True)
    assert len(report.loaded) == len([k for k in state_dict if "num_batches" not in k])
    back = to_torch_state_dict(model)
    assert back.keys() == state_dict.keys()
    assert all(np.array_equal(back[key], state_dict[key]) for key in back)

    whole = accuracy(model, images, labels)
    assert abs(whole - percent) < 0.005

    quantize(model, rules.uniq(bits=8))
    train_images, _ = images_of(shared_dir / "data" / "cifar10" / "train.npz", count=1000)
    calibrate(model, np.split(train_images, 4))
    quantized = accuracy(model, images, labels)
    with capsys.disabled():
        print(f"\n| ResNet-{depth} | {whole:.2f}% | {quantized:.2f}% |")
    assert quantized >= whole - 0.3
