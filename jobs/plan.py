"""How to split GPUs between teachers and students, and what a run will take."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from engine.config import Range, Section
from engine.parse import arg, parse
from engine.plan import Job, Plan, plans, settings, sizes
from engine.rates import Rates, from_peak, gathered, label_bytes, measured
from jobs.cli import run
from jobs.plan_table import each, table, told_rates, toml


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Section):
    """The best split of GPUs between teachers and students, its images/s and what bounds it, hours
    and cost, for 1, 2, 4, ... GPUs.

    A rate that is not given is taken from the runs of --from, of the last that tells it, or else
    from the roofline of --gpu. Decoding, link and disk without a rate are taken to bound nothing.
    """

    images: int
    """Images of the corpus."""
    gpus: Annotated[int, Range(1, 100_000)] = 8
    """GPUs, at most; or other devices with a worker each."""
    passes: int = 20
    """Traversals of the corpus."""
    views: int = 0
    """Different views the passes cycle through; 0: one a pass."""
    students: int = 1
    """Students to be trained on the same views."""
    from_: Annotated[tuple[str, ...], arg(name="from")] = ()
    """Folders of finished runs whose rates to take."""
    gpu: Literal["h100", "a100"] | None = None
    """GPU whose roofline to take: ViT-L/14 teaches ViT-B/16 in bf16. An estimate, not measured."""
    mfu: Annotated[float, Range(0, 1, above=True)] = 0.6
    """Fraction of its peak FLOP/s that --gpu is taken to reach."""
    teacher: float | None = None
    """Images/s that a teacher labels on one GPU."""
    student: float | None = None
    """Images/s that a student trains on, on one GPU."""
    decode: float | None = None
    """Images/s that one CPU core decodes."""
    cores: int = 1
    """CPU cores of one GPU that decode."""
    link_gbit_s: float | None = None
    """Gbit/s of the link of a node, each way."""
    disk_gb_s: float | None = None
    """GB/s that a node reads of shards."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    shared_cores: bool = False
    """The devices are CPU cores, which decode, label and train by turns (--from tells)."""
    image_bytes: float | None = None
    """Bytes of an encoded image."""
    classes: Annotated[int, Range(1)] = 1000
    """Classes; with width and precision they give the bytes of a label."""
    width: Annotated[int, Range(1)] = 768
    """Width of the teacher's embedding (ViT-L/14: 768)."""
    precision: Literal["fp16", "int8"] = "fp16"
    """Of labels as they are sent and stored."""
    price: Annotated[float | None, Range(0)] = None
    """Of one GPU and hour."""
    json: bool = False
    """Print JSON."""


def main(args: Sequence[str]) -> None:
    config = parse(PlanConfig, args, prog="promptkd plan")
    job = Job(
        images=config.images, passes=config.passes, views=config.views, students=config.students
    )
    rates, origins = _rates(config)
    found = {gpus: plans(rates, job, gpus) for gpus in sizes(config.gpus)}
    best = found[config.gpus][0]
    told = settings(best, job, rates)
    recorded = job.images * job.labelled * rates.label_bytes
    if config.json:
        rows = [_row(plan, config.price) for ways in found.values() for plan in ways]
        rest = {"recommended": told, "store_bytes": recorded}
        print(json.dumps({"rates": _statement(rates, origins), "plans": rows} | rest, indent=2))
        return
    print("\n".join(told_rates(rates, origins)))
    print("\n" + "\n".join(table(found, config.price)))
    print(f"\nRecorded labels take {recorded / 1e9:.3g} GB.")
    print(f"\n# The fastest on {config.gpus} GPUs" + each(best, job.students))
    print("\n".join(toml(told)))


def _rates(config: PlanConfig) -> tuple[Rates, dict[str, str]]:
    """The rates, and where those come from that were not told. Raises UserError where one lacks."""
    sources = [from_peak(config.gpu, config.mfu)] if config.gpu else []
    sources += [(folder, measured(Path(folder))) for folder in config.from_]
    per_label = label_bytes(config.classes, config.width, config.precision)
    return gathered(vars(config), sources, per_label)


def _statement(rates: Rates, origins: Mapping[str, str]) -> dict[str, Any]:
    return {
        field.name: {"value": getattr(rates, field.name), "from": origins.get(field.name)}
        for field in fields(rates)
    }


def _row(plan: Plan, price: float | None) -> dict[str, Any]:
    row = plan._asdict() | {"bound": plan.bound}
    row["phases"] = [phase._asdict() for phase in plan.phases]
    return row if price is None else row | {"cost": plan.gpu_hours * price}


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "plan"))
