"""How well does each preset of stage II train the quickstart's domain? `python
benchmarks/bench_presets.py`, minutes. Of the domain's own are the crops and the student's depth."""

import json
import tempfile
from pathlib import Path

from rows import Bench

from jobs import distill, quickstart

SEED = 1
DOMAIN = {"train.crop_scale": 0.5, "student.depth": 4, "corpus.lanes": 2, "device": "cpu"}


def main() -> None:
    bench = Bench("presets")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        quickstart.main(["--seeds", str(SEED), "--folder", place])
        domain, models = folder / "domain", quickstart.HERE / "models"
        for preset in ("fast", "paper"):
            told = DOMAIN | {
                "name": preset,
                "preset": preset,
                "seed": SEED,
                "runs_dir": folder,
                "corpus.shards": domain / "shards",
                "corpus.evaluation": domain / "evaluation",
                "classes.names": domain / "classes.txt",
                "teacher.model": f"local-dir:{models / 'teacher'}",
                "teacher.prompts": folder / f"teacher-{SEED}" / "prompts.safetensors",
                "student.model": f"local-dir:{models / 'student'}",
            }
            distill.main([str(word) for word in quickstart.flags(told)])
            summary = json.loads((folder / preset / "summary.json").read_text())
            for case in ("student_before", "student_after", "teacher"):
                for metric in ("base", "novel", "hm"):
                    config = {"preset": preset, "seed": SEED} | DOMAIN
                    values = [summary[case][metric]]
                    bench.add(f"{preset}, {case}", "ours", metric, "%", values, config)
            bench.add(preset, "ours", "roll_backs", "1", [len(summary["rollbacks"])], config)
            bench.add(preset, "ours", "train", "s", [summary["train_s"]], config)


if __name__ == "__main__":
    main()
