"""ResNet-20 on the embedded digits: float, then 2-bit weights and activations by UniQ.

The demo: `make demo`, or

    python -m uniq_jax.main --config=configs/digits_w2a2.py --workdir=runs/digits

The first and last layer have 8 bits. Arguments: `seed`; and `curriculum`, as in
`…py:curriculum=8-4-2`, widths that follow one another in place of the one. Three seeds of three
methods, one after another, about as long as nine demos:

    python launch/sweep.py --config=configs/digits_w2a2.py --workdir=runs/digits_sweep
"""

from uniq_jax import config as c
from uniq_jax import recipes


def get_config(arg=None):
    quantized = c.phase(
        "uniq",
        weight_bits=2,
        activation_bits=2,
        total_epochs=15.0,
        optimizer={"learning_rate": 0.02},
    )
    return recipes.digits(arg, quantized)


def sweep(add):
    for method in ("uniq", "n2uq", "lsq"):
        for seed in range(3):
            add(**{"quantized.method": method, "seed": seed})
