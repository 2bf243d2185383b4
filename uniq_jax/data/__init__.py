"""Image-classification data, in memory or on disk, and deterministic, resumable batches of it.

    train = load("cifar10", split="train", data_dir="/data/tfds")
    mean, std = statistics("cifar10")
    with train_iterator(train, batch_size=128, seed=0, augment="crop_flip") as batches:
        batch = next(batches)  # {"image": uint8 (128, 32, 32, 3), "label": int32 (128,)}

Sets that do not fit in memory stay encoded on disk, and are decoded batch by batch:

    train = load_encoded("imagenet2012", split="train", data_dir="/data/tfds", image_size=224)
    train_iterator(train, batch_size=256, seed=0, augment="random_resized_crop_flip", workers=8)

Nothing here reaches the network, needs TensorFlow, or imports another part of `uniq_jax`.
"""

from uniq_jax.data.augment import AUGMENTATIONS as AUGMENTATIONS
from uniq_jax.data.augment import RESIZED_CROP as RESIZED_CROP
from uniq_jax.data.encoded_data import EncodedData as EncodedData
from uniq_jax.data.image_data import ImageData as ImageData
from uniq_jax.data.loader import TrainIterator as TrainIterator
from uniq_jax.data.loader import eval_batches as eval_batches
from uniq_jax.data.loader import train_iterator as train_iterator
from uniq_jax.data.normalization import statistics as statistics
from uniq_jax.data.sources import load as load
from uniq_jax.data.sources import load_as as load_as
from uniq_jax.data.sources import load_encoded as load_encoded
