"""How fast are the towers, and a step? `python benchmarks/bench_towers.py [--short|--quick]`.

Some twelve minutes on two quiet cores, half of them for torch.compile and for the reference's step,
which takes up to a minute there; `--only CASE` for one of these cases:

- teacher: the forward of an image tower with 4 prompts in 9 layers: open_clip's and ours, eager and
  compiled, in each precision.
- student: the same of ViT-B/16 with its backward, to prompts and projector.
- tricks: our towers, eager, with each of their tricks switched off alone, over those with all.
- open_clip: a whole step, with N = 1000 classes, against open_clip's towers and torch alone, and
  against open_clip's `--distill-model`. The update is torch's SGD on all sides, without DeepSpeed
  or Ray.
- reference: the same against the reference's own step at batch 8; `loader`: every side has its own,
  from the same JPEGs; `resident`: images lie on the device, as a step takes them.

Weights are random. Compiled is torch.compile: max-autotune on a GPU, with CUDA graphs (ours: of
small batches alone), the default mode on a CPU. A call is made again without waiting for the last,
but where a step itself waits. Rounds go through all providers in turns of order; a ratio is of what
was measured in the same round, and the median over rounds counts. A provider that fails is told of,
and left out.

- tflops, share: by the FLOPs that a plain tower takes (the formula is in `config`), and over those
  of a large matrix product of the same dtype in the same run (of bf16, for precisions that are no
  dtype). A tower that leaves work out may so come above 1.
- peak: on a GPU what a call and the weights reserve, CUDA graphs too; on a CPU what the process
  grows by in the first round's call.
- first_call: seconds, with compiling.
- time_per_flop_over_ours: the same ratio, where the peer does more work, as if it did not.

`--short`: fewer sizes and rounds. `--quick` is a smoke test, of small models: its rows tell
nothing.
"""

import argparse
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from meters import Meter
from rows import Bench
from step_cases import against_open_clip, against_reference
from tower_cases import student, teacher, tricks
from tower_models import PRECISIONS
from tower_rig import Plan, Rig, Tower

B16, L14 = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"
PLANS = {
    "cuda": Plan(
        towers=(Tower(L14, 32), Tower(L14, 128), Tower(L14, 256, PRECISIONS["cuda"])),
        pair=(L14, B16),
        student=256,
        tricks=256,
        steps=(8, 256),
        classes=1000,
        rounds=7,
        long_rounds=7,
        least_s=0.2,
    ),
    "cpu": Plan(
        towers=(
            Tower(L14, 4),
            Tower(B16, 1),
            Tower(B16, 32),
            Tower(B16, 8, PRECISIONS["cpu"]),
        ),
        pair=(B16, B16),
        student=8,
        tricks=4,
        steps=(8, 32),
        classes=1000,
        rounds=3,
        long_rounds=2,
        least_s=0,
    ),
    "quick": Plan(
        towers=(Tower("small", 2), Tower("small", 4, ("fp32", "bf16"))),
        pair=("small", "small"),
        student=4,
        tricks=4,
        steps=(8,),
        classes=10,
        rounds=1,
        long_rounds=1,
        least_s=0,
    ),
}


PLANS["cuda, short"] = PLANS["cuda"]._replace(
    towers=(Tower(L14, 256, ("bf16", "fp16", "fp8")),), steps=(256,), rounds=3, long_rounds=2
)
PLANS["cpu, short"] = PLANS["cpu"]._replace(
    towers=(Tower(B16, 8),), steps=(8,), rounds=2, long_rounds=1, resident=False
)


class Goal(NamedTuple):
    device: str
    case: str
    provider: str
    least: float
    share: bool = False  # of the machine's rate; else a peer's time over that of
    ours: str = "ours"


GOALS = (
    Goal("cpu", "step, B=8, loader", "reference", 9),
    Goal("cpu", "step, B=8, resident", "reference", 9),
    Goal("cpu", "step, B=8, against open_clip", "open_clip", 1.1),
    Goal("cpu", "step, B=32, against open_clip", "open_clip", 1.1),
    Goal("cuda", f"teacher, {L14}, B=256", "ours-compiled-fp16", 0.6, share=True),
    Goal("cuda", f"teacher, {L14}, B=256", "ours-compiled-fp16", 1.45, ours="ours-compiled-fp8"),
    Goal("cuda", "student, B=256", "ours-compiled-bf16", 0.55, share=True),
    Goal("cuda", "step, B=8, loader", "reference", 9),
    Goal("cuda", "step, B=8, resident", "reference", 9),
    Goal("cuda", "step, B=256, against open_clip", "open_clip", 1.25),
    Goal("cuda", "step, B=256, against open_clip", "open_clip", 1.6, ours="ours-fp8"),
    Goal("cuda", "step, B=256, against open_clip", "open_clip-distill", 2.5),
)


def goals(rig: Rig) -> Iterable[str]:
    """Whether each is reached."""
    for goal in (goal for goal in GOALS if goal.device == rig.device.type):
        what = "share" if goal.share else f"time over that of {goal.ours}"
        name = f"{goal.case}: {goal.provider}, {what}"
        metric = "share" if goal.share else "time_over_ours"
        value = rig.told.get((goal.case, goal.provider, metric))
        ours = 1.0 if goal.share else rig.told.get((goal.case, goal.ours, metric))
        if value is None or ours is None:
            yield f"{name:<84} not measured"
        else:
            said = "reached" if value / ours >= goal.least else "MISSED"
            yield f"{name:<84}{said:>8}: {value / ours:.2f}; {goal.least} is wanted"


def summary(rig: Rig) -> Iterable[str]:
    """A line for a provider."""
    metrics = {
        "images/s": "images_per_second",
        "TFLOP/s": "tflops",
        "share": "share",
        "MB": "peak",
        "x ours": "time_over_ours",
    }
    lines: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for (case, provider, metric), value in rig.told.items():
        lines[case, provider][metric] = value
    yield f"{'':<60}" + "".join(f"{name:>12}" for name in metrics)
    for (case, provider), told in lines.items():
        values = (f"{told[m]:>12.4g}" if m in told else f"{'':>12}" for m in metrics.values())
        yield f"{case:<36}{provider:<24}{''.join(values)}"


CASES = {  # what tells the most comes first
    "open_clip": against_open_clip,
    "teacher": teacher,
    "student": student,
    "tricks": tricks,
    "reference": against_reference,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=CASES)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip tells of weights that it has not loaded
    torch.set_num_threads(os.cpu_count() or 1)
    meter = Meter()
    kind = f"{meter.device.type}, short" if asked.short else meter.device.type
    plan = PLANS["quick" if asked.quick else kind]
    rig = Rig(meter, plan, Bench("towers"))
    for case in [asked.only] if asked.only else CASES:
        CASES[case](rig)
    told = [] if asked.quick else goals(rig)
    print("", *summary(rig), "", *told, sep="\n", flush=True)
    if asked.only != "tricks" and not any(name.startswith("ours") for _, name, _ in rig.told):
        sys.exit("Ours failed: see above")


if __name__ == "__main__":
    main()
