"""Class names, from a file of the user's."""

from pathlib import Path

from engine.config import UserError

__all__ = ["base_count", "read_names", "read_vocabulary"]


def read_names(path: str, field: str = "classes.names", repeats: bool = False) -> tuple[str, ...]:
    """Class names, one a line. Raises UserError for a missing file, an empty name, and, unless
    `repeats`, a name that comes twice."""
    if not path:
        raise UserError(f"{field} is not set: a text file with one class name a line")
    try:
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read ({error})") from None
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{field}: {path}, line {number} is empty")
        if name in seen and not repeats:
            raise UserError(
                f"{field}: {path}, line {number} repeats {name!r}: nothing would tell these "
                "classes apart. ImageNet has such names; --classes.repeats lets them be"
            )
        seen.add(name)
    if not names:
        raise UserError(f"{field}: {path} is empty")
    return tuple(names)


def read_vocabulary(path: str, field: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Words or phrases, one a line, and how many lines were left out, by reason: empty ones, and
    those that repeat another. Raises UserError for a file that cannot be read, a line that is no
    text, and where no word is left."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if line and not (line.isprintable() and any(map(str.isalpha, line))):
            shown = ascii(line[:40])
            raise UserError(f"{field}: {path}, line {number} is neither word nor phrase: {shown}")
    named = [line for line in lines if line]
    words = tuple(dict.fromkeys(named))
    if not words:
        raise UserError(f"{field}: {path} holds no words")
    left_out = {"empty": len(lines) - len(named), "repeated": len(named) - len(words)}
    return words, {reason: count for reason, count in left_out.items() if count}


def base_count(classes: int) -> int:
    """How many of the classes are base: the first half in label order, rounded up (CoCoOp)."""
    return -(-classes // 2)
