"""What a store of recorded labels holds; whether it is sound; and tidying it up."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine.config import Section, UserError
from engine.parse import Positional, parse
from jobs.cli import run

if TYPE_CHECKING:
    from engine.labels.store import Store

_ROW = "{:<16}  {:<16}  {:<16} {:>7} {:>6} {:>12} {:>5} {:>8} {:>6} {:>10} {:>9} {:>7}"
_HEAD = (
    *("labelling", "teacher", "corpus", "classes", "pixels", "seed"),
    *("view", "blocks", "parts", "images", "MB", "B/image"),
)


@dataclass(frozen=True)
class StoreConfig(Section):
    """Lists, checks or tidies a store of recorded labels (targets.store of a run). And `promptkd
    store curate` lists the samples worth training on; it has a --help of its own.

    ls: its labellings, and what there is of each view. verify: reads every file, and lists the
    damaged ones; exit code 1 if there are any. gc: removes the labellings not to keep; and in any
    case what broken-off writes have left, and parts of blocks that are there whole.
    """

    action: Positional[Literal["ls", "verify", "gc"]]
    """What to do."""
    store: Positional[str]
    """Folder, or s3 or gs URL."""
    remove: bool = False
    """verify: remove damaged files; a run then records them anew."""
    keep: tuple[str, ...] = ()
    """gc: labellings to keep, as ls names them. None named: all are kept."""
    dry_run: bool = False
    """gc: only say what would be removed."""


def main(args: Sequence[str]) -> int:
    if args and args[0] == "curate":
        from jobs.curate import main as curate

        return curate(args[1:])
    config = parse(StoreConfig, args, prog="promptkd store")
    for given, name, action in (
        (config.remove, "remove", "verify"),
        (config.keep, "keep", "gc"),
        (config.dry_run, "dry_run", "gc"),
    ):
        if given and config.action != action:
            raise UserError(f"{name}: is for {action}")
    from engine.labels.store import Store

    store = Store(config.store, "store")
    if not store.labellings():
        raise UserError(f"store: {config.store} holds no labels")
    if config.action == "ls":
        return _list(store)
    if config.action == "verify":
        return _verify(store, config.remove)
    return _tidy(store, config.keep, config.dry_run)


def _list(store: "Store") -> int:
    from engine.labels.upkeep import Holding, holdings

    print(_ROW.format(*_HEAD))
    for fingerprint, one in sorted(store.labellings().items()):
        teachers = "+".join(teacher[: 16 // len(one.teachers)] for teacher in one.teachers)
        pixels = ",".join(str(pixels) for pixels in sorted(set(one.pixels)))
        about = (fingerprint, teachers, one.corpus[:16], len(one.class_names), pixels, one.seed)
        for held in holdings(store, fingerprint) or [Holding(view=0)]:
            view = "test" if held.view < 0 else held.view
            size = (f"{held.bytes / 1e6:.1f}", f"{held.bytes / max(held.images, 1):.0f}")
            print(_ROW.format(*about, view, held.blocks, held.parts, held.images, *size))
    return 0


def _verify(store: "Store", remove: bool) -> int:
    from engine.labels.upkeep import checked
    from engine.progress import track

    files = damaged = 0
    for fingerprint in sorted(store.labellings()):
        for file, fault in track(checked(store, fingerprint), fingerprint):
            files += 1
            if fault:
                damaged += 1
                print(f"{'removed' if remove else 'damaged'}: {file}: {fault}")
                if remove:
                    store.folder.remove(file)
    print(f"{store.where}: {files} files, {damaged} damaged")
    return 1 if damaged else 0


def _tidy(store: "Store", keep: Sequence[str], dry_run: bool) -> int:
    from engine.labels.upkeep import needless

    found = needless(store, keep)
    for file, why in found:
        print(f"{'would remove' if dry_run else 'removed'}: {file} ({why})")
        if not dry_run:
            store.folder.remove(file)
    print(f"{store.where}: {len(found)} files{' would be' if dry_run else ''} removed")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "store"))
