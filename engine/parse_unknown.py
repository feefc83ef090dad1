"""What is said of a file's fields and values that there are not: whose they are, or the nearest."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

__all__ = ["no_longer", "unknown"]

_MOST = 3  # fields that are proposed
_LIKE = 0.75  # from which a name is near another

# What older files may hold, in the words of 0.1.0. No field of 0.1.0's files has been renamed.
_VALUES = {
    "teacher.gpus": (-1, "leave it out, and GPUs are chosen"),
    "student.gpus": (-1, "leave it out, and GPUs are chosen"),
}
_RECORD = ("git_sha", "lives", "versions")  # of a run folder's config.json


def no_longer(name: str, value: Any) -> str:
    """What to write instead of a value that a field has had once; empty for others."""
    gone, instead = _VALUES.get(name, ((), ""))
    return f"{name} = {value} is of an older version: {instead}" if value == gone else ""


def unknown(name: str, known: Collection[str], others: Mapping[str, Collection[str]]) -> str:
    """Of a field that is none of the `known`; `others` are the fields of commands whose files it
    may be meant for."""
    first = name.partition(".")[0]
    if first in _RECORD:
        return f"{first}: a run tells this of itself in its config.json; leave it out"
    if any(field.startswith(f"{name}.") for field in known):
        return f"{name} is a section: [{name}], and its fields below"
    if above := [field for field in known if name.startswith(f"{field}.")]:
        return f"{name}: {above[0]} is a field, and not a section"
    for command, fields in others.items():
        if name in fields:
            return f"{name} is a field of `{command}`, and not of this command"
    near = _nearest(name, known)
    return f"{name}: there is no such field" + (f"; is it {' or '.join(near)}?" if near else "")


def _nearest(name: str, known: Collection[str]) -> list[str]:
    """Fields of the same name elsewhere, as where a section was forgotten; else of similar ones."""
    lasts = {field: field.rpartition(".")[2] for field in known}
    last = name.rpartition(".")[2]
    if elsewhere := [field for field in known if lasts[field] == last]:
        return elsewhere[:_MOST]
    if near := get_close_matches(name, known, _MOST, _LIKE):
        return near
    similar = get_close_matches(last, {*lasts.values()}, _MOST, _LIKE)
    return [field for field in known if lasts[field] in similar][:_MOST]
