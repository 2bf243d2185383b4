"""What a run is told, as frozen dataclasses.

Field names are the config's keys; `uniq_jax.config` builds these from a ConfigDict.
"""

from uniq_jax.spec.checks import ConfigError as ConfigError
from uniq_jax.spec.checks import check as check
from uniq_jax.spec.plain import differences as differences
from uniq_jax.spec.plain import from_json as from_json
from uniq_jax.spec.plain import to_json as to_json
from uniq_jax.spec.sections import DataSpec as DataSpec
from uniq_jax.spec.sections import ExportSpec as ExportSpec
from uniq_jax.spec.sections import LossSpec as LossSpec
from uniq_jax.spec.sections import ModelSpec as ModelSpec
from uniq_jax.spec.sections import OptimizerSpec as OptimizerSpec
from uniq_jax.spec.sections import OscillationSpec as OscillationSpec
from uniq_jax.spec.sections import PhaseSpec as PhaseSpec
from uniq_jax.spec.sections import RunSpec as RunSpec
