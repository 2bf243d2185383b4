"""ResNet-20 on CIFAR-10 at 1 to 8 bits, from a float checkpoint.

    python -m uniq_jax.main --config=configs/cifar10_resnet20_w2a2.py \
        --config.data.data_dir=TFDS_DIR --config.init_from=FLOAT --workdir=runs/cifar10

TFDS_DIR holds a prepared `cifar10` (`tfds build cifar10 --file_format=array_record`, or TFDS's
`download_and_prepare` with that format). FLOAT is a float ResNet-20 with shortcut A: a workdir of
this package, or an .npz of PyTorch's names. Without one, `:float_epochs=160` trains it first.

Arguments, as in `…w2a2.py:bits=1,method=n2uq`:
    bits          of weights and activations, 2
    weight_bits, activation_bits   apart, where not 0
    method        uniq, n2uq, uniq_n2uq or lsq
    granularity   layer or channel, of UniQ's weight steps
    epochs        of the quantized phase, 120
    float_epochs  of a float phase before it, 0
    seed          0

Recipes. UniQ at two bits and more (and LSQ, as a baseline under the same): SGD with momentum 0.9,
rate 0.01 by a cosine to 0, decay 5e-4 on everything but steps, batch 128, 120 epochs: the values
that UniQ's author uses for CIFAR-100. UniQ at one bit: no decay, and the first 5 epochs at a
constant rate of 0.001. N2UQ: Adam at 1.25e-3 (times batch / 256), linear to 0, no decay, thresholds
and scales at a tenth of the rate. Images are normalized by ImageNet's statistics, as the published
float networks of this architecture expect.

Expected accuracy: none of these papers has a row for this network. Cost: minutes an epoch on two
CPU cores.
"""

from uniq_jax import config as c


def get_config(arg=None):
    args = c.parse_arg(
        arg,
        bits=2,
        weight_bits=0,
        activation_bits=0,
        method="uniq",
        granularity="layer",
        epochs=120.0,
        float_epochs=0.0,
        seed=0,
    )
    config = c.base()
    config.seed = args.seed
    config.data.name = "cifar10"
    config.data.batch_size = 128
    config.data.eval_batch_size = 500
    config.data.augment = "crop_flip"
    config.data.pad_pixels = 4
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.model.name = "resnet20"
    config.model.options = {"shortcut": "A"}
    weight_bits = args.weight_bits or args.bits
    activation_bits = args.activation_bits or args.bits
    is_binary = min(weight_bits, activation_bits) == 1
    if args.method in ("n2uq", "uniq_n2uq"):
        optimizer = {
            "name": "adam",
            "learning_rate": 1.25e-3 * config.data.batch_size / 256,
            "schedule": "linear",
            "weight_decay": 0.0,
            "quantizer_rate_multiplier": 0.1,
        }
    elif is_binary:
        optimizer = {
            "learning_rate": 0.01,
            "warmup_epochs": min(5.0, args.epochs / 4),
            "warmup_learning_rate": 0.001,
            "warmup_shape": "constant",
            "weight_decay": 0.0,
        }
    else:
        optimizer = {"learning_rate": 0.01, "weight_decay": 5e-4}
    config.phases = ("quantized",)
    config.quantized = c.phase(
        args.method,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        granularity=args.granularity,
        calibration_batches=100,
        total_epochs=args.epochs,
        optimizer=optimizer,
    )
    if args.float_epochs:
        config.phases = ("float", "quantized")
        config.float = c.phase(
            "float",
            total_epochs=args.float_epochs,
            optimizer={"learning_rate": 0.1, "weight_decay": 1e-4},
        )
    return config
