import dataclasses
import json
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import workers
from distributed import run_distributed
from recordings import labelling
from workers import assignment_of, config_of

from engine.config import RunConfig, TrainConfig, UserError
from engine.labels.labelling import Labelling
from engine.train.identity import Identity
from engine.train.worker import Task, work

BACKBONE = "b" * 64
# By which the same steps come to the same weights.
FREE = {
    "checkpoint_copy",
    "checkpoint_steps",
    "judge_images",
    "keep_every",
    "keep_last",
    "kernels",
    "log_steps",
    "max_failures",
    "max_not_finite",
    "rollbacks",
}


def identity(changes: dict[str, Any] | None = None, **of: Any) -> Identity:
    config = config_of("runs", "run", changes or {})
    told: dict[str, Any] = {"labelling": labelling(), "backbone": BACKBONE, "source": "inline"}
    return Identity.of(config, **(told | {"samples": ""} | of))


def other_than(value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, str):
        return f"another {value}"
    if isinstance(value, float):
        return value / 2 + 0.25
    return 2 * value + 2


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainConfig)])
def test_all_of_train_that_weights_depend_on_counts(field):
    value = getattr(config_of("runs", "run", {}).train, field)
    other = other_than(value, get_type_hints(TrainConfig)[field])
    assert other != value
    lines = identity().differences(identity({f"train.{field}": other}))
    expected = [] if field in FREE else [f"train.{field}: {value} here, {other} there"]
    assert lines == expected


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Labelling)])
def test_all_of_the_labelling_counts(field):
    value = getattr(labelling(), field)
    other = (value[0], *value) if isinstance(value, tuple) else other_than(value, None)
    lines = identity().differences(identity(labelling=labelling(**{field: other})))
    assert len(lines) == 1 and lines[0].startswith(f"labelling.{field}: ")


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("seed", 9),
        ("classes.template", "a {}."),
        ("corpus.lanes", 4),
        ("corpus.window_blocks", 7),
        ("student.model", "ViT-B-32"),
        ("student.precision", "bf16"),
        ("student.trainable", "last:1"),
        ("student.prompts", 2),
        ("student.depth", 1),
        ("student.projector_width", 32),
    ],
)
def test_order_and_student_count(field, other):
    (line,) = identity().differences(identity({field: other}))
    assert line.startswith(f"{field}: ") and line.endswith(f" here, {other} there")


def test_so_do_frozen_weights_and_noise_for_labels():
    assert identity().differences(identity(backbone="c" * 64)) == [
        "student.weights: bbbbbbbbbbbbbbbb here, cccccccccccccccc there"
    ]
    assert identity().differences(identity(source="synthetic")) == [
        "targets.source: teachers here, synthetic there"
    ]


def test_so_does_the_list_of_samples_by_what_it_lists():
    assert identity().differences(identity(samples="d" * 64)) == [
        "corpus.samples: nothing here, dddddddddddddddd there"
    ]
    assert identity({"corpus.samples": "moved/elsewhere.parquet"}) == identity()


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("student.workers", 2),
        ("student.zero_stage", 3),
        ("student.offload", True),
        ("student.threads", 4),
        ("student.weights", "moved/elsewhere"),
        ("corpus.shards", "moved/elsewhere"),
        ("corpus.memory_gb", 1.0),
        ("corpus.isolate", True),
        ("teacher.actors", 7),
        ("targets.source", "stream"),
        ("targets.store", "somewhere"),
        ("runs_dir", "elsewhere"),
        ("overwrite", True),
    ],
)
def test_who_computes_and_where_does_not(field, other):
    assert identity().differences(identity({field: other})) == []
    assert identity() == identity(source="stream") == identity(source="store")


def test_it_comes_back_from_json_as_it_was():
    ours = identity({"train.lr": 0.1 + 0.2, "train.kd_weight": 1 / 3})
    assert Identity(json.loads(json.dumps(ours.settings))) == ours


def test_a_field_of_another_release_is_a_difference():
    older = Identity({k: v for k, v in identity().settings.items() if k != "train.feature"})
    assert identity().differences(older) == ["train.feature: l1 here, nothing there"]


def test_all_differences_are_told():
    ours, theirs = identity(), identity({"train.lr": 0.2, "seed": 5, "train.passes": 4})
    ours.require(identity({"train.log_steps": 5}), "x")
    with pytest.raises(UserError) as told:
        ours.require(theirs, "runs/mine/checkpoints")
    first, *lines = f"{told.value}".splitlines()
    assert first.startswith("runs/mine/checkpoints: belongs to a run that differs")
    assert lines == [
        "  seed: 1 here, 5 there",
        "  train.lr: 0.1 here, 0.2 there",
        "  train.passes: 3 here, 4 there",
    ]


# ------------------------------------------------------------ in a run


def work_twice(rank: int, world: int, runs: str, changes: dict, other: dict) -> list[str]:
    """The errors of two runs, if any, of which the second goes on in the folder of the first."""
    errors = []
    for more in ({}, other):
        config: RunConfig = config_of(runs, "run", changes | more)
        config.folder.mkdir(parents=True, exist_ok=True)
        told = work(Task(config, assignment_of(config), None, "inline"), torch.device("cpu"))
        errors.append(told.get("failed", ""))
    return errors


def test_a_worker_goes_on_from_no_other_runs_checkpoint(tmp_path, corpus_folder):
    changes = workers.models(tmp_path / "models", corpus_folder) | {"corpus.evaluation": ""}
    other = {"train.lr": 0.2, "train.log_steps": 3, "student.zero_stage": 0}
    (told,) = run_distributed(work_twice, 1, str(tmp_path), changes, other)
    where = tmp_path / "run" / "checkpoints"
    assert told[0] == "" and told[1].startswith(f"{where}: belongs to a run that differs")
    assert told[1].splitlines()[1:] == ["  train.lr: 0.2 here, 0.1 there"]
