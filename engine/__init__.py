"""A high-throughput engine for PromptKD, unsupervised prompt distillation of CLIP.

    from engine import distill, Teacher, Student, Corpus, Bundle

is all that most need of it, and docs/python.md shows each at work. Names are looked up when they
are first used, so that `import engine` loads neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import distill
    from engine.clip.bundle import Bundle
    from engine.clip.student import Student
    from engine.data.corpus import Corpus
    from engine.labels.teacher import Teacher

__all__ = ["Bundle", "Corpus", "Student", "Teacher", "distill"]

_HOMES = {
    "distill": "engine.api",
    "Teacher": "engine.labels.teacher",
    "Student": "engine.clip.student",
    "Corpus": "engine.data.corpus",
    "Bundle": "engine.clip.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
