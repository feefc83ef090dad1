"""The configs that users copy: each parses, and is what the planner recommends."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from jobs import cli

FOLDER = Path(cli.__file__).parent / "configs"
READY = sorted(FOLDER.glob("*.toml"))


def test_they_are_all_there():
    names = {file.stem for file in READY}
    assert names == {"one-gpu", "eight-gpus", "a100-4x8", "dump-10b"}


def planned(file: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    """What the planner's command in a config's head says."""
    (command,) = re.findall(r"^#\s+promptkd (plan .*)$", file.read_text(), re.MULTILINE)
    assert cli.main([*shlex.split(command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_a_ready_config_is_resolved_and_is_a_plan(file, capsys):
    assert cli.main(["distill", str(file), "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    told = planned(file, capsys)
    gpus = max(plan["gpus"] for plan in told["plans"])
    ways = [plan for plan in told["plans"] if plan["gpus"] == gpus]
    source, store = config["targets"]["source"], bool(config["targets"]["store"])
    ours = next(way for way in ways if (way["source"], way["store"]) == (source, store))
    assert config["student"]["workers"] == ours["students"]
    assert config["teacher"]["actors"] == ours["teachers"]
    assert ours["hours"] < 1.01 * ways[0]["hours"], "as good as the best of all"
    if ours == ways[0]:
        recommended = told["recommended"]
        assert config["train"]["passes"] == recommended["train"]["passes"]
        assert config["corpus"]["lanes"] == recommended["corpus"]["lanes"]


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_its_numbers_fit_each_other(file, capsys):
    assert cli.main(["distill", str(file), "--dry-run"]) == 0
    config = json.loads(capsys.readouterr().out)
    told = tomllib.loads(file.read_text())
    told_plan = planned(file, capsys)
    images = int(re.search(r"--images (\d+)", file.read_text())[1])
    steps = images // config["train"]["batch"]  # of a pass
    assert config["train"]["batch"] // config["student"]["workers"] >= 64
    assert 50 <= config["train"]["checkpoint_steps"] <= steps
    assert config["train"]["keep_every"] % config["train"]["checkpoint_steps"] == 0
    assert 0.15 < config["train"]["keep_every"] / steps < 6
    window = config["corpus"]["block_samples"] * config["corpus"]["window_blocks"]
    held = window * config["corpus"]["lanes"] / config["student"]["workers"] * 120e3  # bytes
    assert held < config["corpus"]["memory_gb"] * 2**30 * 1.05, "else blocks are read again"
    assert told["name"] and "seed" not in told
    if config["targets"]["store"]:
        recorded = told_plan["store_bytes"]
        (figure,) = re.findall(r"([\d.]+) TB of labels", file.read_text())
        assert float(figure) == pytest.approx(recorded / 1e12, rel=0.01)


def test_teachers_and_students_of_the_four_nodes_are_the_planners_best_stream(capsys):
    """Asked again, not of what the config repeats: the settings of a stream on 32 A100."""
    from engine.plan import Job, plans, settings
    from engine.rates import Rates, roofline

    rates, job = Rates(**roofline("a100", 0.6)), Job(images=1281167)
    best = next(way for way in plans(rates, job, 32) if way.source == "stream" and not way.store)
    told = settings(best, job, rates)
    config = tomllib.loads((FOLDER / "a100-4x8.toml").read_text())
    for section, field in (
        ("teacher", "actors"),
        ("student", "workers"),
        ("targets", "outstanding"),
        ("corpus", "block_samples"),
        ("corpus", "window_blocks"),
        ("corpus", "lanes"),
    ):
        assert config[section][field] == told[section][field], field
