"""config.json of a quantized folder: the source's own, what the scheme says, and the certificate."""

import json
from collections.abc import Mapping
from typing import Any

from anyquant.formats.certificate import BLANK, OBJECT, WIDEST, Certificate

CONFIG = "config.json"
# keys under which the engines look for what is quantized
SETTINGS = ("quantization_config", "quantization", "compression_config")


def model_config(source: Mapping[str, Any], patch: Mapping[str, Any], settings: Mapping[str, Any]) -> bytes:
    """The bytes of config.json, with room for a certificate."""
    return _rendered({**without_settings(source), **patch, **settings}, BLANK)


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as it was before anything was quantized."""
    return {key: value for key, value in config.items() if key not in (*SETTINGS, OBJECT)}


def stamp_config(text: bytes, certificate: Certificate) -> bytes:
    """A config.json of `model_config` with its certificate filled in, as many bytes as before."""
    return _rendered(json.loads(text), certificate)


def _rendered(config: Mapping[str, Any], certificate: Certificate) -> bytes:
    """Padded behind the object with blanks, which JSON ignores, to the length that any certificate allows."""

    def text(one: Certificate) -> bytes:
        return json.dumps({**config, OBJECT: one.plain()}, indent=2, ensure_ascii=False, sort_keys=True).encode()

    return text(certificate).ljust(len(text(WIDEST))) + b"\n"
