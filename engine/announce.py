"""What a run says of itself before it begins."""

from collections.abc import Mapping, Sequence

from engine.config import RunConfig
from engine.data.corpus import Corpus
from engine.labels.sources import Choice
from engine.labels.teacher import Labels
from engine.rates import label_bytes
from engine.train.schedule import loss_terms, peak_rate

__all__ = ["placement", "recipe", "savings"]


def recipe(config: RunConfig, classes: int) -> str:
    """How a student learns."""
    train = config.train
    return (
        f"preset {config.preset}: {train.optimizer} at learning rate {peak_rate(train):g}, batch "
        f"{train.batch}; {loss_terms(train, classes)}; keeps "
        + ("the last weights" if train.selection == "last" else "the best pass on the test images")
    )


def placement(configs: Sequence[RunConfig], choice: Choice) -> str:
    """Who works where."""
    told, teacher = configs[0], configs[0].teacher
    students = " and ".join(
        f"student {config.name} on {config.student.workers} workers (ZeRO-"
        f"{config.student.zero_stage})"
        for config in configs
    )
    if choice.source == "inline":
        return f"starting {students}, each with a teacher inside"
    if choice.source != "stream":
        return f"starting {students}, and no teacher"
    least = max(teacher.actors, 1)
    most = max(least, told.teacher.max_actors)
    number = f"{least}" if least == most else f"{least} to {most}"
    return f"starting {students}; teacher actors: {number}"


def savings(
    store: str, labels: Labels, corpora: Mapping[str, Corpus], missing: Mapping[int, int]
) -> str:
    """What recorded labels take, and spare."""
    image = label_bytes(labels.width, labels.width, labels.wire)
    corpus = corpora["shards"]
    blocks = len(corpus.listed.used) if corpus.listed else len(corpus.blocks)
    views = [missing[view] for view in missing if view >= 0]
    there = sum(blocks - lacking for lacking in views)
    return (
        f"store {store}: {image:,} bytes an image, {image * corpus.samples / 1e6:,.3g} MB a view; "
        f"{there} of {blocks * len(views)} labels of blocks are recorded, so "
        f"{100 * there / max(blocks * len(views), 1):.0f} % of the teacher's work is saved"
    )
