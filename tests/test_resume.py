"""Runs of several lives: killed at any step, at any world size, they are the run that was not."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from domains import config_of, write_domain
from lives import life, samples
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from workers import losses, models, records

from engine import lease, run_folder
from engine.clip.bundle import Bundle
from engine.config import UserError, absolute, to_dict
from engine.run import distill
from engine.train import checkpoint
from engine.train.identity import Identity
from jobs import cli

STEPS = 9


@pytest.fixture(scope="module")
def changes(tmp_path_factory, corpus_folder) -> dict:
    told = models(tmp_path_factory.mktemp("models"), corpus_folder)
    del told["corpus.evaluation"]
    return told | {"corpus.lanes": 4, "train.checkpoint_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, changes) -> Path:
    """The folder of a run of one worker and one life."""
    runs = tmp_path_factory.mktemp("undisturbed")
    run_distributed(life, 1, str(runs), changes)
    return runs / "run"


def killed(world: int, runs: Path, changes: dict, step: int, rank: int = 0) -> None:
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        run_distributed(life, world, str(runs), changes, "kill", step, rank)
    last = (runs / "run" / f"samples-{rank}.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)[0] == step, "it ended otherwise"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Bundle.load(folder / "bundle.safetensors").learned


def last_losses(folder: Path) -> list[float]:
    """Of each step, as the last life that came to it had it."""
    found = {record["step"]: record["loss"] for record in records(folder)}
    return [found[step] for step in sorted(found)]


def test_a_killed_worker_repeats_what_was_not_committed_bit_by_bit(undisturbed, changes, tmp_path):
    killed(1, tmp_path, changes, 5)
    run_distributed(life, 1, str(tmp_path), changes)
    folder = tmp_path / "run"
    steps = [record["step"] for record in records(folder)]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9], "step 5 was trained twice, and told of once"
    assert losses(folder) == losses(undisturbed)
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(weights(folder)[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("world", (1, 2))
def test_kills_at_many_steps_change_no_bit(world, changes, tmp_path):
    calm, upset = tmp_path / "calm", tmp_path / "upset"
    run_distributed(life, world, str(calm), changes)
    for step, rank in ((1, 0), (2, world - 1), (5, 0), (7, world - 1), (9, 0)):
        killed(world, upset, changes, step, rank)
    (told, *_) = run_distributed(life, world, str(upset), changes)
    assert told["ledger"] == {"seen": 72, "trained": 72, "skipped": {}, "pending": 0}
    assert last_losses(upset / "run") == losses(calm / "run")
    for name, tensor in weights(calm / "run").items():
        assert torch.equal(weights(upset / "run")[name], tensor), name
    for step, trained in samples(upset / "run").items():
        times = Counter(map(str, trained))
        assert times.keys() == set(map(str, samples(calm / "run")[step])), "repeated identically"


@pytest.mark.slow
def test_the_number_of_workers_may_change_between_lives(undisturbed, changes, tmp_path):
    """1, 2, 4, and 1 again: the same samples at the same steps, and the same student."""
    each = changes | {"train.checkpoint_steps": 1}
    for world, step in ((1, 3), (2, 5), (4, 7)):
        killed(world, tmp_path, each, step)
    (told,) = run_distributed(life, 1, str(tmp_path), each)
    folder = tmp_path / "run"
    assert told["ledger"] == {"seen": 72, "trained": 72, "skipped": {}, "pending": 0}
    ours, theirs = samples(folder), samples(undisturbed)
    assert ours.keys() == set(range(1, STEPS + 1))
    for step, trained in theirs.items():
        again = 2 if step in (3, 5, 7) else 1
        assert Counter(map(str, ours[step])) == Counter(map(str, trained * again)), step
    assert last_losses(folder) == pytest.approx(losses(undisturbed), rel=1e-4)
    for name, tensor in weights(undisturbed).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_worker_told_to_leave_has_all_stop_at_one_step(undisturbed, changes, tmp_path):
    """SIGTERM comes to one of two; what they committed is gone on with by one."""
    told = run_distributed(life, 2, str(tmp_path), changes, "term", 3, 1)
    assert told == [{"stopped": 1, "step": 3}] * 2
    folder = tmp_path / "run"
    assert checkpoint.load_latest(folder / "checkpoints").step == 3
    (told,) = run_distributed(life, 1, str(tmp_path), changes)
    assert [record["step"] for record in records(folder)] == [*range(1, STEPS + 1)]
    ours, theirs = samples(folder), samples(undisturbed)
    for step, trained in theirs.items():
        assert Counter(map(str, ours[step])) == Counter(map(str, trained)), "none lost or repeated"


@pytest.mark.slow
def test_workers_that_have_lost_the_run_write_nothing_more(changes, tmp_path):
    (tmp_path / "run").mkdir()
    mine = lease.take(tmp_path / "run")
    each = changes | {"train.checkpoint_steps": 1}
    told = run_distributed(life, 2, str(tmp_path), each, "lost", 4, 0, mine.owner)
    assert told == [{"stopped": 3, "step": 4}] * 2
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints").step == 3
    (told, *_) = run_distributed(life, 1, str(tmp_path), each, "", 0, 0, mine.owner)
    assert told == {"stopped": 3, "step": 3}, "nor are they begun"
    mine.close()


@pytest.mark.slow
def test_workers_that_have_lost_the_run_do_not_roll_it_back(changes, tmp_path):
    """Nor do they write a bundle: the last step of a run is lost, too."""
    for name, ends, step in (("one", "lost, collapse", 5), ("two", "lost", STEPS)):
        runs = tmp_path / name
        folder = runs / "run"
        folder.mkdir(parents=True)
        mine = lease.take(folder)
        (told,) = run_distributed(life, 1, str(runs), changes, ends, step, 0, mine.owner)
        assert told["stopped"] == 3
        held = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        assert held[-1] == f"step-{step - 1:08d}", "what was committed before"
        assert not {"rollbacks.json", "bundle.safetensors"} & {one.name for one in folder.iterdir()}
        mine.close()


# ------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    return write_domain(tmp_path_factory.mktemp("domain"))


def file_of(domain: Path, runs: Path, name: str, *flags: str) -> str:
    file = runs / f"{name}.json"
    file.write_text(json.dumps(to_dict(config_of(domain, runs, name, *flags))))
    return str(file)


def test_what_cannot_be_resumed_is_told(domain, tmp_path, capsys):
    run = file_of(domain, tmp_path, "run")

    def complaint(*words: str) -> str:
        assert cli.main(["distill", run, "--resume", *words]) == 2
        return capsys.readouterr().err

    assert "--resume goes on with a run, and" in complaint()
    assert "does not exist" in complaint("--seeds", "1,2")
    folder = tmp_path / "run"
    folder.mkdir()
    assert "holds none: it has no config.json" in complaint()
    run_folder.write(folder / "config.json", {})
    assert "identity.json is missing" in complaint()
    (folder / "identity.json").write_text("{")
    assert "identity.json is damaged" in complaint()
    asked = Identity.asked(absolute(config_of(domain, tmp_path, "run")))
    run_folder.write(folder / "identity.json", asked.settings)
    assert "overwrite: it removes the run that --resume goes on with" in complaint("--overwrite")
    mine = lease.take(folder)
    assert "is alive; end it first" in complaint()
    told = cli.main(["distill", run, "--overwrite"]), capsys.readouterr().err
    assert told[0] == 2 and "is alive; end it first" in told[1]
    assert (folder / "config.json").exists(), "nor is it removed"
    mine.close()


@pytest.mark.ray
def test_a_run_goes_on_from_its_folder_and_an_ended_one_does_not(
    domain, local_ray, tmp_path, capsys
):
    run = file_of(domain, tmp_path, "run")
    assert cli.main(["distill", run]) == 0
    folder = tmp_path / "run"
    first = json.loads((folder / "summary.json").read_text())
    vectors = (folder / "class_vectors.safetensors").read_bytes()
    before = sorted(path.name for path in folder.iterdir())
    assert "lease.json" not in before
    capsys.readouterr()
    assert cli.main(["distill", run, "--resume"]) == 0
    said = capsys.readouterr()
    assert "has ended already" in said.err and "12 steps" in said.out
    assert sorted(path.name for path in folder.iterdir()) == before

    # As if its driver had been killed before the end.
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step-00000012").rename(tmp_path / "gone")
    assert cli.main(["distill", run, "--resume", "--student.workers", "2"]) == 0
    said = capsys.readouterr().err
    assert "resumed, on 2 workers, from step 10; life 2 of the run" in said
    second = json.loads((folder / "summary.json").read_text())
    assert (second["steps"], second["samples"]) == (first["steps"], first["samples"])
    assert second["wall_s"] > first["wall_s"] and second["train_s"] < second["wall_s"]
    told = json.loads((folder / "config.json").read_text())
    assert [one["workers"] for one in told["lives"]] == [1, 2]
    assert told["student"]["workers"] == 1 and told["lives"][1]["versions"]["ray"]
    assert (folder / "class_vectors.safetensors").read_bytes() == vectors
    kinds = [json.loads(line)["kind"] for line in open(folder / "metrics.jsonl")]
    assert kinds.count("resumed") == 1 and kinds[0] != "resumed"

    words = ["--seed", "5", "--train.lr", "1e-3"]
    for _ in range(2):  # of a run that has ended, and of one that has not
        assert cli.main(["distill", run, "--resume", *words]) == 2
        said = capsys.readouterr().err
        assert "seed: 5 here, 1 there" in said and "train.lr: 0.001 here, 0.002 there" in said
        (folder / "summary.json").unlink(missing_ok=True)
    other = tmp_path / "other.txt"
    other.write_text("".join(f"class {n}\n" for n in range(48)))
    assert cli.main(["distill", run, "--resume", "--classes.names", str(other)]) == 2
    assert f"{other} has not the classes that {folder}" in capsys.readouterr().err
    with pytest.raises(UserError, match="exists already"):
        distill(config_of(domain, tmp_path, "run"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_without_a_checkpoint_begins_anew_and_says_so(domain, local_ray, tmp_path, capsys):
    config = config_of(domain, tmp_path, "run", "--train.passes", "1")
    distill(config)
    (config.folder / "summary.json").unlink()  # as if it had been killed in its first steps
    shutil.rmtree(config.folder / "checkpoints")
    distill(config, resume=True)
    assert "from step 0: there is no checkpoint yet" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_of_several_seeds_and_students_those_that_have_not_ended_go_on(
    domain, local_ray, tmp_path, capsys
):
    seeds = file_of(domain, tmp_path, "seeds", "--train.passes", "1")
    assert cli.main(["distill", seeds, "--seeds", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["distill", seeds, "--seeds", "1,2", "--resume"]) == 0
    said = capsys.readouterr()
    assert "seed-1 has ended already" in said.err and "seeds [1, 2]" in said.out

    for name, depth in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.toml").write_text(f"[student]\ndepth = {depth}\n")
    one, two = str(tmp_path / "one.toml"), str(tmp_path / "two.toml")
    run = file_of(domain, tmp_path, "pair", "--train.passes", "1")
    assert cli.main(["distill", run, "--students", one]) == 0
    capsys.readouterr()
    assert cli.main(["distill", run, "--students", one, two, "--resume"]) == 0
    said = capsys.readouterr()
    assert "pair/one has ended already" in said.err
    assert said.out.count("191 images in 6 steps") == 2
