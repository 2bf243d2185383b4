"""UniQ: pre-activation ResNet-18 with binary weights and activations on ImageNet.

    python -m uniq_jax.main --config=configs/uniq_preact_resnet18_w1a1.py \
        --config.data.data_dir=TFDS_DIR --config.init_from=FLOAT \
        --workdir=runs/uniq_preact_resnet18_w1a1

Paper: UniQ, IEEE Access 9, 2021 (arXiv:2104.00210), the ImageNet experiments. Published accuracy:
not found by us. Cost: not measured.

TFDS_DIR holds a prepared `imagenet2012`. FLOAT holds weights of the float network; without any,
`:float_epochs=120` trains them first, at rate 0.1 and decay 5e-4. `:smoke` takes a few steps on
embedded data, gray images of ten classes, without FLOAT; the other arguments are those of
`uniq_jax.recipes.arguments`.

Recipe, the program's: SGD with momentum 0.9, rate 0.01 by a cosine to 0 after 5 epochs at a
constant 0.001, no decay, batch 256, 120 epochs; from a float checkpoint, with steps from 100
calibration batches. First layer, last layer and shortcut convolutions stay float; activations are 0
and the step. One step for each layer; `:granularity=channel` takes one for each output channel of
weights.
"""

from uniq_jax import recipes


def get_config(arg=None):
    return recipes.imagenet(arg, model="preact_resnet18", bits=1, method="uniq")
