"""Checks of what a run names: shards, class names, weights, and whether all of it fits."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.config import RunConfig, UserError
from engine.doctor.apart import Finding
from engine.parse import parse

__all__ = ["corpus", "fit", "models", "named_models"]

_RETRIES, _TIMEOUT_S = 1, 10.0  # a doctor is less patient than a run


def corpus(
    field: str, where: str, block_samples: int, hosts: list[str], timeout_s: float
) -> Iterator[Finding]:
    """Opens the manifest, and reads the first, the middle and the last block."""
    from engine.data.corpus import Corpus
    from engine.progress import hand_over
    from engine.storage.access import Access

    said: list[str] = []
    hand_over(said.append)  # of a shard that cannot be read, it is said why
    access = Access(tuple(hosts), min(timeout_s, _TIMEOUT_S), _RETRIES)
    opened = Corpus.open(where, block_samples, field, access)
    last = len(opened.blocks) - 1
    started = time.perf_counter()
    read = [s for block in sorted({0, last // 2, last}) for s in opened.read(block)]
    took_s = time.perf_counter() - started
    bad = [sample for sample in read if sample.reason in ("unreadable", "changed")]
    good = sum(sample.data is not None for sample in read)
    left_out = f", {opened.excluded:,} of them left out" if opened.excluded else ""
    found = f"{opened.samples:,} images in {len(opened.shards):,} shards{left_out}"
    if bad:
        yield Finding(
            field,
            "warn" if good else "fail",
            f"{found}; of {len(read):,} that were read, {len(bad):,} are {bad[0].reason}: "
            f"{(said or [''])[0]}",
            f"look at {opened.shards[bad[0].shard]}; promptkd index, where shards have been "
            "replaced",
        )
    else:
        yield Finding(field, "ok", f"{found}; read {len(read):,} in {took_s:.2g} s")


def named_models(config: RunConfig) -> bool:
    """Whether a config names models, so that it is a run's."""
    return bool(config.teacher.model or config.student.model)


def models(file: str) -> Iterator[Finding]:
    """Class names, class vectors, prompts and weights of the run that `file` holds."""
    from engine.clip.class_vectors import ClassVectors
    from engine.clip.names import read_names
    from engine.clip.weights import check_weights

    config = _read(file)
    classes, teacher = config.classes, config.teacher

    def names() -> str:
        return f"{len(read_names(classes.names, repeats=classes.repeats))} in {classes.names}"

    def vectors() -> str:
        return f"{len(ClassVectors.load(Path(classes.vectors)).names)} in {classes.vectors}"

    def prompts() -> str:
        if not Path(teacher.prompts).is_file():
            raise UserError(f"teacher.prompts: {teacher.prompts}: no such file")
        return teacher.prompts

    def weights(one: Any, prefix: str) -> str:
        check_weights(one.model, one.weights, prefix)
        if one.weights and not Path(one.weights).is_file():
            return f"{one.model}; open_clip downloads {one.weights} where it has it not yet"
        return f"{one.model} {one.weights}".rstrip()

    yield _told("classes.names", names)
    if classes.vectors:
        yield _told("classes.vectors", vectors)
    yield _told("teacher", lambda: weights(teacher, "teacher."))
    if teacher.prompts:
        yield _told("teacher.prompts", prompts)
    yield _told("student", lambda: weights(config.student, "student."))


def _told(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look())
    except UserError as error:
        return Finding(name, "fail", str(error))


def fit(file: str, resume: bool) -> Iterator[Finding]:
    """Whether the run that `file` holds could begin, or go on: all that it is asked before a model
    is built."""
    from engine import run_folder
    from engine.preflight import check

    config = _read(file)
    check(config)
    try:
        run_folder.check(config, resume)
    except UserError as error:
        yield Finding("run", "warn", str(error))
    else:
        yield Finding("run", "ok", f"{config.folder}: its settings fit together")


def _read(file: str) -> RunConfig:
    return parse(RunConfig, [file], prog="promptkd doctor", from_files=True)
