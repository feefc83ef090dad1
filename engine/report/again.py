"""How to run a run again: its resolved settings as TOML, and the command."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from engine.storage.access import public

__all__ = ["command", "toml"]


def toml(config: Mapping[str, Any]) -> str:
    """The settings of a run as a file that `promptkd distill` reads. What is None is left out: it
    is so by default; and so are passwords and signed queries of URLs, which are to be added."""
    plain = {k: v for k, v in config.items() if not isinstance(v, dict) and k != "overwrite"}
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    lines = _fields(plain)
    for name, section in sections.items():
        lines += ["", f"[{name}]", *_fields(section)]
    return "\n".join(lines) + "\n"


def command(config: Mapping[str, Any]) -> str:
    """Another run of that file, beside the first."""
    name = shlex.quote(f"{config.get('name', 'run')}-again")
    return f"promptkd distill run.toml --name {name}"


def _fields(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_value(value)}" for name, value in values.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    # JSON's strings, numbers and truth values are TOML's, but for one control character and for
    # surrogate pairs, which do not come where text is kept as it is.
    return json.dumps(public(value), ensure_ascii=False).replace("\x7f", "\\u007f")
