"""How steps are compiled: options that help on a platform, and a cache of compiled programs."""

import functools
import os
from pathlib import Path
from typing import Any

import jax

# XLA:CPU hands float32 convolutions to a library that runs many of their shapes on one thread;
# this keeps it for reductions alone, which halves the time of a training step. Several devices must
# not share it for these: of one program on the same input, they got other sums from run to run,
# half of some gradients away. Experimental, so it is tried out before it is used.
_OPTION = "xla_cpu_experimental_ynn_fusion_type"
_OF_ONE_DEVICE = {_OPTION: "LIBRARY_FUSION_TYPE_REDUCE"}
_OF_SEVERAL = {_OPTION: "LIBRARY_FUSION_TYPE_DOT"}


@functools.cache
def compiler_options() -> dict[str, bool | str]:
    """Options for `jax.jit(compiler_options=…)` that this platform and XLA version know."""
    if jax.default_backend() != "cpu":
        return {}
    # Of all processes together, so that the bits do not depend on how devices are shared out.
    options = _OF_ONE_DEVICE if jax.device_count() == 1 else _OF_SEVERAL
    try:
        jax.jit(lambda: 0, compiler_options=dict(options))()
    except Exception:
        return {}
    return dict(options)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where or whether to.

    They go to `uniq_jax` in the user's cache directory ($XDG_CACHE_HOME, else ~/.cache); where that
    cannot be written, nothing is kept.
    """
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None:
        return
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(root, "uniq_jax", "compiled")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
