"""What does the label plane cost, and save? `python benchmarks/bench_labels.py [--quick]`.

Some twenty minutes on two cores; `--only CASE` for one of these cases, `--rounds N` for fewer.

Every process has one thread: a teacher and a student have a core each. Models have random weights,
and are sized so that a forward of the teacher costs 2.2 steps of the student (heavy), or one
(equal); decoding costs next to nothing. Rounds go through both sides of a comparison, in turns of
order; a ratio is of what was measured in the same round, and the median over rounds counts.

- overlap: images/s of a streamed run, over those of its slower stage alone: a teacher whose labels
  nobody trains on, or a student on labels that cost nothing.
- serial: the same, over what labelling everything first and then training would come to.
- cpu: CPU seconds of a streamed run that are neither the models' nor decoding's, over the models';
  also without those of Ray's own processes.
  The models' are those of plain loops in two processes at the same time.
- store: images/s of a run from recorded labels, over those of the run that recorded them inline.
- students: student-images/s of four students on one stream, over those of separate streamed runs,
  with both sides busy on both cores: that takes two separate runs at a time, a teacher and a
  student each, and four would be no faster. CPU seconds per student-image tell the same without
  regard to how busy the cores are.
- dead: a teacher stopped (SIGSTOP) for half a minute: seconds until the first step after it goes
  on, which needs up to a shuffling window of labels, and whether all samples were trained on.

`--quick` is a smoke test: its rows tell nothing.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from label_models import Models, models_alone
from label_runs import (
    BATCH,
    SKIPPED,
    TOWERS,
    Measured,
    Rig,
    run,
    run_side_by_side,
    run_students,
    start_ray,
    steps,
    teacher_alone,
)
from meters import in_turn
from rows import Bench

from engine.config import RunConfig

STUDENTS, APART = 4, 2


class Rounds:
    """Values of all rounds, by what they are of."""

    def __init__(self, bench: Bench, rig: Rig, rounds: int, stopped_s: float) -> None:
        self.rig, self.rounds, self.stopped_s = rig, rounds, stopped_s
        self._bench, self._lines = bench, []
        self._values: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)

    def in_turns(self, sides: dict[str, Callable[[], Any]], number: int) -> dict[str, Any]:
        """What the sides of a comparison give."""
        return {side: sides[side]() for side in in_turn(sides, number)}

    def add(self, case: str, side: str, metric: str, unit: str, value: float) -> None:
        self._values[case, side, metric, unit].append(value)

    def add_measured(self, case: str, side: str, told: Measured) -> None:
        self.add(case, side, "images_per_second", "1/s", told.images_per_second)
        self.add(case, side, "cpu_per_image", "s", sum(told.cpu_s.values()))
        self.add(case, side, "cores_busy", "1", told.cores)

    def close(self, targets: dict[tuple[str, str], str]) -> None:
        """Writes the rows, and prints what has a target."""
        config = {"images": self.rig.images, "batch": BATCH, "threads": 1, "towers": TOWERS}
        lines = []
        for (case, side, metric, unit), values in self._values.items():
            self._bench.add(case, side, metric, unit, values, config)
            if target := targets.get((case, metric)):
                told = f"{statistics.median(values):>9.3f}  ({min(values):.3f}..{max(values):.3f})"
                lines.append(f"{case:<18}{metric:<26}{target:>8}{told}")
        print(f"\n{'case':<18}{'what':<26}{'target':>8}{'median':>9}  (all rounds)")
        print("\n".join(lines))


def overlap(told: Rounds) -> None:
    """Both `overlap` and `serial`."""
    for number in range(told.rounds):
        for teacher, passes in (("heavy", 1), ("equal", 2)):
            _overlap(told, number, teacher, passes)


def _overlap(told: Rounds, number: int, teacher: str, passes: int) -> None:
    case, rig = f"overlap, {teacher}", told.rig
    streamed = rig.config("streamed", "stream", teacher, passes)
    synthetic = rig.config("synthetic", "synthetic", teacher, 2)
    made = told.in_turns(
        {
            "stream": lambda: run(streamed),
            "teacher": lambda: teacher_alone(streamed),
            "student": lambda: run(synthetic),
        },
        number,
    )
    for side, measured in made.items():
        told.add_measured(case, side, measured)
    rates = {side: one.images_per_second for side, one in made.items()}
    stream, alone = rates["stream"], (rates["teacher"], rates["student"])
    told.add(case, "ours", "stream_over_slower", "1", stream / min(alone))
    told.add(case, "ours", "student_over_teacher", "1", alone[1] / alone[0])
    serial = 1 / sum(1 / rate for rate in alone)
    told.add(f"serial, {teacher}", "ours", "stream_over_serial", "1", stream / serial)


def cpu(told: Rounds) -> None:
    config = told.rig.config("s", "stream", "heavy")
    for number in range(told.rounds):
        made = told.in_turns(
            {"stream": lambda: run(config), "models": lambda: models_alone(config)}, number
        )
        stream: Measured = made["stream"]
        models: Models = made["models"]
        told.add_measured("cpu", "stream", stream)
        for part, cpu_s in models._asdict().items():
            told.add("cpu", "plain loops", f"{part}_per_image", "s", cpu_s)
        for kind, cpu_s in stream.cpu_s.items():
            told.add("cpu", "stream", f"{kind}_per_image", "s", cpu_s)
        theirs = models.forward + models.step
        rest = sum(stream.cpu_s.values()) - theirs - 2 * models.decode  # each decodes for itself
        told.add("cpu", "plain loops", "forward_over_step", "1", models.forward / models.step)
        told.add("cpu", "ours", "rest_per_image", "s", rest)
        told.add("cpu", "ours", "rest_over_models", "1", rest / theirs)
        # Ray's own processes cost about the same every second, whatever a step costs.
        idle = stream.cpu_s["ray"]
        told.add("cpu", "ours", "rest_without_ray", "1", (rest - idle) / theirs)
        told.add("cpu", "ray", "cores_busy", "1", idle * stream.images_per_second)


def store(told: Rounds) -> None:
    rig = told.rig
    for number in range(told.rounds):
        where = str(rig.place / f"store-{number}")
        first = run(rig.config("i", "inline", "heavy", store=where))
        second = run(rig.config("r", "auto", "heavy", store=where))
        labels = json.loads((rig.place / "runs" / "r" / "summary.json").read_text())["labels"]
        assert labels["source"] == "store" and labels["from_store"] == rig.images, labels
        told.add_measured("store", "first", first)
        told.add_measured("store", "second", second)
        ratio = second.images_per_second / first.images_per_second
        told.add("store", "ours", "second_over_first", "1", ratio)


def students(told: Rounds) -> None:
    rig = told.rig
    together = [rig.config(f"together-{n}", "stream", "heavy") for n in range(STUDENTS)]
    apart = [rig.config(f"apart-{n}", "stream", "heavy") for n in range(APART)]
    for number in range(told.rounds):
        made = told.in_turns(
            {
                "one stream": lambda: run_students(together),
                "separate": lambda: run_side_by_side(apart),
            },
            number,
        )
        for side, measured in made.items():
            told.add_measured("students", side, measured)
        shared, separate = made["one stream"], made["separate"]
        ratio = shared.images_per_second / separate.images_per_second
        told.add("students", "ours", "one_over_separate", "1", ratio)
        costs = sum(separate.cpu_s.values()) / sum(shared.cpu_s.values())
        told.add("students", "ours", "cpu_separate_over_one", "1", costs)


def dead(told: Rounds) -> None:
    config = told.rig.config("dead", "stream", "heavy")
    moments: list[float] = []
    thread = threading.Thread(target=_stop_a_teacher, args=(config, told.stopped_s, moments))
    thread.start()
    run(config)
    thread.join()
    stopped, resumed = moments
    times = [step["time"] for step in steps(config)]
    last = max(at for at in times if at < resumed)
    first = min(at for at in times if at > resumed)
    ledger = json.loads((config.folder / "ledger.json").read_text())
    assert ledger["seen"] == ledger["trained"] == told.rig.images, ledger
    told.add("dead", "ours", "stopped", "s", resumed - stopped)
    told.add("dead", "ours", "steps_ceased_after", "s", max(0.0, last - stopped))
    told.add("dead", "ours", "first_step_after", "s", first - resumed)
    told.add("dead", "ours", "trained_over_seen", "1", ledger["trained"] / ledger["seen"])


def _stop_a_teacher(config: RunConfig, stopped_s: float, moments: list[float]) -> None:
    """In the steady state of a run that has begun after this."""
    began = time.time()
    while sum(step["time"] > began for step in steps(config)) <= SKIPPED // BATCH:
        time.sleep(0.2)
    (teacher,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "TeacherActor" in " ".join(process.cmdline())
    )
    moments.append(time.time())
    teacher.suspend()
    time.sleep(stopped_s)
    teacher.resume()
    moments.append(time.time())


CASES = {"overlap": overlap, "cpu": cpu, "store": store, "students": students, "dead": dead}
TARGETS = {
    ("overlap, heavy", "stream_over_slower"): ">= 0.95",
    ("overlap, heavy", "student_over_teacher"): "2.0..2.4",
    ("overlap, equal", "stream_over_slower"): ">= 0.95",
    ("overlap, equal", "student_over_teacher"): "1",
    ("serial, equal", "stream_over_serial"): ">= 1.5",
    ("cpu", "rest_over_models"): "<= 0.05",
    ("cpu", "rest_without_ray"): "-",
    ("cpu", "forward_over_step"): "2.0..2.4",
    ("store", "second_over_first"): ">= 2.5",
    ("students", "one_over_separate"): ">= 1.9",
    ("students", "cpu_separate_over_one"): ">= 1.9",
    ("dead", "first_step_after"): "-",
    ("dead", "trained_over_seen"): "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=CASES, help="overlap has serial too")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start_ray()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rig = Rig.built(Path(folder) / "rig", 768 if args.quick else 1024)
            rounds, stopped_s = (1, 10) if args.quick else (args.rounds, 30)
            told = Rounds(Bench("labels"), rig, rounds, stopped_s)
            for case in [args.only] if args.only else CASES:
                CASES[case](told)
            told.close(TARGETS)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
