"""What an ONNX file says about itself; reading it needs no ONNX."""

import dataclasses
import json
from collections.abc import Mapping

from uniq_jax.deploy.network import About

_FORMAT = "uniq_jax.onnx"
_VERSION = "1"


def onnx_metadata(form: str, about: About) -> dict[str, str]:
    """The metadata of a file of `export_onnx`."""
    return {
        "format": _FORMAT,
        "format_version": _VERSION,
        "form": form,
        "about": json.dumps(dataclasses.asdict(about)),
    }


def onnx_about(metadata: Mapping[str, str]) -> About:
    """What `network.about` was when a file was written.

    Args:
      metadata: of the file; ONNX Runtime has it as
        `session.get_modelmeta().custom_metadata_map`.

    Raises:
      ValueError: if no version of this package, or a newer one, wrote the file.
    """
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            "the ONNX file was not written by export_onnx: its metadata is another, without the "
            f"property format={_FORMAT}"
        )
    version = metadata.get("format_version", "")
    if version != _VERSION:
        raise ValueError(
            f"the ONNX file has format version {version}, and this package knows {_VERSION}; it "
            "takes a newer uniq_jax"
        )
    try:
        return About(**json.loads(metadata["about"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the ONNX file's property about (={metadata.get('about')!r}) must be JSON of "
            f"{', '.join(field.name for field in dataclasses.fields(About))}: {error}"
        ) from error
