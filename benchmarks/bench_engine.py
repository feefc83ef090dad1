"""How fast is the whole engine? `python benchmarks/bench_engine.py [--quick]`.

Some three minutes on a GPU, ViT-L/14 to ViT-B/16 at batch 256; two on two cores, with small towers.
Needs no Ray: the training loop runs in this process, on a group of one. Weights are random.
`--precision` is the teacher's; `--only CASE` for one of these cases:

- inline: images/s of the engine with a teacher in the student's process. `inline_over_serial` is
  that over 1 / (1/T + 1/S): T and S are the images/s of forwards, and of steps, in plain loops.
  `resident`: pixels lie on the device already; `shards`: they are read and decoded.
- store: the same with recorded labels, read from a folder, over the student alone.
- profile: of some steady inline steps, by torch.profiler: the share of time in which the GPU is
  busy, its longest gaps and its kernels; on a CPU, the main thread's operators.

The stream through Ray is in bench_labels.py. Rounds go through all sides in turns of order; a ratio
is of what was measured in the same round. A value is the median of some windows of steps, each with
a wait for the GPU at its end; windows that warm up do not count.

`--quick` is a smoke test: its rows tell nothing.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import torch
from engine_runs import Rig
from engine_setup import Size, cores
from intervals import lines
from meters import Meter, in_turn
from models import Tower
from rows import Bench

from engine.clip.towers import half_precision
from engine.config import TeacherPrecision

GPU = Size(
    "ViT-L/14 to ViT-B/16",
    teacher=Tower(24, 1024, 14, 224, 768, quick_gelu=True),  # ViT-L/14
    student=Tower(12, 768, 16, 224, 512, quick_gelu=True),  # ViT-B/16
    classes=1000,
    batch=256,
    block=512,
    lanes=4,
    photo=(500, 375),
    shards=2,
    steps=10,
    warm=1,
    windows=4,
)
CPU = Size(
    "small",
    teacher=Tower(10, 384, 8, 64, 512),  # its forward costs as a step of the student does, twice
    student=Tower(6, 192, 8, 64, 512),
    classes=1000,
    batch=32,
    block=64,
    lanes=2,
    photo=(96, 96),
    shards=4,
    steps=2,
    warm=2,
    windows=4,
)
QUICK = CPU._replace(
    name="quick",
    teacher=Tower(2, 64, 8, 32, 64),
    student=Tower(2, 64, 8, 32, 64),
    classes=20,
    batch=16,
    block=16,
    warm=1,
    windows=2,
)
ROUNDS = 3

Sides = Mapping[str, Callable[[], list[float]]]


class Rows:
    """Rates of all rounds, and ratios of the same round."""

    def __init__(self, bench: Bench, rig: Rig, rounds: int, precision: str) -> None:
        self.bench, self.rig, self.rounds, self.meter = bench, rig, rounds, Meter()
        self.config: dict[str, object] = {
            "teacher": rig.size.teacher._asdict(),
            "student": rig.size.student._asdict(),
            "B": rig.size.batch,
            "N": rig.size.classes,
            "teacher_precision": precision,
            "steps": rig.size.steps,
            "windows": rig.size.windows,
            "cores": cores(),
            "decodes": rig.decodes,
            "photos": rig.photos.config,
        }

    def compared(self, case: str, sides: Sides, ratios: Mapping[str, tuple[str, str]]) -> None:
        """Measures all sides in turns, and adds their rows. A ratio is of one side over another;
        `serial` stands for what the two stages would come to one after the other."""
        told: dict[str, list[float]] = defaultdict(list)
        for number in range(self.rounds):
            for side in in_turn(sides, number):
                told[side].append(statistics.median(sides[side]()))
        if {"teacher", "student"} <= told.keys():
            pairs = zip(told["teacher"], told["student"], strict=True)
            told["serial"] = [1 / (1 / teacher + 1 / student) for teacher, student in pairs]
        name, config = f"{case}, {self.rig.size.name}", self.config | self.meter.state()
        for side, rates in told.items():
            self.bench.add(name, side, "images_per_second", "1/s", rates, config)
        for metric, (over, under) in ratios.items():
            if over not in told:
                print(f"{name}: {metric}: not measured")
                continue
            values = [a / b for a, b in zip(told[over], told[under], strict=True)]
            self.bench.add(name, "ours", metric, "1", values, config)


def inline(rows: Rows) -> None:
    stages = {"teacher": rows.rig.teacher, "student": rows.rig.student}
    _compared(rows, "inline", stages, rows.rig.inline, {"inline_over_serial": "serial"})


def store(rows: Rows) -> None:
    stages = {"student": rows.rig.student}
    _compared(rows, "store", stages, rows.rig.replay, {"replay_over_student": "student"})


def _compared(
    rows: Rows,
    case: str,
    stages: Sides,
    run: Callable[[bool], list[float]],
    over: Mapping[str, str],
) -> None:
    """A `run`, with pixels on the device and from shards, beside its stages alone; `over`: what a
    ratio has below the resident one."""
    sides = {**stages, "resident": lambda: run(True)}
    if rows.rig.decodable:
        sides["shards"] = lambda: run(False)
    ratios = {name: ("resident", under) for name, under in over.items()}
    rows.compared(case, sides, ratios | {"shards_over_resident": ("shards", "resident")})


def profile(rows: Rows) -> None:
    rig, size = rows.rig, rows.rig.size
    for pixels in ("resident", "shards") if rig.decodable else ("resident",):
        found = rig.traced(pixels == "resident")
        name = f"profile, {pixels}, {size.name}"
        config = rows.config | rows.meter.state()
        told = "operator" if found.busy is None else "kernel"
        if found.busy is not None:
            rows.bench.add(name, "ours", "gpu_busy", "1", [found.busy], config)
            gaps_ms = [1000 * gap.seconds for gap in found.gaps]
            rows.bench.add(name, "ours", "longest_gaps", "ms", gaps_ms or [0.0], config)
        for kernel, seconds, calls in found.top:
            share = [seconds / found.total_s]
            calls_a_step = {"calls_a_step": calls / size.steps}
            rows.bench.add(name, kernel[:60], f"{told}_share", "1", share, config | calls_a_step)
        print(f"\n{name}", *lines(found, size.steps), "", sep="\n", flush=True)


CASES = {"inline": inline, "store": store, "profile": profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--precision", choices=get_args(TeacherPrecision), default="auto")
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    size = QUICK if asked.quick else GPU if on_gpu else CPU
    measure(size, device, asked.precision, 1 if asked.quick else ROUNDS, asked.only)


def measure(
    size: Size, device: torch.device, precision: TeacherPrecision, rounds: int, only: str | None
) -> None:
    """Adds the rows of all cases, or of `only` one."""
    if precision == "auto":
        precision = half_precision(precision, device) if device.type == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), size, device, precision)
        print(f"from shards: {'decoded by ' if rig.decodable else 'not measured: '}{rig.decodes}")
        try:
            rows = Rows(Bench("engine"), rig, rounds, precision)
            for case in [only] if only else CASES:
                CASES[case](rows)
        finally:
            rig.close()


if __name__ == "__main__":
    main()
