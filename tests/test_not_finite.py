"""Runs of which some steps give no numbers: what is skipped, counted, told, and when they stop."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from workers import assignment_of, config_of, models, records

from engine.data.corpus import open_corpora
from engine.data.order import Order
from engine.train import checkpoint
from engine.train.student import StudentTrainer
from engine.train.worker import Task, work


@pytest.fixture(scope="module")
def changes(tmp_path_factory, corpus_folder) -> dict:
    told = models(tmp_path_factory.mktemp("models"), corpus_folder)
    del told["corpus.evaluation"]
    return told | {"train.checkpoint_steps": 2, "train.rollbacks": 0}


def run(rank: int, world: int, runs: str, changes: dict, bad: list[tuple[int, int]]) -> dict:
    """A run whose labels are nan, for each (step, rank) of `bad`, where a GPU may have spoilt
    them after they were looked at."""
    config = config_of(runs, "run", {**changes, "student.workers": world})
    config.folder.mkdir(parents=True, exist_ok=True)
    step = StudentTrainer.step

    def spoilt(self, number, images_BCHW, targets):
        if (number, rank) in bad:
            values = torch.full_like(torch.as_tensor(targets.values_BX), torch.nan)
            targets = targets._replace(values_BX=values)
        return step(self, number, images_BCHW, targets)

    StudentTrainer.step = spoilt  # in this process, which ends with this run
    return work(Task(config, assignment_of(config), None, "inline"), torch.device("cpu"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_latest(folder / "checkpoints").student


def test_what_was_not_learned_from_is_not_counted_as_trained(changes, tmp_path):
    bad = [(2, 0), (2, 1), (5, 1), (8, 0)]  # the last step, too
    told = run_distributed(run, 2, str(tmp_path), changes, bad)
    skipped = {"not_finite": 4 * len(bad)}  # four images of each worker
    ledger = {"seen": 72, "trained": 72 - 16, "skipped": skipped, "pending": 0}
    assert told[0]["ledger"] == told[1]["ledger"] == ledger
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert (saved.ledger.trained, saved.ledger.skipped) == (56, skipped)
    by_step = {record["step"]: record["not_finite"] for record in records(tmp_path / "run")}
    assert by_step == Counter({3: 2, 6: 1, 9: 1}) | dict.fromkeys((1, 2, 4, 5, 7, 8), 0)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.isfinite(tensor).all(), name


def test_so_many_steps_in_a_row_stop_a_run_which_names_their_samples(changes, tmp_path):
    """Two lives: the row goes on where the first has ended. One worker's row is not all's."""
    rules = {"train.max_not_finite": 4, "train.judge_images": 1000}  # no other counts here
    config = changes | rules | {"train.passes": 4, "train.keep_last": 9}
    alone = [(1, 0), (2, 0), (3, 0), (4, 0)]
    first = [*alone, *((step, rank) for step in (6, 7, 8) for rank in (0, 1))]
    run_distributed(run, 2, str(tmp_path), config, first)
    folder = tmp_path / "run"
    for path in (folder / "checkpoints").iterdir():  # as if it had been killed after step 8
        if path.name in ("step-00000010", "step-00000012"):
            path.rename(tmp_path / path.name)
    (folder / "bundle.safetensors").unlink()

    (told,) = run_distributed(run, 1, str(tmp_path), config, [(8, 0), (9, 0), (10, 0), (11, 0)])
    file = folder / "not_finite.jsonl"
    assert told == {
        "collapsed": "loss or gradients were not finite in 4 steps in a row, 6 to 9; their samples "
        f"are in {file}"
    }
    assert not (folder / "bundle.safetensors").exists()
    resolved = config_of(tmp_path, "run", config)
    corpus = open_corpora(resolved.corpus)["shards"]
    order = Order(corpus.blocks, 2, 8, 10, resolved.seed)
    wanted = Counter()
    for step in range(6, 10):
        share = order.share(*divmod(step, order.steps), 0, 1)
        for block, offset in zip(
            share.blocks[share.valid], share.offsets[share.valid], strict=True
        ):
            shard, start, _ = corpus.blocks.at(int(block))
            wanted[step, corpus.shards[shard], start + int(offset)] += 1
    lines = map(json.loads, file.read_text().splitlines())
    assert Counter((one["step"], one["shard"], one["position"]) for one in lines) == wanted
    good = checkpoint.newest_good(folder / "checkpoints")
    assert good in (2, 4, 6) and torch.isfinite(weights(folder)["prompts"]).all()
