"""What the runs of a sweep are: their specs, as `uniq_jax.main` makes them of its arguments."""

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from uniq_jax.config import run_spec
from uniq_jax.spec import ConfigError, RunSpec
from uniq_jax.train import same_run
from uniq_jax.train.sources import CONFIG_FILE


def overridden(config: Any, words: list[str]) -> RunSpec:
    """The spec of a config whose keys are overridden by --config.KEY=VALUE.

    Args:
      config: a ConfigDict.
      words: arguments of `uniq_jax.main`; those that are not of the config don't count.

    Raises:
      ConfigError: if the config has no such key, or a value is wrong.
    """
    for word in words:
        if word.startswith("--config."):
            _check_key(config, word.removeprefix("--config.").partition("=")[0])
    values = flags.FlagValues()
    values.set_gnu_getopt()  # What follows a value that stands by itself counts too.
    argv = ["uniq_jax.main", *words]
    # Which keys are overridden is looked up in the arguments when the flag is defined.
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv, known_only=True)
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    built: Any = values["config"].value
    return run_spec(built)


def _check_key(config: Any, key: str) -> None:
    """Names the part of the key that is missing, where the flags would name the bare part."""
    names = key.partition("[")[0].split(".")
    for depth, name in enumerate(names, start=1):
        try:
            config = config[name]
        except (KeyError, TypeError):
            part = ".".join(names[:depth])
            known = f"; there are {', '.join(sorted(config))}" if hasattr(config, "keys") else ""
            raise ConfigError(f"config.{part} is no known key of the config{known}") from None


def changes(workdir: Path, spec: RunSpec) -> list[str]:
    """What makes the spec another run's than the one in `workdir`; none where that is unknown."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        return []
    return same_run.changes(json.loads(path.read_text(encoding="utf-8")), spec, trains=True)
