"""ResNet-20 on the embedded digits: float, then binary weights and activations by UniQ.

    python -m uniq_jax.main --config=configs/digits_w1a1.py --workdir=runs/digits_w1a1

First and last layer stay float, as in UniQ's binary networks; weights are not decayed, and the rate
warms up at a constant. Arguments: `seed`; and `curriculum`, as in
`…py:curriculum=8-4-2`, widths that follow one another in place of the one.
"""

from uniq_jax import config as c
from uniq_jax import recipes


def get_config(arg=None):
    quantized = c.phase(
        "uniq",
        weight_bits=1,
        activation_bits=1,
        total_epochs=30.0,
        optimizer={
            "name": "adam",
            "learning_rate": 2e-3,
            "warmup_epochs": 1.0,
            "weight_decay": 0.0,
        },
    )
    return recipes.digits(arg, quantized)
