"""N2UQ: ResNet-18 with 2-bit weights and activations on ImageNet.

    python -m uniq_jax.main --config=configs/resnet18_w2a2.py \
        --config.data.data_dir=TFDS_DIR --config.init_from=FLOAT --workdir=runs/resnet18_w2a2

Paper: N2UQ, CVPR 2022 (arXiv:2111.14826), the ImageNet experiments. Published: top-1 69.4, top-5
88.4; with float shortcut convolutions (`:float_shortcut`) 69.7 and 88.9; the float network under
the same recipe 71.8. Users who retrained the 69.4 report 68.9, 68.9 and 69.26 (second-hand). Cost:
not measured.

TFDS_DIR holds a prepared `imagenet2012`. FLOAT holds float weights, torchvision's or those of a
workdir; without any, `:float_epochs=128` trains them first, in N2UQ's shape and by the same recipe.
`:smoke` takes a few steps on embedded data, gray images of ten classes, without FLOAT; the other
arguments are those of `uniq_jax.recipes.arguments`.

Recipe, the program's where the paper differs: Adam (0.9, 0.999), rate 1.25e-3 at batch 256 (the
paper: 2.5e-3 at 512), by a line to 0 over 128 epochs, no decay, thresholds and scales at a tenth of
the rate; from torchvision's float weights where shortcut convolutions are float, else from a float
network that was trained in N2UQ's shape. First convolution and last layer stay float; shortcut
convolutions have the low width, or stay float by `:float_shortcut`. The loss is the program's, soft
labels of a float ResNet-101 alone, where `:teacher=TEACHER` names its weights, torchvision's or
those of a workdir; else the labels'.

`:method=uniq` trains this network by UniQ's recipe instead; the network of UniQ's paper is that of
`configs/uniq_preact_resnet18_w2a2.py`.
"""

from uniq_jax import recipes


def get_config(arg=None):
    return recipes.imagenet(arg, model="resnet18", bits=2)
