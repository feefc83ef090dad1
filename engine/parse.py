"""The one parser: TOML files are spelled out as flags in front of the command line, for tyro.

`promptkd distill run.toml --train.lr 1e-3`. Later words win over earlier ones. Unknown keys, wrong
types and values out of range each end in a one-screen error that names the dotted field.
"""

import dataclasses
import math
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional, arg

from engine.config import RunConfig, UserError
from engine.config_pretrain import PretrainConfig
from engine.json_text import parse_object
from engine.parse_unknown import no_longer, unknown

__all__ = ["Flat", "Positional", "parse"]

T = TypeVar("T")
# Whose files others may be taken for.
_STAGES = {"promptkd distill": RunConfig, "promptkd pretrain": PretrainConfig}
Flat = Annotated[T, arg(name="")]  # a nested config whose own name does not show in its flags


def parse(
    schema: type[T],
    args: Sequence[str],
    *,
    prog: str,
    from_files: bool = False,
    presets: Path | None = None,
    more: Sequence[str] = (),
) -> T:
    """Fills `schema` from flags and, with `from_files`, from the TOML or JSON files among `args`,
    and then from `more`.

    `presets` is a folder of TOML files; the one that the last `preset` names is read before all
    else. A preset without a file is what the schema's defaults are.

    Ends the process with a message if it cannot (exit code 2), or after --help (exit code 0).
    Raises UserError for a file that cannot be read, and for values that do not fit together.
    """
    files, words = _split(args, schema) if from_files else ([], list(args))
    files += more
    flags = [flag for file in files for flag in _file_flags(file, schema, prog)]
    if presets and (preset := presets / f"{_preset([*flags, *words])}.toml").exists():
        flags = [*_file_flags(str(preset), schema, prog), *flags]
    source = f"read from {', '.join(files)}, then the command line"
    try:
        return tyro.cli(schema, args=flags + words, prog=prog, use_underscores=True)
    except SystemExit as end:
        if end.code and files:
            print(source.capitalize(), file=sys.stderr)
        raise
    except UserError as error:
        raise UserError(f"{error} ({source})" if files else str(error)) from None


def _split(args: Sequence[str], schema: type) -> tuple[list[str], list[str]]:
    """The config files among the words, which are no values of flags; and the other words."""
    types = {f"--{name}".replace("_", "-"): kind for name, kind in _types(schema)}
    files: list[str] = []
    words: list[str] = []
    takes = 0.0  # words that the last flag may still take as its values
    for word in args:
        if word.startswith("--"):
            kind = types.get(word.replace("_", "-"))
            several = get_origin(kind) is tuple
            takes = math.inf if several else 0 if kind is bool or "=" in word else 1
            words.append(word)
            continue
        is_file = word.endswith((".toml", ".json")) and takes <= 0
        takes -= 1
        (files if is_file else words).append(word)
    return files, words


def _preset(words: Sequence[str]) -> str:
    """The name that the last --preset gives."""
    named = ""
    for before, word in zip(("", *words), words, strict=False):
        if before == "--preset":
            named = word
        elif word.startswith("--preset="):
            named = word.removeprefix("--preset=")
    return named


def _file_flags(file: str, schema: type, prog: str) -> Iterator[str]:
    """A file's fields as flags. Raises UserError, naming the file and each field that is wrong."""
    try:
        text = Path(file).read_text()
        tree = parse_object(text) if file.endswith(".json") else tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:  # of either format, or of the file
        raise UserError(f"{file}: cannot be read: {error}") from None
    types = dict(_types(schema))
    stages = {one: dict(_types(fields)) for one, fields in _STAGES.items() if one != prog}
    leaves = dict(_leaves(tree))
    wrong = [unknown(name, types, stages) for name in leaves if name not in types]
    wrong += filter(None, (no_longer(name, value) for name, value in leaves.items()))
    if wrong:
        raise UserError("\n".join(f"{file}: {why}" for why in dict.fromkeys(wrong)))
    for name, value in leaves.items():
        section, _, last = name.rpartition(".")
        known = types[name]
        if not _fits(value, known):
            raise UserError(f"{file}: --{name} cannot be {value!r}")
        if value is None:
            continue  # as it is by default
        if get_origin(known) is tuple:
            if options := [one for one in value if str(one).startswith("-")]:
                raise UserError(f"{file}: --{name} cannot hold {options[0]!r}")
            yield from (f"--{name}", *value)
        elif known is bool:
            flag = last if value else f"no_{last}"
            yield f"--{section}.{flag}" if section else f"--{flag}"
        else:
            yield f"--{name}={value}"  # in one word, since a value may begin with a dash


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _types(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every field, without annotations."""
    for name, hint in get_type_hints(schema, include_extras=True).items():
        flat = get_origin(hint) is Annotated and get_args(hint)[1:] == get_args(Flat)[1:]
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _types(kind, prefix if flat else f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a file has the type of a field; an int will do for a float."""
    if get_origin(kind) is Literal:
        return isinstance(value, tuple(type(choice) for choice in get_args(kind)))
    if get_origin(kind) is UnionType:
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(one, get_args(kind)[0]) for one in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind if kind in (int, str, NoneType) else ())
