"""ResNet-20 on the embedded digits: float, then 2-bit weights and activations by UniQ.

The demo: `make demo`, or

    python -m uniq_jax.main --config=configs/digits_w2a2.py --workdir=runs/digits

The first and last layer have 8 bits. Arguments: `seed`.
"""

from uniq_jax import config as c


def get_config(arg=None):
    args = c.parse_arg(arg, seed=0)
    config = c.base()
    config.seed = args.seed
    config.data.name = "digits"
    config.data.batch_size = 64
    config.data.augment = "crop"
    config.data.pad_pixels = 1
    config.model.name = "resnet20"
    config.phases = ("float", "quantized")
    config.float = c.phase(
        "float",
        total_epochs=15.0,
        optimizer={"learning_rate": 0.1, "warmup_epochs": 1.0},
    )
    config.quantized = c.phase(
        "uniq",
        weight_bits=2,
        activation_bits=2,
        total_epochs=15.0,
        optimizer={"learning_rate": 0.02},
    )
    return config
