"""Networks that were trained elsewhere: their files, names and layouts."""

from uniq_jax.interop.files import read_state_dict as read_state_dict
from uniq_jax.interop.files import write_state_dict as write_state_dict
from uniq_jax.interop.report import LoadReport as LoadReport
from uniq_jax.interop.state_dicts import by_path as by_path
from uniq_jax.interop.state_dicts import load_torch_state_dict as load_torch_state_dict
from uniq_jax.interop.state_dicts import to_torch_state_dict as to_torch_state_dict
