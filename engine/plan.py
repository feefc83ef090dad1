"""How to split GPUs between teachers and students: pure arithmetic over rates.

A run is as fast as its slowest stage; stages overlap. What this leaves out: the start of a run, its
evaluation, the all-reduce of a step (about 4 MB), and waits for the slowest of unequal workers or
teachers. A student's rate holds for the images per worker and step at which it was taken.

Images are counted as students train on them: m students on one view of an image are m images.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from engine.config import Range, Section, UserError
from engine.rates import Rates

__all__ = ["Job", "Phase", "Plan", "inline", "plans", "settings", "sizes", "stored", "stream"]

# Blocks of a worker's window for each teacher that works for it, and samples of such a block: with
# so many, tests/pipeline_sim.py has a stream within 5 % of its slowest stage, or 10 % where several
# stages are equally slow. With the defaults it may lose a quarter.
BLOCKS_A_TEACHER, STREAMED_BLOCK = 12, 256

Ceilings = dict[str, float]  # images/s that each stage allows, by its name


@dataclass(frozen=True, kw_only=True)
class Job(Section):
    """What is to be trained. Raises UserError where that makes no sense."""

    images: Annotated[int, Range(1)]
    passes: Annotated[int, Range(1, 1_000_000)] = 20
    views: Annotated[int, Range(0, 1_000_000)] = 0  # 0: one a pass
    students: Annotated[int, Range(1, 1000)] = 1  # each of its own, on the same views

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views > self.passes:
            raise UserError(f"views: {self.passes} passes have no use for {self.views} views")

    @property
    def labelled(self) -> int:
        """Passes with views that no earlier pass of the same student had."""
        return self.views or self.passes


class Phase(NamedTuple):
    """A part of a run at one speed."""

    passes: int  # over all students
    images_per_second: float
    bound: str  # the stage that is the slowest


class Plan(NamedTuple):
    """One way to run a job."""

    source: Literal["inline", "stream"]
    store: bool  # labels are recorded, and read from the second time on
    gpus: int
    teachers: int  # GPUs that label alone; 0 inline
    students: int  # GPUs that train
    phases: tuple[Phase, ...]
    images_per_second: float  # over the whole of it
    hours: float
    gpu_hours: float

    @property
    def bound(self) -> str:
        return ", then ".join(phase.bound for phase in self.phases)


def inline(rates: Rates, gpus: int) -> Ceilings:
    """Every GPU labels and trains, at 1 / (1/teacher + 1/student). Pixels are decoded once for
    both. Several students take turns."""
    return _device(rates, gpus, "teacher and student", rates.teacher, rates.student)


def stored(rates: Rates, gpus: int, nodes: int) -> Ceilings:
    """Students alone, whose labels come from a store: with images from the disk, and over the link
    where there are several nodes."""
    ceilings = _device(rates, gpus, "student", rates.student, read_bytes=rates.label_bytes)
    if rates.link_gbit_s and nodes > 1:
        ceilings["link"] = gpus * _link(rates)
    return ceilings


def stream(rates: Rates, teachers: int, students: int, together: int = 1) -> Ceilings:
    """Some GPUs label for others that train `together` students; a label is made once, and sent to
    each of them. Both sides read and decode. All labels are taken to cross the link where there are
    several nodes."""
    assert teachers > 0 and students >= together and students % together == 0
    by_teachers = _device(rates, teachers, "teacher", rates.teacher)
    by_students = _device(rates, students, "student", rates.student)
    ceilings = {_of("teachers", stage): rate * together for stage, rate in by_teachers.items()}
    ceilings |= {_of("students", stage): rate for stage, rate in by_students.items()}
    if rates.link_gbit_s and _nodes(rates, teachers + students) > 1:
        ceilings["link"] = min(teachers, students) * _link(rates)
    return ceilings


def plans(rates: Rates, job: Job, gpus: int) -> list[Plan]:
    """The ways to run a job on so many GPUs, the fastest first; of streams the best split. A store
    is considered where it saves a label."""
    nodes, total, first = _nodes(rates, gpus), job.students * job.passes, job.labelled
    both = inline(rates, gpus)
    found = [_plan(job, "inline", False, 0, gpus, (_phase(total, both),))]
    if total > first:
        after = _phase(total - first, stored(rates, gpus, nodes))
        found.append(_plan(job, "inline", True, 0, gpus, (_phase(first, both), after)))
    splits = range(job.students, gpus, job.students)
    for store in (False, True):
        ways = [_stream_plan(rates, job, gpus, students, store) for students in splits]
        if ways and (not store or job.passes > first):
            found.append(min(ways, key=lambda way: way.hours))
    return sorted(found, key=lambda way: way.hours)


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, itself included."""
    return sorted({*(2**power for power in range(most.bit_length())), most})


def settings(plan: Plan, job: Job, rates: Rates) -> dict[str, dict[str, str | int]]:
    """Config fields, by section, of a run by a plan; of one student, where there are several.

    Batch and lanes are the defaults (256, 4), or near them, so that they fit the workers. A stream
    has labels enough on their way: a window that is short of blocks leaves teachers without work.
    """
    streams = plan.source == "stream"
    workers = plan.students // job.students if streams else plan.students
    lanes = 4 if 4 % workers == 0 else workers
    targets: dict[str, str | int] = {"source": plan.source}
    if plan.store:
        targets["store"] = "labels"
    corpus: dict[str, str | int] = {"lanes": lanes}
    if job.students > 1:
        corpus["view_seed"] = 1  # whatever their own seeds: they share the labels of views
    told = {"targets": targets, "corpus": corpus}
    if streams:
        coming = BLOCKS_A_TEACHER * math.ceil(plan.teachers / workers)
        targets["outstanding"] = min(coming, 1024)
        corpus["block_samples"] = STREAMED_BLOCK
        corpus["window_blocks"] = min(math.ceil(coming * workers / lanes), 4096)
        told["teacher"] = {"actors": plan.teachers, "threads": rates.cores}
    told["student"] = {"workers": workers, "threads": rates.cores}
    batch = lanes * max(1, round(256 / lanes))
    told["train"] = {"passes": job.passes, "views": job.labelled, "batch": batch}
    return told


def _stream_plan(rates: Rates, job: Job, gpus: int, students: int, store: bool) -> Plan:
    """With a store, teachers stay and idle in the later passes: a run keeps its workers."""
    labelled = job.labelled if store else job.passes
    ceilings = stream(rates, gpus - students, students, job.students)
    phases = [_phase(job.students * labelled, ceilings)]
    if job.passes > labelled:
        after = stored(rates, students, _nodes(rates, gpus))
        phases.append(_phase(job.students * (job.passes - labelled), after))
    return _plan(job, "stream", store, gpus - students, students, tuple(phases))


def _device(
    rates: Rates, gpus: int, name: str, *forwards: float, read_bytes: float = 0.0
) -> Ceilings:
    """What GPUs allow that do `forwards` with every image, one after the other, and read beside it
    `read_bytes`."""
    if rates.shared_cores:
        assert rates.decode
        forwards = (*forwards, rates.decode * rates.cores)
    ceilings = {name: gpus / sum(1 / rate for rate in forwards)}
    if rates.decode and not rates.shared_cores:
        ceilings["decode"] = gpus * rates.decode * rates.cores
    if rates.disk_gb_s and rates.image_bytes:
        share = rates.disk_gb_s * 1e9 / rates.gpus_per_node
        ceilings["disk"] = gpus * share / (rates.image_bytes + read_bytes)
    return ceilings


def _link(rates: Rates) -> float:
    """Labels/s over one GPU's share of its node's link."""
    assert rates.link_gbit_s
    return rates.link_gbit_s * 1e9 / 8 / rates.gpus_per_node / rates.label_bytes


def _of(side: str, stage: str) -> str:
    return stage if stage in ("teacher", "student") else f"{stage} of {side}"


def _nodes(rates: Rates, gpus: int) -> int:
    return math.ceil(gpus / rates.gpus_per_node)


def _phase(passes: int, ceilings: Ceilings) -> Phase:
    bound = min(ceilings, key=ceilings.__getitem__)
    return Phase(passes, ceilings[bound], bound)


def _plan(
    job: Job,
    source: Literal["inline", "stream"],
    store: bool,
    teachers: int,
    students: int,
    phases: tuple[Phase, ...],
) -> Plan:
    seconds = sum(job.images * phase.passes / phase.images_per_second for phase in phases)
    mean = job.images * job.students * job.passes / seconds
    gpus, hours = teachers + students, seconds / 3600
    return Plan(source, store, gpus, teachers, students, phases, mean, hours, gpus * hours)
