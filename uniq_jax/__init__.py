"""Low-bit neural networks in JAX: learned quantizers, their training, exact integer networks.

uniq_jax.quantizers    pure functions of arrays; needs jax and numpy only
uniq_jax.nn            Flax NNX layers that own learned quantizer state
uniq_jax.quantize      quantizes any NNX model by rules (uniq_jax.rules)
uniq_jax.dequantize    puts the float layers back
uniq_jax.calibrate     initial quantizer parameters from weights and data
uniq_jax.freeze        the exact integer network of a model (uniq_jax.deploy)
uniq_jax.summary       shapes, widths, operations and bytes, layer by layer
uniq_jax.linen         the layers, and calibrate, for Flax Linen
uniq_jax.qwix          the quantizers as a provider of qwix; needs the extra uniq_jax[qwix]
uniq_jax.models        the networks of the papers
uniq_jax.report        a run's files as one HTML page, and runs compared; needs no JAX
uniq_jax.predict       what an exported network sees in images, as a command too; needs no Flax
uniq_jax.main          the command: trains, evaluates and exports as a config file says
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniq_jax.deploy import freeze as freeze
    from uniq_jax.nn import calibrate as calibrate
    from uniq_jax.quantization import dequantize as dequantize
    from uniq_jax.quantization import quantize as quantize
    from uniq_jax.rules import Rule as Rule
    from uniq_jax.summarize import summary as summary

__version__ = "0.1.0"

# Loaded when they are first used: whoever only wants a quantizer doesn't pay for Flax.
_LAZY = {
    "Rule": "uniq_jax.rules",
    "calibrate": "uniq_jax.nn",
    "dequantize": "uniq_jax.quantization",
    "freeze": "uniq_jax.deploy",
    "quantize": "uniq_jax.quantization",
    "summary": "uniq_jax.summarize",
}
_ROOMS = (
    "config",
    "data",
    "deploy",
    "interop",
    "linen",
    "models",
    "nn",
    "predict",
    "quantizers",
    "qwix",
    "report",
    "rules",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_ROOMS])
