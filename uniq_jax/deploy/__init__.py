"""What a network costs where it runs."""

from uniq_jax.deploy.freeze import freeze as freeze
from uniq_jax.deploy.network import FrozenNetwork as FrozenNetwork
from uniq_jax.deploy.size import Size as Size
from uniq_jax.deploy.size import model_size as model_size
