"""How both papers train, in the functions that config files share.

UniQ: Pham et al., "Training Multi-Bit Quantized and Binarized Networks with a Learnable Symmetric
Quantizer", IEEE Access 9, 2021 (arXiv:2104.00210). Followed is its program: batch 256 on ImageNet
and 128 on CIFAR-100, 120 epochs, 100 calibration batches (its author's later configs for ImageNet:
90 and 1000). At two bits and more the rate, 0.01, and on CIFAR-100 the decay, 5e-4, are those of
the author's later configs for CIFAR; on ImageNet decay is the program's default, 1e-4. The cosine
falls with every step here, with every epoch there.

N2UQ: Liu et al., "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", CVPR 2022 (arXiv:2111.14826). Where paper and program differ, the
program is followed: a rate of 1.25e-3 for batch 256 (the paper: 2.5e-3 for 512).

N2UQ's loss is that of its program too: the cross entropy with the output of a float ResNet-101
alone (the paper: a teacher of the student's architecture, its output and the labels both). The
argument `teacher=PATH` names that network's weights; without it, the loss is the cross entropy with
the labels.

Both train on random resized crops of ImageNet, mirrored half of the time, and test on the centre
224 of 256 pixels, as here; `--config.data.workers=8` decodes in eight processes.
"""

from typing import Any

from uniq_jax import config as c
from uniq_jax import curriculum
from uniq_jax.spec import ConfigError

# A ConfigDict, whose keys no type checker knows.
Config = Any


def imagenet(arg: str | None, *, model: str, bits: int, method: str = "n2uq") -> Config:
    """A network on ImageNet, by UniQ's or N2UQ's recipe; LSQ, as a baseline, by UniQ's.

    Args:
      arg: what follows the colon of `--config=FILE.py:ARG`, see `arguments`.
      model: a key of `uniq_jax.models.MODELS`.
      bits: of weights and activations, unless `arg` says otherwise.
      method: unless `arg` says otherwise.
    """
    args: Config = arguments(arg, bits=bits, method=method)
    config: Config = c.base()
    config.seed = args.seed
    config.data.name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.resize_size = 256
    config.data.in_memory = "never"
    config.data.batch_size = 256
    config.data.augment = "random_resized_crop_flip"
    config.model.name = model
    if args.method == "n2uq":
        # Said here, as the float phase has this shape too: biases and PReLUs at every quantizer.
        config.model.options = {"activation": "biased_prelu"}
        # Thresholds start as constants, uncalibrated.
        add_phases(
            config,
            args,
            total_epochs=128.0,
            calibration_batches=0,
            float_optimizer=n2uq_optimizer(config.data.batch_size),
            teacher_model="resnet101",
        )
    else:
        add_phases(config, args, weight_decay=1e-4, teacher_model="resnet101")
    return smoke(config) if args.smoke else config


def cifar100(arg: str | None, *, model: str, bits: int) -> Config:
    """A network on CIFAR-100 by UniQ's recipe; arguments as those of `imagenet`."""
    args: Config = arguments(arg, bits=bits, method="uniq")
    config: Config = c.base()
    config.seed = args.seed
    config.data.name = "cifar100"
    config.data.batch_size = 128
    config.data.eval_batch_size = 500
    config.data.augment = "crop_flip"
    config.data.pad_pixels = 4
    config.model.name = model
    add_phases(config, args)
    return smoke(config) if args.smoke else config


def digits(arg: str | None, quantized: Config) -> Config:
    """A ResNet-20 on the embedded digits: float, then a quantized phase.

    Args:
      arg: `seed`, 0; and `curriculum`, as in `arguments`, whose phases follow one another in place
        of the one given.
      quantized: a phase.
    """
    args: Config = c.parse_arg(arg, seed=0, curriculum="")
    config: Config = c.base()
    config.seed = args.seed
    config.data.name = "digits"
    config.data.batch_size = 64
    config.data.augment = "crop"
    config.data.pad_pixels = 1
    config.model.name = "resnet20"
    config.layer_metrics_every_steps = 20
    config.export.sample_images = 8
    config.phases = ("float",)
    config.float = c.phase(
        "float", total_epochs=15.0, optimizer={"learning_rate": 0.1, "warmup_epochs": 1.0}
    )

    def phase(weight_bits: int, activation_bits: int, epochs: float) -> Config:
        copy = quantized.copy_and_resolve_references()
        copy.weight_bits, copy.activation_bits = weight_bits, activation_bits
        copy.optimizer.warmup_epochs = min(copy.optimizer.warmup_epochs, epochs / 4)
        copy.total_epochs = epochs
        return copy

    if args.curriculum:
        curriculum.add(config, args.curriculum, quantized.method, quantized.total_epochs, phase)
    else:
        config.phases = ("float", "quantized")
        config.quantized = quantized
    return config


def arguments(arg: str | None, *, bits: int, method: str) -> Config:
    """The arguments of a config file for a network of the papers, as in "bits=1,method=n2uq".

    bits            of weights and activations
    weight_bits, activation_bits   apart, where not 0
    curriculum      widths one after another in place of one, as in "8-4-2", which makes the phases
                    "w8a8", "w4a4" and "w2a2", each from what the one before left; or, apart, as in
                    "w8a5-4-2" (N2UQ's activations have 5 bits at most). The last phase has half of
                    the epochs, and the others share the other half evenly
    method          uniq, n2uq, uniq_n2uq or lsq
    granularity     layer or channel, of UniQ's weight steps
    float_shortcut  shortcut convolutions stay float
    epochs          of the quantized phases together, where not 0; otherwise the recipe's
    float_epochs    of a float phase before it, 0
    activation      of a ResNet, relu or biased_prelu, where not the recipe's
    teacher         weights of a float network whose output both phases learn, in place of labels
    teacher_model   the name of that network, where not the recipe's: ResNet-101 on ImageNet, and
                    elsewhere the student's own
    seed            0
    smoke           a run of a few steps on embedded data, to see that it works
    """
    args: Config = c.parse_arg(
        arg,
        bits=0,
        weight_bits=0,
        activation_bits=0,
        curriculum="",
        method=method,
        granularity="layer",
        float_shortcut=False,
        epochs=0.0,
        float_epochs=0.0,
        activation="",
        teacher="",
        teacher_model="",
        seed=0,
        smoke=False,
    )
    for key in ("bits", "weight_bits", "activation_bits"):
        if args.curriculum and args[key]:
            raise ConfigError(
                f"config argument {key} (={args[key]}) must be left out where curriculum "
                f"(={args.curriculum!r}) is given, which can say w8a5 for example"
            )
    args.bits = args.bits or bits
    return args


def add_phases(
    config: Config,
    args: Config,
    *,
    total_epochs: float = 120.0,
    calibration_batches: int = 100,
    weight_decay: float = 5e-4,
    float_optimizer: dict[str, Any] | None = None,
    teacher_model: str | None = None,
) -> None:
    """Adds the phase `quantized`, or those of a curriculum; and `float` before, where asked for.

    Where a curriculum changes the widths of a network, activations are calibrated, by N2UQ's recipe
    too, which otherwise starts from constants.

    Args:
      config: changed in place.
      args: as `arguments` gives them.
      total_epochs: of the quantized phases together, unless `args` says otherwise.
      calibration_batches: of the quantized phase.
      weight_decay: of the quantized phase, at two bits and more, by UniQ's recipe.
      float_optimizer: of the float phase; UniQ's by default.
      teacher_model: of the teacher, where `args` names one, unless `args` says otherwise; by
        default the config's own network.
    """
    loss = _soft_labels(config, args, teacher_model)

    def phase(weight_bits: int, activation_bits: int, epochs: float) -> Config:
        if args.method in ("n2uq", "uniq_n2uq"):
            optimizer = n2uq_optimizer(config.data.batch_size)
        elif min(weight_bits, activation_bits) == 1:
            optimizer = {
                "learning_rate": 0.01,
                "warmup_epochs": min(5.0, epochs / 4),
                "warmup_learning_rate": 0.001,
                "warmup_shape": "constant",
                "weight_decay": 0.0,
            }
        else:
            optimizer = {"learning_rate": 0.01, "weight_decay": weight_decay}
        return c.phase(
            args.method,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            granularity=args.granularity,
            quantize_shortcut=not args.float_shortcut,
            calibration_batches=calibration_batches,
            total_epochs=epochs,
            optimizer=optimizer,
            loss=loss,
        )

    epochs = args.epochs or total_epochs
    config.phases = ()
    if args.curriculum:
        curriculum.add(config, args.curriculum, args.method, epochs, phase)
    else:
        config.phases = ("quantized",)
        config.quantized = phase(
            args.weight_bits or args.bits, args.activation_bits or args.bits, epochs
        )
    if args.float_epochs:
        config.phases = ("float", *config.phases)
        config.float = c.phase(
            "float",
            total_epochs=args.float_epochs,
            optimizer=float_optimizer or {"learning_rate": 0.1, "weight_decay": 5e-4},
            loss=loss,
        )
    # Not sooner: a teacher of the student's architecture is the network without it.
    if args.activation:
        config.model.options.activation = args.activation


def _soft_labels(config: Config, args: Config, model: str | None) -> dict[str, Any]:
    """The section `loss` that the arguments ask for: soft labels alone, at temperature 1."""
    if not args.teacher:
        return {"teacher_model": args.teacher_model}
    if args.teacher_model or model:
        return {"teacher": args.teacher, "teacher_model": args.teacher_model or model}
    options = config.model.options.to_dict()
    return {
        "teacher": args.teacher,
        "teacher_model": config.model.name,
        "teacher_options": options,
    }


def n2uq_optimizer(batch_size: int) -> dict[str, Any]:
    """N2UQ's optimizer, its rate scaled with the batch."""
    return {
        "name": "adam",
        "learning_rate": 1.25e-3 * batch_size / 256,
        "schedule": "linear",
        "weight_decay": 0.0,
        "quantizer_rate_multiplier": 0.1,
    }


def smoke(config: Config) -> Config:
    """The same network and recipe for a few steps on the embedded digits; changed in place."""
    data: Config = c.base().data
    data.train_split = "train[:128]"
    data.test_split = "test[:64]"
    data.batch_size = 32
    data.eval_batch_size = 32
    config.data = data
    for name in config.phases:
        phase = config[name]
        phase.total_epochs = 1.0
        phase.calibration_batches = min(phase.calibration_batches, 2)
        phase.optimizer.warmup_epochs = min(phase.optimizer.warmup_epochs, 0.25)
    return config
