"""The `promptkd` command: `promptkd distill run.toml` is `python -m jobs.distill run.toml`."""

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PRESETS = Path(__file__).parent / "configs" / "presets"  # folders of TOML files, by command
COMMANDS = {
    "doctor": "what works on this machine, and how to mend what does not",
    "shards": "pack images, or a data set of the paper, into WebDataset shards",
    "index": "index and check the shards of a folder",
    "pretrain": "adapt a teacher from a few labelled images (stage I)",
    "classes": "store the class vectors of a teacher; --mine: propose class names",
    "label": "run a distillation's teachers alone: into a store, or to time them",
    "plan": "teachers, students, hours and cost, from rates",
    "distill": "distil a teacher into a student over unlabeled images",
    "evaluate": "accuracy of a bundle: base, novel, harmonic mean, all classes",
    "predict": "classify images with a bundle, without teacher or text tower",
    "store": "list, check, tidy or curate by the labels that runs have recorded",
    "bundle": "add, rename or drop classes of a bundle",
    "export": "write a bundle for ONNX Runtime or open_clip",
    "report": "a run as a page, runs compared, or what benchmarks have measured",
    "submit": "run a distillation as a Ray job on a cluster",
    "quickstart": "the whole way on a generated domain, in minutes",
}
_ROOM = "; free some, and give the command again: of a run that has begun, with --resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and gives its exit code: 0 done, 1 failed, 2 for what the user can mend, 130
    after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"promptkd {_version()}")
        return 0
    if words[0] not in COMMANDS:
        print(f"promptkd: no command {words[0]!r}{_instead(words[0])}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"jobs.{words[0]}").main, words[1:], words[0])


def run(command: Callable[[Sequence[str]], int | None], args: Sequence[str], name: str) -> int:
    """Calls a command's main; how it ends becomes a message and an exit code, see main()."""
    from engine.config import Drained, RunFailed, UserError

    # Read when Ray is imported: a thread that outlives its cluster is not to start another.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        return command(args) or 0
    except UserError as error:
        print(f"promptkd {name}: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"promptkd {name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"promptkd {name}: {where}{error.strerror}{_ROOM if full else ''}", file=sys.stderr)
        return 2
    except Drained as word:
        print(f"promptkd {name}: {word}", file=sys.stderr)
        return word.exit_code
    except KeyboardInterrupt as word:
        print(f"promptkd {name}: {f'{word}' or 'interrupted'}", file=sys.stderr)
        return 130


def _version() -> str:
    try:
        return version("promptkd-engine")
    except PackageNotFoundError:
        return f"of {Path(__file__).parents[1]}, which is not installed"


def _instead(word: str) -> str:
    """The command that was meant, as far as can be told; else all of them."""
    if word.endswith((".toml", ".json")):
        return f"; is it `promptkd distill {word}`?"
    near = get_close_matches(word.lower(), COMMANDS, 1)
    all_ = "promptkd --help lists all"
    return f"; is it `promptkd {near[0]}`? {all_}" if near else f"\n\n{_help()}"


def _help() -> str:
    lines = [f"  {name:<12}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: promptkd COMMAND [FILE.toml] [--section.field VALUE ...]",
            "",
            *lines,
            "",
            "promptkd COMMAND --help lists a command's options; promptkd --version the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
