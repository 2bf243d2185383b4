"""From a trained model to an integer network: freeze, check, save, and what it costs."""

from uniq_jax.deploy.freeze import freeze as freeze
from uniq_jax.deploy.network import About as About
from uniq_jax.deploy.network import FrozenNetwork as FrozenNetwork
from uniq_jax.deploy.packed_file import load as load
from uniq_jax.deploy.packed_file import save as save
from uniq_jax.deploy.size import Size as Size
from uniq_jax.deploy.size import model_size as model_size
from uniq_jax.deploy.verify import LayerCheck as LayerCheck
from uniq_jax.deploy.verify import Verification as Verification
from uniq_jax.deploy.verify import verify as verify
