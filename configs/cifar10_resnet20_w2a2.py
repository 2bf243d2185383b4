"""ResNet-20 on CIFAR-10 at 1 to 8 bits, from a float checkpoint.

    python -m uniq_jax.main --config=configs/cifar10_resnet20_w2a2.py \
        --config.data.data_dir=TFDS_DIR --config.init_from=FLOAT --workdir=runs/cifar10

TFDS_DIR holds a prepared `cifar10`. To prepare it takes TensorFlow, in any environment:
`tfds build cifar10 --data_dir=TFDS_DIR --file_format=array_record`. FLOAT is a float ResNet-20 with
shortcut A: a workdir of this package, or a file (.pth, .safetensors or .npz) of PyTorch's names.
Without one, `:float_epochs=160` trains it first.

Arguments, as in `…w2a2.py:bits=1,method=n2uq`, are those of `uniq_jax.recipes.arguments`.

Recipes. UniQ at two bits and more (and LSQ, as a baseline under the same): SGD with momentum 0.9,
rate 0.01 by a cosine to 0, decay 5e-4 on everything but steps, batch 128, 120 epochs: the values
that UniQ's author uses for CIFAR-100. UniQ at one bit: no decay, and the first 5 epochs at a
constant rate of 0.001. N2UQ: Adam at 1.25e-3 (times batch / 256), linear to 0, no decay, thresholds
and scales at a tenth of the rate. Images are normalized by ImageNet's statistics, as the published
float networks of this architecture expect.

Expected accuracy: none of these papers has a row for this network; what short runs reached is in
results/README.md. Cost: minutes an epoch on two CPU cores.
"""

from uniq_jax import config as c
from uniq_jax import recipes


def get_config(arg=None):
    args = recipes.arguments(arg, bits=2, method="uniq")
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
    recipes.add_phases(config, args, float_optimizer={"learning_rate": 0.1, "weight_decay": 1e-4})
    return recipes.smoke(config) if args.smoke else config
