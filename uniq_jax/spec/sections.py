"""The sections of a spec: every key of a config, and what it means."""

import dataclasses
from typing import Any, Literal

EXPORT_FORMATS = ("packed", "onnx", "openvino", "qonnx", "stablehlo")
"""What `ExportSpec.formats` may name."""


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
      param_dtype: of parameters: "float32", or "float64" for checks. Batch-norm statistics, learned
        steps and thresholds, optimizer state, logits and losses never are of fewer bits.
      remat: what is computed again for gradients, to save memory: "none"; "convolutions", all of a
        residual block but its convolutions; or "blocks", all of it.
    """

    name: str
    options: dict[str, Any]
    dtype: Literal["float32", "bfloat16", "float64"]
    param_dtype: Literal["float32", "float64"]
    remat: Literal["none", "convolutions", "blocks"]


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
      teacher: a float network whose output the phase learns: a workdir or directory of checkpoints
        of this package, or a file, as for `init_from`; "" for none.
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
class OscillationSpec:
    """Weights that oscillate between two levels: see `uniq_jax.train.oscillation`.

    Attributes:
      measure: whether to log "oscillating_weights", the share of weights that oscillate.
      momentum: of the moving averages of frequencies and codes: the share of the newest step.
      threshold: frequency, in steps, above which a weight counts as oscillating.
      damping: factor of the loss that pulls weights to their levels, at the end of the phase; from
        0 at its start by a cosine. 0 for none.
      freeze_threshold: frequency above which weights are frozen, at the end of the phase; 0 for
        none.
      freeze_threshold_start: the same at its start, and down by a cosine; 0 for the same.
    """

    measure: bool
    momentum: float
    threshold: float
    damping: float
    freeze_threshold: float
    freeze_threshold_start: float


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
      accumulation_steps: microbatches that each batch is cut into, which go through the network one
        after another; batch norms and the gradient scale of learned steps see one of them.
      optimizer: of this phase.
      loss: of this phase.
      batch_norm_batches: training batches on which batch norms' mean and variance are estimated
        anew for the last evaluation and checkpoint; 0 keeps the running ones.
      ema_decay: of the exponential moving average of parameters and statistics, which is evaluated,
        and what later runs take from the checkpoints; 0 for none.
      oscillation: of this phase.
    """

    name: str
    method: Literal["float", "uniq", "n2uq", "uniq_n2uq", "lsq"]
    weight_bits: int
    activation_bits: int
    granularity: Literal["layer", "channel"]
    quantize_shortcut: bool
    calibration_batches: int
    total_epochs: float
    accumulation_steps: int
    optimizer: OptimizerSpec
    loss: LossSpec
    batch_norm_batches: int
    ema_decay: float
    oscillation: OscillationSpec

    @property
    def is_float(self) -> bool:
        return self.method == "float"


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """What a run leaves for use elsewhere: see `uniq_jax.train.exports`.

    Attributes:
      formats: separated by commas: "packed" (for `uniq_jax.deploy.load`), "onnx", "openvino",
        "qonnx", "stablehlo". A run ends with these files, and `--mode=export` writes them at any
        time; "" for a run whose network is not frozen.
      exact: whether `model_qdq.onnx`, OpenVINO's and QONNX's files keep every operation, so that
        all codes are those of training; else they have fewer and faster ones, and a few codes
        differ. The other formats are exact always.
      batch: images of one call of an exported network; 0 for any number (QONNX: 1).
      check_images: of the test set, at most, on which all codes of training's evaluation and of the
        frozen network are compared.
      sample_images: of the test set that are written beside the files, to try them on.
    """

    formats: str
    exact: bool
    batch: int
    check_images: int
    sample_images: int

    @property
    def names(self) -> tuple[str, ...]:
        """The formats, one by one."""
        return tuple(dict.fromkeys(filter(None, map(str.strip, self.formats.split(",")))))


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """A whole run.

    Attributes:
      seed: of parameters, order of examples and augmentation.
      data: what to train and test on.
      model: the network.
      phases: in their order.
      export: of the last phase's network.
      init_from: parameters to start from: a workdir or directory of checkpoints, or a file (of
        PyTorch, .safetensors or .npz) under this package's or PyTorch's names; "" for none.
      mesh: devices along each axis; -1 for all the rest. Batches are spread over "data". Over
        "model" lie parts of each large parameter and of what the optimizer and the averages keep
        for it, along its largest axis that the devices divide; see `train.sharding`.
      memory_limit_gib: memory of a device that a training step may take; 0 to ask the device.
      log_every_steps: how often training loss is logged.
      eval_every_epochs: how often the test set is evaluated; the end always is.
      checkpoint_every_steps: how often the run can be resumed from; 0 for only the end.
      layer_metrics_every_steps: how often the quantized layers are measured (code entropy, clipped
        and dead codes, flips, steps and their gradients), which takes about as long as a step. A
        phase's last step always is. 0 for never.
      tensorboard: whether to write event files too.
    """

    seed: int
    data: DataSpec
    model: ModelSpec
    phases: tuple[PhaseSpec, ...]
    export: ExportSpec
    init_from: str
    mesh: dict[str, int]
    memory_limit_gib: float
    log_every_steps: int
    eval_every_epochs: float
    checkpoint_every_steps: int
    layer_metrics_every_steps: int
    tensorboard: bool
