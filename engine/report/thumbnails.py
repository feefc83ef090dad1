"""Small pictures of a few samples, from the corpus, as data URIs."""

import base64
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.config import CorpusConfig, UserError
from engine.data.corpus import Corpus, Sample, open_corpora
from engine.storage.access import scheme

__all__ = ["Pictures", "Place", "Thumbnail", "Thumbnails", "thumbnails"]

_CHILD = Path(__file__).with_name("shrink.py")
_READ_S = 6.0  # for all images together, which may lie behind a slow line
_SHRINK_S = 6.0
_AFAR = "the corpus is not on this machine; `promptkd report RUN --images all` reads it"
Place = tuple[int, int]  # shard and position
Pictures = Literal["local", "all", "none"]  # which are shown: of a corpus on this machine, or any


class Thumbnail(NamedTuple):
    """A sample to be shown."""

    uri: str  # empty where there is no picture
    why: str  # there is none
    key: str
    shard: str  # its name


class Thumbnails(NamedTuple):
    """By place, those of a corpus that was there, or why it was not."""

    found: dict[Place, Thumbnail]
    why: str = ""


def thumbnails(
    settings: Any,
    places: Iterable[Place],
    which: Pictures = "local",
    hosts: Sequence[str] = (),
) -> Thumbnails:
    """Pictures of samples of the corpus of a run, whose `[corpus]` this is. It may come from
    somebody else: URLs are read if `which` is "all", and only `hosts`, not those that it names, may
    lie on addresses that are not public.

    What cannot be read in a few seconds has none. Never raises for a corpus that is gone, damaged
    or slow: a report is to be made without it.
    """
    wanted = [place for place in dict.fromkeys(places) if min(place) >= 0]
    if not wanted:
        return Thumbnails({})
    if which == "none":
        return Thumbnails({}, "pictures were left out: `promptkd report` adds them")
    if not isinstance(settings, Mapping):
        return Thumbnails({}, "config.json names no corpus")
    if which == "local" and _is_afar(str(settings.get("shards", ""))):
        return Thumbnails({}, _AFAR)
    known = {field.name for field in fields(CorpusConfig)}
    told = {name: value for name, value in settings.items() if name in known}
    told |= {"evaluation": "", "samples": "", "retries": 0, "timeout_s": _READ_S, "cache": ""}
    told["hosts"] = tuple(hosts)
    try:
        corpus = open_corpora(CorpusConfig(**told))["shards"]
    except (UserError, OSError, ValueError, TypeError) as error:
        return Thumbnails({}, str(error))
    if which == "local" and any(map(_is_afar, corpus.shards)):
        corpus.close()
        return Thumbnails({}, _AFAR)
    late = threading.Timer(_READ_S, corpus.close)
    late.start()
    try:
        samples = _read(corpus, wanted)
    finally:
        late.cancel()
        corpus.close()
    pictures = shrunk([sample for sample in samples if sample.data])
    found = {}
    for sample in samples:
        place = sample.shard, sample.position
        uri, why = pictures.get(place, ("", sample.reason or "no picture"))
        named = sample.shard < len(corpus.shards)
        name = corpus.shards[sample.shard] if named else f"shard {sample.shard}"
        found[place] = Thumbnail(uri, why, sample.key, name)
    return Thumbnails(found)


def _is_afar(shards: str) -> bool:
    """Whether any of these shards, with `::` between, is at a URL."""
    return any(scheme(one) not in ("", "file") for one in shards.split("::"))


def _read(corpus: Corpus, wanted: Sequence[Place]) -> list[Sample]:
    """Samples, shard by shard: those that the corpus still has, as long as there is time."""
    by_shard: dict[int, list[int]] = {}
    for shard, position in wanted:
        by_shard.setdefault(shard, []).append(position)
    samples: list[Sample] = []
    deadline = time.monotonic() + _READ_S
    for shard, positions in by_shard.items():
        held = int(corpus.blocks.shard_samples[shard]) if shard < len(corpus.shards) else 0
        there = [position for position in positions if position < held]
        late, why = time.monotonic() > deadline, "not read in time"
        if there and not late:
            try:
                samples += corpus.pick(shard, there)
            except (UserError, OSError, ValueError) as error:
                late, why = True, str(error)
        if late:
            samples += [Sample(shard, position, None, why, None) for position in there]
        gone = "not in the corpus any more"
        samples += [Sample(shard, one, None, gone, None) for one in positions if one >= held]
    return samples


def shrunk(samples: Sequence[Sample]) -> dict[Place, tuple[str, str]]:
    """Data URIs by place, or "" and why, of samples with data; by a child process, and another one
    where one is lost over an image."""
    found: dict[Place, tuple[str, str]] = {}
    left = list(samples)
    while left:
        answers, timed_out = _asked(left)
        for sample, answer in zip(left, answers, strict=False):
            uri = f"data:image/jpeg;base64,{base64.b64encode(answer).decode()}" if answer else ""
            found[sample.shard, sample.position] = (uri, "" if uri else "undecodable")
        if len(answers) < len(left):
            lost, why = left[len(answers)], "timed_out" if timed_out else "crashed"
            found[lost.shard, lost.position] = ("", why)
        left = [] if timed_out else left[len(answers) + 1 :]
    return found


def _asked(samples: Sequence[Sample]) -> tuple[list[bytes], bool]:
    """What a child answered until it ended, and whether its time was over."""
    question = b"".join(
        struct.pack(">II", len(sample.data), sample.header.orientation) + bytes(sample.data)
        for sample in samples
        if sample.data is not None and sample.header is not None
    )
    command, timed_out = [sys.executable, "-P", str(_CHILD)], False
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    ) as child:
        try:
            told, _ = child.communicate(question, timeout=_SHRINK_S)
        except subprocess.TimeoutExpired:
            timed_out = True
            child.kill()
            told, _ = child.communicate()
    return _parts(told), timed_out


def _parts(told: bytes) -> list[bytes]:
    """The answers that are whole."""
    found, at = [], 0
    while at + 4 <= len(told):
        (size,) = struct.unpack_from(">I", told, at)
        if at + 4 + size > len(told):
            break
        found.append(told[at + 4 : at + 4 + size])
        at += 4 + size
    return found
