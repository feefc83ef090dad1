"""How a run's labels are made, as all who make or read them are told; and a labeller by it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from engine.config import RunConfig, UserError
from engine.data.corpus import open_corpora
from engine.data.isolate import decoder_of
from engine.data.sample_list import SampleList
from engine.labels.labeller import Labeller
from engine.labels.labelling import Labelling
from engine.labels.store import Store
from engine.labels.teacher import Labels, Team, policies

__all__ = ["Assignment", "labeller_of"]


class Assignment(NamedTuple):
    """`config` is resolved."""

    config: RunConfig
    labels: Labels
    labellings: Mapping[str, Labelling]
    records: bool  # into the store
    samples: str = ""  # fingerprint of the list of samples to train on, if there is one

    def require_list(self, listed: SampleList | None) -> None:
        """Raises UserError where the list that a worker has read is another than the driver's."""
        if (listed.fingerprint if listed else "") != self.samples:
            raise UserError(
                f"corpus.samples: {self.config.corpus.samples} is another list here than where the "
                "run was started, or has changed since"
            )


def labeller_of(assignment: Assignment, device: torch.device) -> Labeller:
    """A labeller of a run's corpora, which it opens; close() ends it."""
    config = assignment.config
    corpora = open_corpora(replace(config.corpus, samples=""))  # blocks are labelled as wholes
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
