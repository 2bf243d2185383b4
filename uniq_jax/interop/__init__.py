"""Arrays of networks that were trained elsewhere."""

from uniq_jax.interop.files import read_parameters as read_parameters
from uniq_jax.interop.files import read_state_dict as read_state_dict
from uniq_jax.interop.files import write_state_dict as write_state_dict
from uniq_jax.interop.npz import read_npz as read_npz
from uniq_jax.interop.state_dicts import LoadReport as LoadReport
from uniq_jax.interop.state_dicts import load_torch_state_dict as load_torch_state_dict
from uniq_jax.interop.state_dicts import to_torch_state_dict as to_torch_state_dict
from uniq_jax.interop.torch_names import from_torch_names as from_torch_names
