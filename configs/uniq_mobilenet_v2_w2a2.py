"""UniQ: MobileNet-V2 with 2-bit weights and activations on ImageNet.

    python -m uniq_jax.main --config=configs/uniq_mobilenet_v2_w2a2.py \
        --config.data.data_dir=TFDS_DIR --config.init_from=FLOAT \
        --workdir=runs/uniq_mobilenet_v2_w2a2

Paper: UniQ, IEEE Access 9, 2021 (arXiv:2104.00210), the ImageNet experiments. Published accuracy:
not found by us, nor which widths the paper has. Cost: not measured.

TFDS_DIR holds a prepared `imagenet2012`. FLOAT holds weights of the float network; without any,
`:float_epochs=120` trains them first, at rate 0.1 and decay 5e-4. `:smoke` takes a few steps on
embedded data, gray images of ten classes, without FLOAT; the other arguments are those of
`uniq_jax.recipes.arguments`.

Recipe, the program's, with the rate of its author's later configs for CIFAR: SGD with momentum 0.9,
rate 0.01 by a cosine to 0, decay 1e-4 on everything but steps, batch 256, 120 epochs; from a float
checkpoint, with steps from 100 calibration batches. First and last layer have 8 bits, the first
one's input on the signed grid. One step for each layer; `:granularity=channel` takes one for each
output channel of weights. The program cuts off the negative inputs of layers behind linear
bottlenecks; here they have the signed grid.
"""

from uniq_jax import recipes


def get_config(arg=None):
    return recipes.imagenet(arg, model="mobilenet_v2", bits=2, method="uniq")
