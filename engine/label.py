"""Teachers alone: the labels of a run's corpora into its store, or, to time them, to nowhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from engine import cluster
from engine.clip.towers import load_clip
from engine.config import RunConfig, RunFailed, UserError, absolute
from engine.data.corpus import Corpus, open_corpora
from engine.data.views import TEST_VIEW
from engine.labels.assignment import Assignment
from engine.labels.scaling import Pool
from engine.labels.sources import stream_of
from engine.labels.stream import StreamSource
from engine.labels.targets import BlockView
from engine.preflight import check
from engine.progress import say, track
from engine.staff import arranged

__all__ = ["label"]


def label(config: RunConfig, most_blocks: int | None) -> dict[str, Any]:
    """Labels what a run of this config would ask its teachers, at most so many blocks.

    Gives images, images/s from the first label to the last, and what the teachers did. Raises
    UserError for what the user can mend, RunFailed where the store does not take them.
    """
    config = absolute(config)
    names = check(config)
    needed = cluster.wanted(config, [], streams=True)["CPU"]
    with cluster.session(config.ray.address, needed):
        config = cluster.resolve(config)
        student = load_clip(config.student.model, config.student.weights, "student.")
        assignment, choice = arranged([config], [student], names)
        if choice.source not in ("stream", "inline"):
            raise UserError(f"targets.source: {choice.source} asks no teacher ({choice.why})")
        cluster.wait_for_room(config, [], streams=True)
        pool = Pool(assignment)
        try:
            return _labelled(config, assignment, pool, most_blocks)
        finally:
            pool.close()


def _labelled(
    config: RunConfig, assignment: Assignment, pool: Pool, most_blocks: int | None
) -> dict[str, Any]:
    corpora = open_corpora(config.corpus)
    wanted = list(islice(_all(config, corpora), most_blocks))
    teachers = max(config.teacher.actors, config.teacher.max_actors, 1)
    ahead = 2 * (config.targets.outstanding or 4 * teachers)
    kept_samples, cpu = 2 * ahead * config.corpus.block_samples, torch.device("cpu")
    source = stream_of(
        assignment, pool.roster, corpora, "label/0", 1, kept_samples, cpu, shared=False
    )
    try:
        return _answered(config, wanted, ahead, source, pool)
    finally:
        source.close()


def _answered(
    config: RunConfig, wanted: Sequence[BlockView], ahead: int, source: StreamSource, pool: Pool
) -> dict[str, Any]:
    where = config.targets.store or "nowhere"
    say(f"labelling {len(wanted):,} views of blocks, into {where}; waiting for a teacher")
    images, started = 0, 0.0
    for place, one in enumerate(track(wanted, "labelling")):
        source.request(wanted[place : place + ahead])
        length = len(source.labels([one])[one].valid)
        if place == 0:
            started = time.perf_counter()  # teachers are loaded
        else:
            images += length
    took_s = time.perf_counter() - started
    labels = pool.statement() | source.statement()
    if labels.get("unrecorded"):
        raise RunFailed(f"{config.targets.store} did not take {labels['unrecorded']:.0f} labels")
    return {
        "blocks": len(wanted),
        "images": images,
        "images_per_second": images / took_s if images else None,
        "s": took_s,
        "labels": labels,
    }


def _all(config: RunConfig, corpora: Mapping[str, Corpus]) -> Iterator[BlockView]:
    """What a run asks for, view by view, and then for its evaluation."""
    shards = corpora["shards"]
    needed = shards.listed.used.tolist() if shards.listed else range(len(shards.blocks))
    for view in range(config.views):
        for block in needed:
            yield BlockView("shards", block, view)
    if "evaluation" in corpora:
        for block in range(len(corpora["evaluation"].blocks)):
            yield BlockView("evaluation", block, TEST_VIEW)
