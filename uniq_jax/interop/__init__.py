"""Arrays of networks that were trained elsewhere."""

from uniq_jax.interop.npz import read_npz as read_npz
from uniq_jax.interop.torch_names import from_torch_names as from_torch_names
