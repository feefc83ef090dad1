"""How a run's labels are made, as all who make or read them are told; and a labeller by it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from engine.config import RunConfig
from engine.data.corpus import open_corpora
from engine.data.isolate import decoder_of
from engine.labels.labelling import Labelling
from engine.labels.store import Store
from engine.labels.teacher import Labeller, Labels, Team, policies

__all__ = ["Assignment", "labeller_of"]


class Assignment(NamedTuple):
    """`config` is resolved."""

    config: RunConfig
    labels: Labels
    labellings: Mapping[str, Labelling]
    records: bool  # into the store


def labeller_of(assignment: Assignment, device: torch.device) -> Labeller:
    """A labeller of a run's corpora, which it opens; close() ends it."""
    config = assignment.config
    corpora = open_corpora(config.corpus)
    told = {name: labelling for name, labelling in assignment.labellings.items() if name in corpora}
    recorded = {}
    if assignment.records:
        store = Store(config.targets.store)
        recorded = {name: store.recorded(labelling) for name, labelling in told.items()}
    threads = config.teacher.threads
    return Labeller(
        Team.load(assignment.labels, device, config.corpus.block_samples),
        corpora,
        {
            pixels: decoder_of(policy, config.device, threads, config.corpus)
            for pixels, policy in policies(assignment.labels).items()
        },
        {name: labelling.fingerprint for name, labelling in told.items()},
        assignment.labels.wire,
        recorded,
    )
