"""Which tokens end an answer, as the checkpoint's files say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.convert.checkpoint import read_json
from jaxmllm.errors import ConfigError

# Where no file says anything: the defaults of transformers' text configs, by their model_type. Qwen2's has none.
DEFAULT_STOPS: dict[str, tuple[int, ...]] = {
    "llama": (2,),
    "mistral": (2,),
    "qwen2_vl_text": (151645,),
    "qwen2_5_vl_text": (151645,),
}
_TEXT_OF_FAMILY = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}

GENERATION_CONFIG = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Endings:
    """How answers end.

    Attributes:
      stop_tokens: ids that end an answer; none where nothing does.
      pad_token: id that stands behind an answer's end.
    """

    stop_tokens: tuple[int, ...]
    pad_token: int


def read_endings(folder: Path, family: str) -> Endings:
    """``eos_token_id`` (one or several) and ``pad_token_id`` of a checkpoint.

    Of ``generation_config.json`` where there is one, else of ``config.json`` or its text config, else the default of
    the decoder's type. Padding is the first stop token where no file names it. Source: transformers'
    ``GenerationConfig.from_model_config``.

    Args:
      folder: of the checkpoint.
      family: its ``model_type``.

    Raises:
      ConfigError: a file that cannot be read, or something else than ids.
    """
    path = folder / GENERATION_CONFIG
    if path.is_file():
        fields = read_json(path)
        return _endings(fields.get("eos_token_id"), fields.get("pad_token_id"), path)
    path = folder / "config.json"
    fields = read_json(path) if path.is_file() else {}
    text = fields.get("text_config") or {}
    kind = text.get("model_type") or _TEXT_OF_FAMILY.get(family, "llama")
    default = list(DEFAULT_STOPS.get(kind, ()))
    return _endings(_first("eos_token_id", fields, text, default), _first("pad_token_id", fields, text, None), path)


def _first(name: str, fields: Mapping[str, Any], text: Mapping[str, Any], default: Any) -> Any:
    """A field of the config or, where that says nothing, of its text config."""
    if fields.get(name) is not None:
        return fields[name]
    return text.get(name, default)


def _endings(stop: Any, pad: Any, path: Path) -> Endings:
    ids = [] if stop is None else stop if isinstance(stop, list) else [stop]
    for name, value, given in (("eos_token_id", stop, ids), ("pad_token_id", pad, [] if pad is None else [pad])):
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in given):
            raise ConfigError(f"{path}: {name} is {value!r}; expected a token's id")
    return Endings(tuple(ids), (ids or [0])[0] if pad is None else pad)
