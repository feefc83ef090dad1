"""Which target source a run has, and how a student worker builds it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.config import RunConfig
from engine.data.corpus import Corpus
from engine.data.views import TEST_VIEW
from engine.labels.assembly import Assembly
from engine.labels.assignment import Assignment, labeller_of
from engine.labels.inline import InlineSource, OnDemandSource, SyntheticSource
from engine.labels.labelling import Labelling
from engine.labels.recorded import RecordedSource
from engine.labels.store import Recorded, Store
from engine.labels.targets import TargetSource
from engine.labels.teacher import Team
from engine.progress import track

if TYPE_CHECKING:
    from engine.labels.stream import StreamSource

__all__ = ["Choice", "Place", "chosen", "missing_blocks", "opened", "source_of", "stream_of"]


class Choice(NamedTuple):
    """The source of a run's labels, and why it is that."""

    source: str  # inline, stream, store or synthetic
    why: str


class Place(NamedTuple):
    """A student worker, as a source needs to know it."""

    who: str
    workers: int  # of its student
    kept_samples: int
    pixels: int
    device: torch.device


def chosen(
    config: RunConfig, sizes: Sequence[int], pixels: Sequence[int], missing: int | None
) -> Choice:
    """Of a run whose students take images of `sizes` and whose teachers of `pixels`; `missing`: how
    many blocks of all views its store has not, None where there is no store."""
    told = config.targets.source
    if told in ("store", "synthetic"):
        return Choice(told, "as it is told")
    if missing == 0:
        return Choice("store", "all labels are recorded: no teacher is started")
    if told != "auto":
        return Choice(told, "as it is told")
    if len(sizes) > 1:
        return Choice("stream", "several students share the teachers")
    if set(sizes) != set(pixels):
        return Choice("stream", "teacher and student take images of different sizes")
    if config.teacher.actors or config.teacher.max_actors:
        return Choice("stream", "teacher.actors asks for a pool")
    return Choice("inline", "one decode, and no transfer of labels")


def opened(config: RunConfig, labellings: Mapping[str, Labelling]) -> dict[str, Recorded]:
    """The corpora's parts of the run's store; empty where it has none. Raises UserError."""
    if not config.targets.store:
        return {}
    store, add = Store(config.targets.store), config.targets.add_labelling
    if config.targets.source == "store":
        return {name: store.require(one, name) for name, one in labellings.items()}
    return {name: store.open(one, add=add) for name, one in labellings.items()}


def missing_blocks(
    config: RunConfig, recorded: Mapping[str, Recorded], corpora: Mapping[str, Corpus]
) -> dict[int, int]:
    """By view, how many of the blocks that a run needs of its corpora are not recorded."""
    shards = corpora["shards"]
    missing = {
        view: recorded["shards"].missing(view, shards.blocks, shards.listed)
        for view in track(range(config.views), "looking for recorded labels")
    }
    if "evaluation" in recorded:
        blocks = corpora["evaluation"].blocks
        missing[TEST_VIEW] = recorded["evaluation"].missing(TEST_VIEW, blocks)
    return missing


def stream_of(
    assignment: Assignment,
    roster: Any,
    corpora: Mapping[str, Corpus],
    who: str,
    workers: int,
    kept_samples: int,
    device: torch.device,
    shared: bool,
) -> "StreamSource":
    """The stream of a run's labels, for one of `workers`; see StreamSource."""
    from engine.labels.stream import StreamSource  # Ray, which other sources can do without

    labels, targets = assignment.labels, assignment.config.targets
    return StreamSource(
        roster,
        who,
        {name: one.fingerprint for name, one in assignment.labellings.items()},
        {name: corpus.blocks for name, corpus in corpora.items()},
        labels.form,
        labels.width,
        device,
        targets.outstanding,
        workers,
        targets.timeout_s,
        kept_samples,
        shared,
    )


def source_of(
    source: str,
    assignment: Assignment,
    roster: Any,
    corpora: Mapping[str, Corpus],
    place: Place,
    shared: bool,
) -> TargetSource:
    """The target source of a student worker, with the run's store in front of it if there is one.

    `roster` is the stream's; `shared` says that other students ask the same teachers.
    """
    labels, config = assignment.labels, assignment.config
    device, width = place.device, labels.width
    if source == "synthetic":
        return SyntheticSource(labels.teachers[0].classes.vectors.shape[1], device)
    blocks = {name: corpus.blocks for name, corpus in corpora.items()}
    recorded: dict[str, Recorded] = {}
    if config.targets.store:
        store = Store(config.targets.store)
        recorded = {name: store.recorded(one) for name, one in assignment.labellings.items()}
    inner: TargetSource | None = None
    if source == "inline":
        team = Team.load(labels, device, config.train.batch // place.workers)
        assert team.pixels == {place.pixels}
        assembly = None
        if recorded:
            w_ND = torch.from_numpy(labels.teachers[0].classes.vectors)
            assembly = Assembly(recorded, blocks, place.kept_samples, labels.wire, w_ND, team.scale)
        inner = InlineSource(team, assembly)
    elif source == "stream":
        inner = stream_of(
            assignment,
            roster,
            corpora,
            place.who,
            place.workers,
            place.kept_samples,
            device,
            shared,
        )
    elif config.targets.source != "store":  # all is recorded, but may turn out to be damaged
        inner = OnDemandSource(
            lambda: labeller_of(_uncompiled(assignment), device), labels.form, width, device
        )
    if not recorded:
        assert inner is not None
        return inner
    listed = corpora["shards"].listed
    return RecordedSource(
        recorded, blocks, inner, place.kept_samples, labels.form, width, device, listed
    )


def _uncompiled(assignment: Assignment) -> Assignment:
    """With teachers for a few blocks, in the middle of a run."""
    teachers = tuple(
        told._replace(config=replace(told.config, compile="off"))
        for told in assignment.labels.teachers
    )
    return assignment._replace(labels=assignment.labels._replace(teachers=teachers))
