"""What does the quickstart come to, over three seeds? `python benchmarks/bench_quickstart.py`"""

import json
import tempfile
import time
from pathlib import Path

from rows import Bench

from jobs import quickstart

SEEDS = (1, 2, 3)


def main() -> None:
    bench = Bench("quickstart")
    with tempfile.TemporaryDirectory() as folder:
        walls_s = []
        for seed in SEEDS:
            started = time.perf_counter()
            quickstart.main(["--seeds", str(seed), "--folder", folder])
            walls_s.append(time.perf_counter() - started)
        tables = [quickstart.table(Path(folder), seed) for seed in SEEDS]
        teachers, students = (
            [
                json.loads((Path(folder) / f"{name}-{seed}" / "summary.json").read_text())
                for seed in SEEDS
            ]
            for name in ("teacher", "student")
        )
    config = {"settings": quickstart.SETTINGS.name, "seeds": SEEDS}
    for case in quickstart.ROWS:
        for metric in ("base", "novel", "hm"):
            values = [table[case][metric] for table in tables]
            bench.add(case, "ours", metric, "%", values, config)
    agreement = [table["distilled_student"]["agreement"] for table in tables]
    bench.add("distilled_student", "ours", "agreement", "%", agreement, config)
    speeds = [student["images_per_second"] for student in students]
    bench.add("distillation", "ours", "images_per_second", "1/s", speeds, config)
    bench.add("stage I", "ours", "wall", "s", [teacher["wall_s"] for teacher in teachers], config)
    bench.add("stage II", "ours", "wall", "s", [student["wall_s"] for student in students], config)
    # The first seed also draws the images and makes the shards.
    bench.add("first seed", "ours", "wall", "s", walls_s[:1], config)
    bench.add("later seeds", "ours", "wall", "s", walls_s[1:], config)


if __name__ == "__main__":
    main()
