"""What a run is told, as frozen dataclasses.

Field names are the config's keys; `uniq_jax.config` builds these from a ConfigDict.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal


class ConfigError(ValueError):
    """A key of the config is unknown, missing, ill-typed or out of range; the message names it."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What to train and test on.

    Attributes:
      name: "digits", a TFDS image-classification set, or "image_folder".
      data_dir: directory of prepared TFDS data sets, "" for TFDS's default; for "image_folder" the
        one that holds train/CLASS/*.jpg.
      image_size: images of varying size are resized and cropped to this; 0 for sets of one size.
      resize_size: what the shorter side is resized to before that crop at the centre, 256 for 224
        for example; 0 for image_size.
      in_memory: "always", "never" (images are read and decoded batch by batch), or "auto": what
        takes at most 8 GiB, unless augment needs the images as they are stored.
      workers: processes that decode what is not in memory; 0 for threads.
      on_broken_image: "error", or "skip": in training the next image takes its place, in evaluation
        it is left out. What is loaded into memory must be whole: there it is always an error.
      train_split, test_split: TFDS split expressions, "train[:90%]" for example.
      batch_size: examples of one training step, over all devices.
      eval_batch_size: examples of one evaluation step, over all devices.
      augment: "none", "crop", "flip", "crop_flip", or "random_resized_crop_flip" of image_size.
      pad_pixels: zeros on each side before a random crop.
      mean, std: per channel, for images in 0..1; () takes those of the data set.
    """

    name: str
    data_dir: str
    image_size: int
    resize_size: int
    in_memory: Literal["auto", "always", "never"]
    workers: int
    on_broken_image: Literal["error", "skip"]
    train_split: str
    test_split: str
    batch_size: int
    eval_batch_size: int
    augment: Literal["none", "crop", "flip", "crop_flip", "random_resized_crop_flip"]
    pad_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The network.

    Attributes:
      name: a key of `uniq_jax.models.MODELS`.
      options: further arguments of the network: {"shortcut": "B"} for example.
      dtype: of the computation: "float32" or "bfloat16".
      param_dtype: of parameters: "float32", or "float64" for checks.
    """

    name: str
    options: dict[str, Any]
    dtype: Literal["float32", "bfloat16", "float64"]
    param_dtype: Literal["float32", "float64"]


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """How parameters follow their gradients.

    Attributes:
      name: "sgd" (momentum, decay added to the gradient) or "adam" (decay decoupled).
      learning_rate: after warm-up.
      schedule: "cosine" or "linear", to zero at the end; or "constant".
      warmup_epochs: part of total_epochs.
      warmup_learning_rate: where warm-up starts.
      warmup_shape: "linear" up to learning_rate, or "constant" at warmup_learning_rate.
      momentum: of SGD; Adam's first moment.
      weight_decay: on all parameters but learned quantizer state.
      quantizer_rate_multiplier: on the rate of learned quantizer state.
      quantizer_freeze_fraction: last part of the phase in which learned quantizer state stays.
    """

    name: Literal["sgd", "adam"]
    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup_epochs: float
    warmup_learning_rate: float
    warmup_shape: Literal["linear", "constant"]
    momentum: float
    weight_decay: float
    quantizer_rate_multiplier: float
    quantizer_freeze_fraction: float


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """What a phase minimizes: see `uniq_jax.train.losses`.

    Attributes:
      label_smoothing: share of the labels that is spread evenly over all classes.
      mixup_alpha: of the Beta distribution of how much of another example is mixed into each; 0 for
        none.
      teacher: a float network whose output the phase learns: a workdir or checkpoint of this
        package, or a file, as for `init_from`; "" for none.
      teacher_model: the teacher's key of `uniq_jax.models.MODELS`.
      teacher_options: further arguments of the teacher's network.
      teacher_weight: of the teacher's output; the labels have the rest. 1 is soft labels alone.
      teacher_temperature: that both networks' logits are divided by for the teacher's part.
    """

    label_smoothing: float
    mixup_alpha: float
    teacher: str
    teacher_model: str
    teacher_options: dict[str, Any]
    teacher_weight: float
    teacher_temperature: float


@dataclasses.dataclass(frozen=True)
class PhaseSpec:
    """One training, from the parameters that the phase before it left.

    Attributes:
      name: as `phases` lists it; also its directory below the workdir.
      method: "float", "uniq", "n2uq", "uniq_n2uq" (UniQ weights, N2UQ activations) or "lsq".
      weight_bits, activation_bits: 1 to 8 (N2UQ activations: 5); 32 in a float phase.
      granularity: of learned weight steps, "layer" or "channel"; N2UQ's weights have none.
      quantize_shortcut: whether shortcut convolutions are quantized (by UniQ and N2UQ never at one
        bit).
      calibration_batches: training batches that initial steps are calibrated on; 0 for none.
      total_epochs: of this phase.
      optimizer: of this phase.
      loss: of this phase.
      batch_norm_batches: training batches on which batch norms' mean and variance are estimated
        anew for the last evaluation and checkpoint; 0 keeps the running ones.
      ema_decay: of the exponential moving average of parameters and statistics, which is evaluated,
        and what later runs take from the checkpoints; 0 for none.
    """

    name: str
    method: Literal["float", "uniq", "n2uq", "uniq_n2uq", "lsq"]
    weight_bits: int
    activation_bits: int
    granularity: Literal["layer", "channel"]
    quantize_shortcut: bool
    calibration_batches: int
    total_epochs: float
    optimizer: OptimizerSpec
    loss: LossSpec
    batch_norm_batches: int
    ema_decay: float

    @property
    def is_float(self) -> bool:
        return self.method == "float"


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A whole run.

    Attributes:
      seed: of parameters, order of examples and augmentation.
      data, model: see there.
      phases: in their order.
      init_from: parameters to start from: a workdir or checkpoint of this package, or a file (of
        PyTorch, .safetensors or .npz) under this package's or PyTorch's names; "" for none.
      mesh: devices along each axis; -1 for all the rest.
      log_every_steps: how often training loss is logged.
      eval_every_epochs: how often the test set is evaluated; the end always is.
      checkpoint_every_steps: how often the run can be resumed from; 0 for only the end.
      tensorboard: whether to write event files too.
    """

    seed: int
    data: DataSpec
    model: ModelSpec
    phases: tuple[PhaseSpec, ...]
    init_from: str
    mesh: dict[str, int]
    log_every_steps: int
    eval_every_epochs: float
    checkpoint_every_steps: int
    tensorboard: bool


def to_json(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain dicts and lists, for config.json."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple | list):
            return [plain(inner) for inner in value]
        return value

    return plain(dataclasses.asdict(spec))


def differences(old: Any, new: Any, prefix: str = "config") -> list[str]:
    """The keys whose values differ between two results of `to_json`, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}.{key}"
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new))
            for line in differences(a, b, f"{prefix}[{i}]")
        ]
    return [] if old == new else [f"{prefix}: {old!r} there, {new!r} now"]


def check(spec: RunSpec) -> None:
    """Raises a ConfigError that names the first key whose value is out of range."""

    def require(condition: bool, key: str, value: Any, rule: str) -> None:
        if not condition:
            raise ConfigError(f"config.{key} (={value!r}) must be {rule}")

    positive = "at least 1"
    require(spec.data.batch_size >= 1, "data.batch_size", spec.data.batch_size, positive)
    require(
        spec.data.eval_batch_size >= 1, "data.eval_batch_size", spec.data.eval_batch_size, positive
    )
    require(spec.data.pad_pixels >= 0, "data.pad_pixels", spec.data.pad_pixels, "at least 0")
    require(spec.data.image_size >= 0, "data.image_size", spec.data.image_size, "at least 0")
    require(
        spec.data.resize_size == 0 or spec.data.resize_size >= spec.data.image_size > 0,
        "data.resize_size",
        spec.data.resize_size,
        f"0, or at least config.data.image_size (={spec.data.image_size}) where that is given",
    )
    require(spec.data.workers >= 0, "data.workers", spec.data.workers, "at least 0")
    if spec.data.augment == "random_resized_crop_flip":
        rule = "above 0 with config.data.augment='random_resized_crop_flip'"
        require(spec.data.image_size > 0, "data.image_size", spec.data.image_size, rule)
        rule = "'auto' or 'never' with config.data.augment='random_resized_crop_flip'"
        require(spec.data.in_memory != "always", "data.in_memory", spec.data.in_memory, rule)
    require(
        len(spec.data.mean) == len(spec.data.std),
        "data.std",
        spec.data.std,
        f"as long as config.data.mean (={spec.data.mean!r})",
    )
    require(0 <= spec.seed < 2**32, "seed", spec.seed, "in 0..2**32-1")
    require(spec.log_every_steps >= 1, "log_every_steps", spec.log_every_steps, positive)
    require(spec.eval_every_epochs > 0, "eval_every_epochs", spec.eval_every_epochs, "above 0")
    require(
        spec.checkpoint_every_steps >= 0,
        "checkpoint_every_steps",
        spec.checkpoint_every_steps,
        "at least 0",
    )
    require(
        set(spec.mesh) == {"data", "model"} and all(n == -1 or n >= 1 for n in spec.mesh.values()),
        "mesh",
        spec.mesh,
        "{'data': n, 'model': m} with -1 or positive numbers",
    )
    for phase_ in spec.phases:
        name, optimizer = phase_.name, phase_.optimizer
        require(phase_.total_epochs > 0, f"{name}.total_epochs", phase_.total_epochs, "above 0")
        require(0 <= phase_.ema_decay < 1, f"{name}.ema_decay", phase_.ema_decay, "in [0, 1)")
        for key in ("calibration_batches", "batch_norm_batches"):
            value = getattr(phase_, key)
            require(value >= 0, f"{name}.{key}", value, "at least 0")
        require(
            0 <= optimizer.warmup_epochs < phase_.total_epochs,
            f"{name}.optimizer.warmup_epochs",
            optimizer.warmup_epochs,
            f"at least 0 and below total_epochs (={phase_.total_epochs})",
        )
        for key in ("learning_rate", "weight_decay", "quantizer_rate_multiplier"):
            value = getattr(optimizer, key)
            require(value >= 0, f"{name}.optimizer.{key}", value, "at least 0")
        require(
            0 <= optimizer.momentum < 1,
            f"{name}.optimizer.momentum",
            optimizer.momentum,
            "in [0, 1)",
        )
        require(
            0 <= optimizer.quantizer_freeze_fraction <= 1,
            f"{name}.optimizer.quantizer_freeze_fraction",
            optimizer.quantizer_freeze_fraction,
            "in [0, 1]",
        )
        _check_loss(phase_.loss, f"{name}.loss", require)
        if phase_.method == "n2uq":
            rule = "'layer' for method 'n2uq', whose weights have no learned step"
            key = f"{name}.granularity"
            require(phase_.granularity == "layer", key, phase_.granularity, rule)
        learned = phase_.method in ("n2uq", "uniq_n2uq")
        for key, largest in (("weight_bits", 8), ("activation_bits", 5 if learned else 8)):
            value = getattr(phase_, key)
            if phase_.is_float:
                require(value == 32, f"{name}.{key}", value, "32, as its method is 'float'")
            else:
                rule = f"in 1..{largest} for method {phase_.method!r}"
                require(1 <= value <= largest, f"{name}.{key}", value, rule)


def _check_loss(loss: LossSpec, key: str, require: Callable[[bool, str, Any, str], None]) -> None:
    require(
        0 <= loss.label_smoothing < 1, f"{key}.label_smoothing", loss.label_smoothing, "in [0, 1)"
    )
    require(loss.mixup_alpha >= 0, f"{key}.mixup_alpha", loss.mixup_alpha, "at least 0")
    require(0 < loss.teacher_weight <= 1, f"{key}.teacher_weight", loss.teacher_weight, "in (0, 1]")
    require(
        loss.teacher_temperature > 0,
        f"{key}.teacher_temperature",
        loss.teacher_temperature,
        "above 0",
    )
    if loss.teacher:
        rule = f"the name of the network that config.{key}.teacher (={loss.teacher!r}) holds"
        require(bool(loss.teacher_model), f"{key}.teacher_model", loss.teacher_model, rule)
        rule = "0 where config." + key + ".teacher_weight is 1, as the labels don't count"
        smooths = loss.label_smoothing > 0 and loss.teacher_weight == 1
        require(not smooths, f"{key}.label_smoothing", loss.label_smoothing, rule)
        return
    alone: dict[str, Any] = {
        "teacher_model": "",
        "teacher_options": {},
        "teacher_weight": 1.0,
        "teacher_temperature": 1.0,
    }
    for field, default in alone.items():
        value = getattr(loss, field)
        rule = f"{default!r} where config.{key}.teacher names no teacher"
        require(value == default, f"{key}.{field}", value, rule)
