"""Where a prepared TFDS set lies on disk, and clear errors where it does not.

The directory is found here and not by `tfds.builder`, which would fall back to the code that
downloads a set, and which accepts only the versions that this code knows.
"""

import difflib
import os
import re
from typing import Any

_NAME = re.compile(r"(?P<base>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")

# The community sets are left out: their list comes from the network.
_LIST = "tfds.list_builders(with_community_datasets=False)"


def find_prepared(name: str, data_dir: str | None):
    """The directory of one version of a prepared set.

    Args:
        name: "set", "set/config", each with or without ":version". Without a version the newest
            prepared one is taken, without a config the only prepared one.
        data_dir: Directory of all sets, or None for TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        The `epath.Path` of a directory that holds features.json.

    Raises:
        ValueError: On an unknown set, a malformed name, or an ambiguous config.
        FileNotFoundError: If `data_dir` is missing or the set is not prepared in it.
    """
    from etils import epath  # what TFDS itself reads with: local paths and bucket URLs

    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"name={name!r} must be 'digits' or a TFDS name: 'set', 'set/config' or 'set:1.2.3'"
        )
    base, config, version = match["base"], match["config"], match["version"]
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root: Any = epath.Path(data_dir if data_dir is not None else default).expanduser()
    wanted = f"{base}/{config}" if config else base
    prepare = (
        f"To prepare it, in an environment with TensorFlow: tfds build {wanted} "
        f"--data_dir={root} --file_format=array_record, "
        f"or in Python tfds.builder({wanted!r}, "
        f"data_dir={str(root)!r}, file_format='array_record').download_and_prepare()"
    )
    if not root.is_dir():
        if data_dir is None:
            _check_known(base, [])
        raise FileNotFoundError(
            f"data_dir={str(root)!r} is not a directory; expected is the directory of prepared "
            f"TFDS sets, with {base}/[config/]version/features.json below it. {prepare}"
        )
    if not (root / base).is_dir():
        _check_known(base, [path.name for path in root.iterdir() if path.is_dir()])
        raise FileNotFoundError(
            f"name={name!r} is not prepared in data_dir={str(root)!r}. {prepare}"
        )
    found = _versions(root / wanted)
    if not found and config is None:
        configs = {path.name: _versions(path) for path in (root / base).iterdir()}
        configs = {key: versions for key, versions in configs.items() if versions}
        if len(configs) > 1:
            raise ValueError(
                f"name={name!r} must name one of its prepared configs: "
                f"{[f'{base}/{key}' for key in sorted(configs)]}"
            )
        found = next(iter(configs.values()), found)
    if not found or (version is not None and version not in found):
        raise FileNotFoundError(
            f"name={name!r} is not prepared in data_dir={str(root)!r}: prepared versions are "
            f"{sorted(found)}. {prepare}"
        )
    newest = max(found, key=lambda key: [int(number) for number in key.split(".")])
    return found[version or newest]


def _versions(directory) -> dict[str, Any]:
    if not directory.is_dir():
        return {}
    return {
        path.name: path
        for path in directory.iterdir()
        if _VERSION.fullmatch(path.name) and (path / "features.json").exists()
    }


def _check_known(base: str, prepared: list[str]):
    """Raise the error for an unknown set, unless TFDS knows it."""
    import tensorflow_datasets as tfds

    known = {"digits", *prepared, *tfds.list_builders(with_community_datasets=False)}
    if base not in known:
        nearest = difflib.get_close_matches(base, sorted(known)) or ["(none)"]
        raise ValueError(
            f"name={base!r} is an unknown data set; nearest names: {', '.join(nearest)}. Allowed "
            f"are 'digits', what is prepared in data_dir, and the list {_LIST}"
        )
