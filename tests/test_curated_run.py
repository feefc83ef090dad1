"""The whole way: teachers label, the store is curated, a student learns from what is left."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from domains import PASSES, config_of
from PIL import Image

from engine.config import UserError
from engine.data.corpus import open_corpora
from engine.data.shards import write_shards
from engine.index import index
from engine.label import label
from engine.run import distill
from jobs import cli
from jobs.quickstart.domain import CLASSES, write_images

IMAGES, PLANTED = 4 * len(CLASSES), 12  # of each kind that is planted


def planted_domain(folder: Path) -> Path:
    """A domain with exact copies, images compressed anew, and noise; a key tells which."""
    images = folder / "images"
    write_images(images, "domain", 4, seed=1, labelled=False)
    files = sorted(images.iterdir())
    draws = np.random.default_rng(0)
    for number in range(PLANTED):
        shutil.copy(files[7 * number], images / f"copy_{number:02}_{files[7 * number].name}")
        near = files[7 * number + 90]
        Image.open(near).save(images / f"near_{number:02}_{near.stem}.jpg", quality=60)
        noise = draws.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"noise_{number:02}.jpg", quality=95)
    write_shards(images, folder / "shards", None, 50, False)
    index(str(folder / "shards"))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_planted_faults_are_found_and_a_student_learns_without_them(local_ray, tmp_path, capsys):
    domain, out = planted_domain(tmp_path / "domain"), tmp_path / "list.parquet"
    shards, vectors, store = (str(domain / n) for n in ("shards", "w.safetensors", "labels"))
    flags = ["--targets.store", store, "--classes.vectors", vectors]
    flags += ["--corpus.evaluation", shards]  # hence the test view
    flags += ["--train.feature_weight", "0.1"]  # hence features, though there are few classes
    config = config_of(domain, tmp_path, "run", *flags)
    names = str(domain / "classes.txt")
    assert cli.main(["classes", names, vectors, "--model", config.teacher.model]) == 0
    told = label(config, None)
    assert told["labels"]["labelled"] == (PASSES + 1) * (IMAGES + 3 * PLANTED)

    share = PLANTED / (IMAGES + 3 * PLANTED)
    words = ["--corpus", shards, "--classes", vectors, "--out", str(out)]
    rules = ["--duplicates", "0.99", "--outliers", f"{share}"]
    assert cli.main(["store", "curate", store, *words, *rules]) == 0
    corpus = open_corpora(config.corpus)["shards"]
    lengths = enumerate(corpus.blocks.shard_samples.tolist())
    keys = [key for shard, length in lengths for key in corpus.keys(shard, range(length))]
    table = pq.read_table(tmp_path / "list.scores.parquet").to_pylist()
    rows = dict(zip(keys, table, strict=True))
    left_out = Counter(row["reason"] for row in table)
    assert left_out["outlier"] == PLANTED
    noise = sum(row["reason"] == "outlier" for key, row in rows.items() if "noise" in key)
    pairs = {kind: 0 for kind in ("copy", "near")}
    for key in keys:
        if kind := next((kind for kind in pairs if kind in key), ""):
            origin = key.rpartition("_")[2]
            both = [row["reason"] for other, row in rows.items() if other.endswith(f"_{origin}")]
            pairs[kind] += "duplicate" in both
    # Of these tiny models noise is not always far from every class: 7 of 12 were found, and all
    # duplicates, beside 3 images that are merely alike.
    assert pairs["copy"] == PLANTED and pairs["near"] >= 0.8 * PLANTED
    assert left_out["duplicate"] <= 1.25 * sum(pairs.values()) and noise >= 0.5 * PLANTED

    listed = dataclasses.replace(config.corpus, samples=str(out))
    alone = dataclasses.replace(config.targets, source="store")
    curated = dataclasses.replace(config, corpus=listed, targets=alone)
    summary, kept = distill(curated), left_out["kept"]
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    seen = PASSES * kept
    assert ledger == {"seen": seen, "trained": seen, "skipped": {}, "pending": 0}
    assert summary["labels"]["source"] == "store" and summary["labels"]["asked"] == 0
    assert summary["labels"]["from_store"] == seen + len(keys)
    assert summary["steps"] == PASSES * -(-kept // 32)
    (tmp_path / "run" / "summary.json").unlink()  # as of a run that has not ended
    with pytest.raises(UserError, match=r"corpus\.samples: nothing here, [0-9a-f]{16} there"):
        distill(dataclasses.replace(config, targets=alone), resume=True)
