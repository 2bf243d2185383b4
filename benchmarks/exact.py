"""Whether frozen networks have the codes of training's evaluation: all methods, widths, networks.

python benchmarks/exact.py --data_dir=DIRECTORY   # of CIFAR-10, prepared by TFDS

Every case freezes one network and compares all codes of all layers over real images: ResNet-20
after some hundred steps on CIFAR-10; MobileNet-V2 and the ResNets-18 of both papers with random but
calibrated weights. Then once more with parameters and images that put sums exactly on thresholds:
steps, factors and biases are made dyadic, so that float32 operations need not round, and numbers
meet thresholds exactly; each case counts such ties on a few images.

On fewer images, files for other runtimes are compared with the frozen network too: OpenVINO, ONNX
Runtime and qonnx's interpreter. A float layer's sums are rounded in an order that a runtime
chooses, so codes behind the float ends of the papers' networks may flip there. That is counted. The
same networks with ends of 8 bits have no such layer, and nothing may flip.

A case that is done is not done again, unless code or versions that it rests on have changed. The
last line is the verdict.
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from exact_cases import NETWORKS, Case, cases
from exact_foundation import foundation_of
from exact_runtimes import EXACT, compared
from exact_ties import tie, tied_images, ties
from flax import nnx

from uniq_jax import calibrate, data, deploy, models
from uniq_jax.models.activations import BiasedPRelu

_SPLITS = ("train", "test")
_TRAINED = "resnet20"
_BATCH = 100
# Of so many images, ties are counted.
_TIE_IMAGES = 10
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    """Runs the cases that the arguments choose."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", default=None, help="of TFDS; default: TFDS_DATA_DIR")
    parser.add_argument("--out", default="runs/exact", help="where results are kept")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    methods = ["uniq", "n2uq", "uniq_n2uq"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--images", type=int, default=1000, help="compared in each case")
    parser.add_argument("--runtime_images", type=int, default=50, help="in other runtimes, or 0")
    parser.add_argument("--qonnx_images", type=int, default=5, help="in qonnx's interpreter")
    parser.add_argument(
        "--steps", type=int, default=300, help="of float ResNet-20; a tenth follow quantized"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cores")
    parser.add_argument("--part", default="1/1", help="K/N: every Nth case from the Kth on")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    if arguments.steps < 1:
        parser.error(f"--steps (={arguments.steps}) must be at least 1")
    if arguments.jobs > 1:
        _share(arguments.jobs)

    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    foundation = foundation_of(arguments)
    train, test = (data.load("cifar10", split=s, data_dir=arguments.data_dir) for s in _SPLITS)
    if not 1 <= arguments.images <= len(test):
        parser.error(f"--images (={arguments.images}) must be from 1 to {len(test)}")
    starts = None
    wanted = list(cases(arguments.networks, arguments.methods, arguments.bits))
    wanted = wanted[part - 1 :: parts]
    codes = mismatches = classes = elsewhere = 0
    runtimes: dict[str, collections.Counter[str]] = {}
    for i, case in enumerate(wanted):
        path = out / f"{str(case).replace(' ', '_')}_{arguments.images}.json"
        if _done(path).get("foundation") != foundation:
            if case.network == _TRAINED and starts is None:
                starts = _trained_float(train, arguments.steps)
            result = {**check(case, train, test, arguments, starts), "foundation": foundation}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
            if i % 8 == 7:  # Compiled programs of what is done would fill the memory.
                jax.clear_caches()
        result = _done(path)
        print(f"{i + 1:3d}/{len(wanted)}  {_line(case, result)}", flush=True)
        codes += result["codes"] + result["tied"]["codes"]
        mismatches += result["mismatches"] + result["tied"]["mismatches"]
        classes += result["class_mismatches"] + result["tied"]["class_mismatches"]
        for runtime, numbers in result["runtimes"].items():
            ends = "float ends" if case.has_float_layers else "integers"
            runtimes.setdefault(f"{runtime}, {ends}", collections.Counter()).update(numbers)
            if runtime in EXACT and not case.has_float_layers:
                classes += numbers["class_mismatches"]
                elsewhere += numbers["mismatches"]
    for runtime, numbers in sorted(runtimes.items()):
        print(f"{runtime}: {_differing(numbers)}")
    print(f"in exact forms of networks of integers: classes {classes}, codes {elsewhere}")
    print(f"mismatching codes: {mismatches} of {codes}")
    sys.exit(bool(mismatches or classes or elsewhere))


def _share(jobs: int) -> None:
    """Does all cases in processes of their own, each with its part of the cores.

    Most of a case is work of one thread: tracing, compiling, looking for thresholds.
    """
    cores = sorted(os.sched_getaffinity(0))
    children = []
    for i in range(jobs):
        os.sched_setaffinity(0, cores[i::jobs] or cores)
        command = [sys.executable, *sys.argv, "--jobs=1", f"--part={i + 1}/{jobs}"]
        children.append(subprocess.Popen(command))
    os.sched_setaffinity(0, cores)
    # A part fails where something differs, which the sum over all parts says again.
    for child in children:
        child.wait()


def _done(path: pathlib.Path) -> dict[str, Any]:
    """A case's kept result; {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _differing(numbers: Mapping[str, int]) -> str:
    text = f"classes {numbers['class_mismatches']} of {numbers['images']}"
    if numbers["codes"]:
        text += f", codes {numbers['mismatches']} of {numbers['codes']}"
    return text


def _line(case: Case, result: dict[str, Any]) -> str:
    tied = result["tied"]
    return (
        f"{case!s:40s} mismatches {result['mismatches']} of {result['codes']}, on thresholds "
        f"{tied['mismatches']} of {tied['codes']} ({tied['ties']} ties); {result['seconds']:.0f} s"
        + "".join(f"\n{'':9s}{r}: {_differing(n)}" for r, n in result["runtimes"].items())
    )


def check(
    case: Case, train: Any, test: Any, arguments: argparse.Namespace, start: nnx.State | None
) -> dict[str, Any]:
    """Freezes the network of one case, twice, and compares."""
    began = time.perf_counter()
    # Of 96 pixels the last images are 3x3. XLA:CPU takes 50 times as long for smaller ones.
    size = 32 if case.network == _TRAINED else 96
    model: Any = case.create()
    if case.network == _TRAINED:
        nnx.update(model, start)
        calibrate(model, _images(train, _BATCH, size))
        _train(model, train, arguments.steps // 10, learning_rate=0.01)
    else:
        _unsettle(model)
        _set_statistics(model, next(_images(train, _BATCH, size)))
        calibrate(model, _images(train, _BATCH, size))
    frozen = deploy.freeze(model, (size, size, 3))
    found = deploy.verify(model, frozen, _images(test, arguments.images, size))
    result = _numbers(found)
    runtimes: dict[str, Any] = {}
    if arguments.runtime_images:
        few = np.concatenate(list(_images(test, arguments.runtime_images, size)))
        runtimes = compared(model, frozen, few, arguments.qonnx_images)

    tie(model)
    frozen = deploy.freeze(model, (size, size, 3))
    batches = [tied_images(model, b) for b in _images(test, _BATCH, size)]
    tied = _numbers(deploy.verify(model, frozen, batches))
    tied["ties"] = ties(frozen, batches[0][:_TIE_IMAGES])
    seconds = time.perf_counter() - began
    return {**result, "runtimes": runtimes, "tied": tied, "seconds": seconds}


def _numbers(found: deploy.Verification) -> dict[str, Any]:
    return {
        "images": found.images,
        "codes": found.codes,
        "mismatches": found.mismatches,
        "class_mismatches": found.class_mismatches,
        "logit_difference": found.logit_difference,
    }


def _images(source: Any, count: int, size: int) -> Iterator[np.ndarray]:
    """Batches of normalized images, enlarged to `size`."""
    for start in range(0, count, _BATCH):
        x = source.images[start : min(start + _BATCH, count)].astype(np.float32) / 255
        x = (x - np.float32(_MEAN)) / np.float32(_STD)
        yield x.repeat(size // 32, axis=1).repeat(size // 32, axis=2)


def _trained_float(train: Any, steps: int) -> nnx.State:
    model = models.create(_TRAINED, num_classes=10, rngs=nnx.Rngs(0))
    loss = _train(model, train, steps, learning_rate=0.05)
    print(f"float ResNet-20 after {steps} steps: loss {loss:.2f}", flush=True)
    return nnx.state(model, (nnx.Param, nnx.BatchStat))


def _train(model: Any, train: Any, steps: int, *, learning_rate: float) -> float:
    """Trains in place; the last loss."""
    model.train()
    schedule = optax.cosine_decay_schedule(learning_rate, steps + 1)
    optimizer = nnx.Optimizer(model, optax.sgd(schedule, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss_fn(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            return jnp.mean(losses)

        loss, gradient = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradient)
        return loss

    loss = jnp.inf
    epoch = len(train) // _BATCH * _BATCH
    batches = itertools.chain.from_iterable(_images(train, epoch, 32) for _ in itertools.count())
    for i, images in enumerate(itertools.islice(batches, steps)):
        start = i * _BATCH % epoch
        loss = step(model, optimizer, images, train.labels[start : start + _BATCH])
    model.eval()
    return float(loss)


def _unsettle(model: nnx.Module) -> None:
    """Batch norms and activations as training could leave them, slopes of either sign."""
    rng = np.random.default_rng(0)

    def normal(variable: Any, mean: float, deviation: float) -> None:
        variable[...] = jnp.asarray(rng.normal(mean, deviation, variable.shape), jnp.float32)

    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            normal(module.scale, 0.7, 0.5)
            normal(module.bias, 0.1, 0.3)
        if isinstance(module, BiasedPRelu):
            normal(module.before, 0, 0.2)
            normal(module.slope, 0.25, 0.1)
            normal(module.after, 0, 0.2)


def _set_statistics(model: Any, images: np.ndarray) -> None:
    """Batch-norm statistics of one batch."""
    model.train()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0
    nnx.jit(lambda model, x: model(x))(model, images)
    model.eval()


if __name__ == "__main__":
    main()
