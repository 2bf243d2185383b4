"""What an exported network sees in images; needs neither Flax nor what trains.

    python -m uniq_jax.predict MODEL IMAGE...

In Python:

    model = open_model("runs/demo/export/model.safetensors")
    logits = model.logits(np.stack([read_image(path, model) for path in paths]))
"""

from uniq_jax.predict.images import find_images as find_images
from uniq_jax.predict.images import read_image as read_image
from uniq_jax.predict.model import Model as Model
from uniq_jax.predict.model import Prediction as Prediction
from uniq_jax.predict.model import open_model as open_model
