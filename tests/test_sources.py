"""Where labels come from, in whole runs of workers: recorded, partly there, damaged, made up."""

import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_distributed
from PIL import Image
from safetensors.torch import load_file, save_file
from workers import assignment_of, config_of, losses, models, records, work_all

from engine.config import UserError
from engine.data.corpus import open_corpora
from engine.data.sample_list import write_list
from engine.data.shards import write_shards
from engine.labels.sources import chosen, missing_blocks, opened
from engine.labels.store import Store
from jobs import cli

SAMPLES, BLOCKS = 24, 5  # of the shared corpus
WEIGHTS = "open_clip_model.safetensors"
LIST = "list.parquet"


def missing(where: dict[str, str], passes: int = 3) -> dict[int, int]:
    """Blocks that a run with a store will find absent, by view."""
    config = config_of("unused", "unused", where | {"train.passes": passes})
    recorded = opened(config, assignment_of(config).labellings)
    return missing_blocks(config, recorded, open_corpora(config.corpus))


def listed() -> np.ndarray:
    """bool [24]: of the five blocks, of 5, 5, 5, 5 and 4 samples, 4, 0, 5, 1 and 3."""
    return ~np.isin(np.arange(SAMPLES), [3, *range(5, 10), *range(15, 19), 22])


def files(store: Path, view: int) -> list[Path]:
    """Of the corpus that is trained on: the one whose labelling has this view."""
    return sorted(store.glob(f"*/view-{view:05d}/*/*.targets"))


def whole(file: Path) -> bool:
    """Whether it is a block, and no part of one."""
    return file.name.count(".") == 1


def folder_of(model: str) -> Path:
    return Path(model.removeprefix("local-dir:"))


@pytest.fixture(scope="module")
def where(tmp_path_factory, corpus_folder) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return models(folder, corpus_folder) | {"targets.store": str(folder / "store")}


@pytest.fixture(scope="module")
def first(tmp_path_factory, where) -> tuple[Path, dict[str, Any]]:
    """The run folder of a run of two workers that recorded its labels, and what it told."""
    runs = tmp_path_factory.mktemp("first")
    two = where | {"student.workers": 2}
    told, _ = run_distributed(work_all, 2, str(runs), {"first": ["inline", two]})
    return runs / "first", told["first"]


@pytest.fixture(scope="module")
def second(tmp_path_factory, where, first) -> tuple[Path, dict[str, Any]]:
    """Runs after it, one after the other in one process, and what they told."""
    runs = tmp_path_factory.mktemp("second")
    store, teacher = Path(where["targets.store"]), folder_of(where["teacher.model"])
    partial, damaged, spoilt = (runs / name for name in ("partial-store", "damaged-store", "nan"))
    for copy in (partial, damaged):
        shutil.copytree(store, copy)
    for file in files(partial, 1)[:3]:
        file.unlink()
    flipped, cut = (next(file for file in files(damaged, view) if whole(file)) for view in (0, 2))
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-5])
    assert cli.main(["store", "verify", str(damaged)]) == 1
    bare = runs / "bare"  # whoever loads this teacher fails: it has no weights
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(teacher, spoilt)
    state = load_file(spoilt / WEIGHTS)
    state["visual.ln_post.bias"][0] = float("nan")
    save_file(state, spoilt / WEIGHTS)
    not_finite = models(runs, Path(where["corpus.shards"]), teacher=f"local-dir:{spoilt}")

    without = where | {"teacher.model": f"local-dir:{bare}"}
    shards = open_corpora(config_of(".", "x", where).corpus)["shards"]
    write_list(runs / LIST, listed(), shards.blocks, shards.fingerprint, {})
    some = {"corpus.samples": str(runs / LIST)}
    anew = some | {"targets.store": str(runs / "listed-store")}
    other = {
        "student.depth": 1,
        "train.lr": 0.03,
        "train.batch": 4,
        "train.passes": 2,
        "corpus.lanes": 4,
        "corpus.window_blocks": 1,
    }
    twice = {"targets.store": str(runs / "twice-store"), "train.views": 2, "train.passes": 4}
    told = {
        "same": ["store", without],
        "alone": ["store", without | {"targets.source": "store"}],
        "other": ["store", without | other],
        "more": ["store", without | {"targets.source": "store", "train.passes": 4}],
        "partial": ["inline", where | {"targets.store": str(partial)}],
        "damaged": ["store", where | {"targets.store": str(damaged)}],
        "twice": ["inline", where | twice],
        "listed": ["store", without | some | {"targets.source": "store"}],
        "inline": ["inline", where | some],
        "recording": ["inline", where | anew],
        "parts": ["store", without | anew | {"targets.source": "store"}],
        "synthetic": ["synthetic", without | {"targets.source": "synthetic"}],
        "nan": ["inline", not_finite | {"targets.store": str(runs / "nan-store")}],
    }
    (outcomes,) = run_distributed(work_all, 1, str(runs), told)
    return runs, outcomes


def test_a_run_records_all_that_its_teachers_say(first, where):
    told = first[1]
    assert set(missing(where).values()) == {0} and len(missing(where)) == 4
    assert missing(where, passes=4)[3] == BLOCKS  # nobody has asked for that view
    labels = told["labels"]
    assert labels["labelled"] == labels["asked"] == 3 * SAMPLES + SAMPLES
    assert labels["from_store"] == labels["damaged"] == 0
    kinds = Counter(whole(file) for file in files(Path(where["targets.store"]), 0))
    assert kinds[False] >= 2 and kinds[True] >= 2, "no block was torn between the workers"


@pytest.mark.parametrize("name", ["same", "alone"])
def test_a_run_with_all_labels_recorded_loads_no_teacher_and_is_the_same(first, second, name):
    (folder, told), (runs, outcomes) = first, second
    again = outcomes[name]
    assert again["labels"]["from_store"] == 4 * SAMPLES
    assert again["labels"]["asked"] == again["labels"].get("labelled", 0) == 0
    assert losses(runs / name) == pytest.approx(losses(folder), rel=2e-3)
    assert again["scores"] == told["scores"] and again["ledger"] == told["ledger"]


def test_another_student_takes_the_same_labels(second):
    told = second[1]["other"]
    assert told["labels"]["from_store"] == 3 * SAMPLES and told["labels"]["asked"] == 0
    assert told["ledger"]["trained"] == 2 * SAMPLES and told["steps"] == 2 * 6


def test_a_label_that_is_not_there_and_nobody_makes_stops_a_run(second):
    error = second[1]["more"]["error"]
    assert "of shards, view 3" in error and "--targets.source auto" in error


def test_only_what_is_not_recorded_is_asked(first, second, where):
    runs, outcomes = second
    lost = {int(file.name[:9]) for file in files(Path(where["targets.store"]), 1)[:3]}
    blocks = open_corpora(config_of(".", "x", where).corpus)["shards"].blocks
    samples = sum(blocks.at(block).length for block in lost)
    labels = outcomes["partial"]["labels"]
    assert labels["asked"] == labels["labelled"] == samples
    assert labels["from_store"] == 4 * SAMPLES - samples
    assert set(missing(where | {"targets.store": str(runs / "partial-store")}).values()) == {0}
    assert losses(runs / "partial") == pytest.approx(losses(first[0]), rel=2e-3)


def test_views_that_come_again_are_labelled_once(second):
    labels = second[1]["twice"]["labels"]
    assert labels["labelled"] == 2 * SAMPLES + SAMPLES
    assert labels["from_store"] == 2 * SAMPLES


def test_damaged_labels_are_counted_and_made_anew(first, second):
    runs, outcomes = second
    labels = outcomes["damaged"]["labels"]
    assert labels["damaged"] == 2
    assert labels["asked"] > 0 and labels["labelled"] > 0
    assert cli.main(["store", "verify", str(runs / "damaged-store")]) == 0
    assert losses(runs / "damaged") == pytest.approx(losses(first[0]), rel=2e-3)


def test_made_up_labels_need_no_teacher_and_are_no_score(second):
    runs, outcomes = second
    told = outcomes["synthetic"]
    assert told["labels"] == {} and told["ledger"]["trained"] == 3 * SAMPLES
    assert "teacher" not in told["scores"] and told["scores"]["student_after"]["agreement"] is None
    assert len(records(runs / "synthetic")) == 9


# ------------------------------------------------ lists of samples


def test_a_run_on_a_list_takes_its_samples_alone_from_a_store_of_all(second):
    """It needs no teacher, and the ledger adds up; the evaluation is of all images."""
    runs, outcomes = second
    told, some = outcomes["listed"], int(listed().sum())
    assert told["ledger"] == {"seen": 3 * some, "trained": 3 * some, "skipped": {}, "pending": 0}
    assert told["steps"] == 3 * -(-some // 8) and told["evaluation"]["scored"] == SAMPLES
    assert told["labels"]["from_store"] == 3 * some + SAMPLES
    assert told["labels"]["asked"] == told["labels"].get("labelled", 0) == 0
    inline = outcomes["inline"]
    assert inline["ledger"] == told["ledger"] and inline["labels"]["labelled"] == 0
    assert losses(runs / "inline") == pytest.approx(losses(runs / "listed"), rel=1e-5)
    assert losses(runs / "recording") == pytest.approx(losses(runs / "listed"), rel=2e-3)
    assert (runs / "listed" / "checkpoints").exists()


def test_what_a_run_on_a_list_records_serves_the_next_one_on_it(second, where):
    runs, outcomes = second
    some = int(listed().sum())
    assert outcomes["recording"]["labels"]["labelled"] == 3 * some + SAMPLES
    again = outcomes["parts"]
    assert again["labels"]["from_store"] == 3 * some + SAMPLES and again["labels"]["asked"] == 0
    assert again["ledger"]["trained"] == 3 * some
    anew = where | {"targets.store": str(runs / "listed-store")}
    assert missing(anew)[0] == 4  # one block is listed as a whole
    assert set(missing(anew | {"corpus.samples": str(runs / LIST)}).values()) == {0}
    lost = next(file for file in files(runs / "listed-store", 1) if whole(file))
    lost.unlink()
    assert missing(anew | {"corpus.samples": str(runs / LIST)})[1] == 1


def test_a_worker_with_another_list_is_stopped(second, where):
    config = config_of(second[0], "other", where | {"corpus.samples": str(second[0] / LIST)})
    assignment = assignment_of(config)
    assignment.require_list(open_corpora(config.corpus)["shards"].listed)
    with pytest.raises(UserError, match=r"^corpus\.samples: .* is another list here"):
        assignment._replace(samples="d" * 64).require_list(None)


# ------------------------------------------------ what fails


def work_with_small_files(rank: int, world: int, runs: str, told: dict[str, list]) -> dict:
    """No file can grow beyond 32 kB, as on a disk that is full for larger ones."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))
    return work_all(rank, world, runs, told)


def test_a_full_disk_costs_the_recording_alone(tmp_path, index, capfd):
    """Labels of a block take more; nothing is left behind of them."""
    (tmp_path / "images").mkdir()
    for number in range(2000):
        image = Image.new("RGB", (16, 16), (number % 256, number // 256, 99))
        image.save(tmp_path / "images" / f"{number:04}.png")
    write_shards(tmp_path / "images", tmp_path / "corpus", None, 2000, skip_invalid=False)
    store = tmp_path / "store"
    changes = models(tmp_path / "models", index(tmp_path / "corpus")) | {
        "targets.store": str(store),
        "corpus.evaluation": "",
        "corpus.block_samples": 2000,
        "train.batch": 500,
        "train.passes": 2,
    }
    told = {"run": ["inline", changes]}
    (outcomes,) = run_distributed(work_with_small_files, 1, str(tmp_path), told)
    assert outcomes["run"]["ledger"]["trained"] == 2 * 2000
    assert outcomes["run"]["labels"]["labelled"] == 2 * 2000
    said = capfd.readouterr().err
    assert said.count("no more labels are recorded") == 1 and "File too large" in said
    assert [file.name for file in store.rglob("*") if file.is_file()] == ["labelling.json"]


def test_a_teacher_of_no_numbers_stops_a_run_before_it_learns(second):
    runs, outcomes = second
    error = outcomes["nan"]["error"]
    assert error.startswith("the teacher's numbers at step 1 are not finite")
    assert records(runs / "nan") == [] and not list((runs / "nan-store").rglob("*.targets"))


# ------------------------------------------------ the choice


@pytest.mark.parametrize(
    ("changes", "sizes", "pixels", "absent", "wanted", "why"),
    [
        ({}, [16], [16], None, "inline", "one decode"),
        ({}, [16], [16], 5, "inline", "one decode"),
        ({}, [16], [16], 0, "store", "no teacher is started"),
        ({"targets.source": "stream"}, [16], [16], 0, "store", "no teacher is started"),
        ({}, [16], [16, 24], None, "stream", "different sizes"),
        ({}, [16], [24], None, "stream", "different sizes"),
        ({}, [16, 16], [16], None, "stream", "several students"),
        ({"teacher.actors": 2}, [16], [16], None, "stream", "teacher.actors"),
        ({"teacher.max_actors": 2}, [16], [16], None, "stream", "teacher.actors"),
        ({"targets.source": "stream"}, [16], [16], 3, "stream", "told"),
        ({"targets.source": "inline"}, [16], [16], 3, "inline", "told"),
        ({"targets.source": "store", "targets.store": "labels"}, [16], [16], 3, "store", "told"),
        ({"targets.source": "synthetic"}, [16], [16], 0, "synthetic", "told"),
    ],
)
def test_source_that_serves_best(changes, sizes, pixels, absent, wanted, why):
    choice = chosen(config_of(".", "x", changes), sizes, pixels, absent)
    assert choice.source == wanted and why in choice.why


def test_a_store_of_other_labels_is_refused(first, where):
    """And what differs is named; a change of the student is none."""

    def complaint(changes: dict[str, Any]) -> str:
        with pytest.raises(UserError, match=r"^targets\.store: ") as error:
            missing(where | changes)
        return str(error.value)

    seed = complaint({"seed": 7})
    assert "seed: 7 here, 1 there" in seed and "--corpus.view_seed 1" in seed
    assert "crop_scale: 0.5 here, 0.08 there" in complaint({"train.crop_scale": 0.5})
    assert "precisions: bf16 here, fp32 there" in complaint({"teacher.precision": "bf16"})
    assert "wire: int8 here, fp16 there" in complaint({"targets.precision": "int8"})
    assert "block_samples: 8 here, 5 there" in complaint({"corpus.block_samples": 8})
    told = complaint({"targets.source": "store", "seed": 7})
    assert "seed: 7 here" in told and "--targets.source auto" in told
    empty = str(Path(where["targets.store"]).parent / "empty")
    assert "holds no labels" in complaint({"targets.source": "store", "targets.store": empty})
    beside = missing(where | {"seed": 7, "targets.add_labelling": True})
    assert set(beside.values()) == {BLOCKS}
    assert missing(where | {"seed": 7, "corpus.view_seed": 1})[0] == 0
    assert missing(where | {"train.temperature": 2.0, "student.depth": 1})[0] == 0
    assert len(Store(where["targets.store"]).labellings()) == 1
