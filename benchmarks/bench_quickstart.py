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
        summaries = [
            json.loads((Path(folder) / f"seed-{seed}" / "summary.json").read_text())
            for seed in SEEDS
        ]
    config = {"settings": quickstart.SETTINGS.name, "seeds": SEEDS}
    for case in ("student_before", "student_after", "teacher"):
        for metric in ("base", "novel", "hm", "agreement"):
            values = [summary[case][metric] for summary in summaries]
            bench.add(case, "ours", metric, "%", values, config)
    speeds = [summary["images_per_second"] for summary in summaries]
    bench.add("training", "ours", "images_per_second", "1/s", speeds, config)
    # The first seed also draws the images and makes the shards.
    bench.add("first seed", "ours", "wall", "s", walls_s[:1], config)
    bench.add("later seeds", "ours", "wall", "s", walls_s[1:], config)


if __name__ == "__main__":
    main()
