"""Does the planner foretell a run? `python benchmarks/bench_plan.py`, seven minutes.

On the quickstart's domain and models, with one thread for torch and one for decoding. Teacher,
student and decoder are timed alone, before runs and after; the runs label inline in their first
passes, and read what they have recorded in the later ones. Two workers on two cores share these
with their own decoding; one worker has a core for each. An error is of what was measured in the
same round.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from rows import Bench
from torch.nn import functional as F

from engine.clip.class_vectors import encode_classes
from engine.clip.prompts import PromptedTower
from engine.clip.towers import load_clip
from engine.config import CorpusConfig, TrainConfig
from engine.data.corpus import open_corpora
from engine.data.decode import Decoder
from engine.data.views import ViewPolicy
from engine.labels.targets import Targets
from engine.labels.teacher import Teacher
from engine.plan import inline, stored
from engine.rates import Rates
from jobs import distill, index, quickstart, shards
from jobs.quickstart.domain import CLASSES, write_images

MODELS = quickstart.HERE / "models"
BATCH, DEPTH, BLOCK, CROP, LAPS = 64, 4, 64, 0.5, 15  # batch: of a worker
ROUNDS = 3
LABELLED, STORED = 3, 3  # passes


def components(domain: Path, store: str) -> dict[str, list[float]]:
    """Images/s of each stage alone, of every round."""
    from engine.train.student import StudentTrainer  # slow to import, and of one process alone

    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # which DeepSpeed reads
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    teacher, student = (
        load_clip(f"local-dir:{MODELS / n}", "", "") for n in ("teacher", "student")
    )
    classes = encode_classes(teacher, CLASSES, ("a photo of a {}.",))
    corpus = open_corpora(CorpusConfig(shards=str(domain / "shards"), block_samples=BLOCK))[
        "shards"
    ]
    decoder = Decoder(ViewPolicy(1, student.image.pixels, CROP), "cpu", 1)
    samples = corpus.read(0)
    images_BCHW, _ = decoder.decode(samples, 0)
    device, w_ND = torch.device("cpu"), torch.from_numpy(classes.vectors)
    labeller = Teacher(teacher, classes, "fp32", device, BATCH)
    width = w_ND.shape[1]
    tower = PromptedTower(student.image, 4, DEPTH, width, width, 1)
    told = TrainConfig(batch=BATCH, optimizer="adamw", kd_weight=1, reduction="batchmean")
    scales = student.logit_scale, teacher.logit_scale
    trainer = StudentTrainer(tower, w_ND, *scales, told, 1, 1000)
    u_BD = F.normalize(torch.randn(len(samples), width), dim=-1)
    targets = Targets("features", u_BD, torch.ones(len(samples), dtype=torch.bool).numpy())
    stages: dict[str, Callable[[int], object]] = {
        "decode": lambda turn: decoder.decode(samples, turn),
        "teacher": lambda turn: labeller.logits(images_BCHW),
        "student": lambda turn: trainer.step(turn, images_BCHW, targets),
    }
    laps: dict[str, list[float]] = {stage: [] for stage in stages}
    for turn in range(LAPS + 3):
        for stage, work in stages.items():
            started = time.perf_counter()
            work(turn)
            if turn >= 3:  # warm
                laps[stage].append(len(samples) / (time.perf_counter() - started))
    dist.destroy_process_group()
    return laps


def measured(folder: Path, name: str, workers: int) -> tuple[float, float]:
    """Images/s of a run's labelled passes, and of its stored ones."""
    told = {
        "name": name,
        "runs_dir": folder,
        "device": "cpu",
        "corpus.shards": folder / "shards",
        "corpus.block_samples": BLOCK,
        "corpus.lanes": 2,
        "classes.names": folder / "classes.txt",
        "teacher.model": f"local-dir:{MODELS / 'teacher'}",
        "teacher.precision": "fp32",
        "student.model": f"local-dir:{MODELS / 'student'}",
        "student.depth": DEPTH,
        "student.workers": workers,
        "targets.source": "inline",
        "targets.store": folder / f"labels-{name}",
        "train.passes": LABELLED + STORED,
        "train.views": LABELLED,
        "train.batch": BATCH * workers,
        "train.crop_scale": CROP,
        "train.optimizer": "adamw",
        "train.kd_weight": 1,
        "train.reduction": "batchmean",
        "train.log_steps": 1,
    }
    distill.main([str(word) for word in quickstart.flags(told)])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]

    def rate(passes: range) -> float:
        """Without the first steps, which wait for the loader to start."""
        within = [r["images_per_second"] for r in records if r["pass_"] in passes and r["step"] > 5]
        return statistics.harmonic_mean(within)

    return rate(range(LABELLED)), rate(range(LABELLED, LABELLED + STORED))


def main() -> None:
    bench = Bench("plan")
    config: dict[str, object] = {
        "batch": BATCH,
        "depth": DEPTH,
        "labelled": LABELLED,
        "stored": STORED,
    }
    config["load_average"] = round(os.getloadavg()[0], 1)  # others' work spoils it
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder / "images", "domain", 50, seed=1, labelled=False)
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        shards.main([str(folder / "images"), str(folder / "shards"), "--samples", "512"])
        index.main([str(folder / "shards")])
        told: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number in range(ROUNDS):
            before = alone(folder)
            found = {n: measured(folder, f"run-{number}-{n}", n) for n in (1, 2)}
            laps = {stage: rates + before[stage] for stage, rates in alone(folder).items()}
            for stage, rates in laps.items():
                told[f"{stage} alone", "images_per_second"] += rates
            mean = {stage: statistics.harmonic_mean(rates) for stage, rates in laps.items()}
            for workers, measures in found.items():
                rates = Rates(**mean, shared_cores=workers > 1)
                expected = inline(rates, workers), stored(rates, workers, 1)
                ways = zip(("inline", "store"), expected, measures, strict=True)
                for way, ceilings, rate in ways:
                    case, predicted = f"{way}, {workers} workers", min(ceilings.values())
                    told[case, "measured_images_per_second"].append(rate)
                    told[case, "predicted_images_per_second"].append(predicted)
                    told[case, "prediction_error"].append(predicted / rate - 1)
        for (case, metric), values in told.items():
            unit = "1" if metric == "prediction_error" else "1/s"
            bench.add(case, "ours", metric, unit, values, config)


def alone(folder: Path) -> dict[str, list[float]]:
    """The stages' rates, by a process of their own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with tempfile.TemporaryDirectory() as group:
            return process.submit(components, folder, f"{group}/store").result()


if __name__ == "__main__":
    main()
