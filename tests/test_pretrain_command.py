"""`promptkd pretrain`, as a user types it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES
from tiny import clip_folder

from engine.clip.class_vectors import ClassVectors, encode_classes, own_templates
from engine.clip.learned import read_prompts
from engine.clip.towers import load_clip
from engine.data.shards import write_shards
from jobs import cli

PASSES, SHOTS, BATCH = 3, 5, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a CLIP (`clip`) and the names of three classes, two of them base."""
    folder = tmp_path_factory.mktemp("place")
    clip_folder(folder / "clip", text={"layers": 2, "context_length": 64})
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


@pytest.fixture(scope="module")
def pretrain(place, corpus_folder):
    """pretrain(name, *flags): runs the command; gives its exit code and the run folder."""

    def run(name: str, *flags: object) -> tuple[int, Path]:
        words = {
            "name": name,
            "runs_dir": place / "runs",
            "device": "cpu",
            "corpus.shards": corpus_folder,
            "corpus.shots": SHOTS,
            "classes.names": place / "names.txt",
            "teacher.model": f"local-dir:{place / 'clip'}",
            "prompts.depth": 2,
            "prompts.text": 2,
            "prompts.vision": 2,
            "train.passes": PASSES,
            "train.batch": BATCH,
            "train.average_mean": 2,
            "train.log_steps": 1,
        }
        args = [str(word) for field, value in words.items() for word in (f"--{field}", value)]
        return cli.main(["pretrain", *args, *map(str, flags)]), place / "runs" / name

    return run


@pytest.fixture(scope="module")
def plain(pretrain, corpus_folder):
    """A run of PromptSRC with an evaluation."""
    code, folder = pretrain("plain", "--corpus.evaluation", corpus_folder)
    assert code == 0
    return folder


def prompts_of(folder: Path):
    return read_prompts(folder / "prompts.safetensors", "prompts")[0]


def test_the_folder_of_a_run(plain):
    names = {"config.json", "metrics.jsonl", "summary.json", "ledger.json"}
    assert {p.name for p in plain.iterdir()} == names | {
        "prompts.safetensors",
        "class_vectors.safetensors",
    }
    summary = json.loads((plain / "summary.json").read_text())
    steps = PASSES * (2 * SHOTS // BATCH)
    wanted = {"name": "plain", "method": "promptsrc", "images": 2 * SHOTS, "classes": 2}
    assert summary.items() >= (wanted | {"steps": steps}).items() and summary["skipped"] == {}
    told = {"steps", "skipped", "zero_shot", "tuned", "evaluation", "wall_s"}
    assert summary.keys() == wanted.keys() | told
    assert summary["evaluation"] == {"scored": 24, "skipped": {}}
    for scores in (summary["zero_shot"], summary["tuned"]):
        assert scores.keys() == {"base", "novel", "hm", "all", "agreement"}
        assert 0 <= scores["base"] <= 100 and scores["novel"] == 100  # one class alone
    ledger = json.loads((plain / "ledger.json").read_text())
    seen = steps * BATCH
    assert ledger == {"seen": seen, "trained": seen, "skipped": {}, "pending": 0}
    records = [json.loads(line) for line in open(plain / "metrics.jsonl")]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert {record["kind"] for record in records} == {"train"}
    assert [record["lr"] for record in records[:3]] == [1e-5, 1e-5, 0.005]
    assert all(record["loss"] > record["cross_entropy"] > 0 for record in records)
    config = json.loads((plain / "config.json").read_text())
    assert config["device"] == "cpu" and config["teacher"]["precision"] == "fp32"


def test_its_prompts_are_a_teachers_and_its_class_vectors_theirs(plain, place):
    model = f"local-dir:{place / 'clip'}"
    teacher = load_clip(model, "", "teacher.", str(plain / "prompts.safetensors"))
    assert teacher.prompts.text_KPC.shape == (2, 2, 8)
    assert teacher.prompts.vision_KPC.shape == (2, 2, 16)
    assert teacher.prompts.backbone == teacher.backbone == load_clip(model, "", "").fingerprint
    stored = ClassVectors.load(plain / "class_vectors.safetensors")
    assert stored.names == CLASSES and stored.templates == ("a photo of a {}.",)
    assert stored.teacher == teacher.fingerprint
    again = encode_classes(teacher, CLASSES, own_templates(teacher, ()))
    assert np.array_equal(stored.vectors, again.vectors)


def test_a_seed_fixes_the_prompts(plain, pretrain, capsys):
    code, same = pretrain("same")
    assert code == 0
    told = capsys.readouterr().out
    assert f"learned prompts: {same / 'prompts.safetensors'}" in told
    one, two = prompts_of(plain), prompts_of(same)
    assert torch.equal(one.text_KPC, two.text_KPC) and torch.equal(one.vision_KPC, two.vision_KPC)
    _, other = pretrain("other", "--seed", 2)
    assert not torch.equal(one.text_KPC, prompts_of(other).text_KPC)


def test_maple_learns_from_all_classes(pretrain, capsys):
    flags = ("--preset", "maple", "--prompts.method", "maple", "--corpus.classes", "all")
    code, folder = pretrain("maple", *flags)
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["classes"]) == ("maple", 3)
    assert "tuned" not in summary
    records = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    assert all(record["loss"] == pytest.approx(record["cross_entropy"]) for record in records)
    assert prompts_of(folder).method == "maple"


def test_images_that_cannot_be_decoded_are_counted(pretrain, images_folder, index, tmp_path):
    images = tmp_path / "images"
    for file in images_folder.rglob("*.*"):
        (images / file.parent.name).mkdir(parents=True, exist_ok=True)
        data = file.read_bytes()
        if file.stem in ("00", "01"):  # jpegs of the base classes lose their quantization tables
            data = data.replace(b"\xff\xdb", b"\xff\xfe")
        (images / file.parent.name / file.name).write_bytes(data)
    write_shards(images, tmp_path / "corpus", None, shard_samples=10, skip_invalid=False)
    index(tmp_path / "corpus")
    flags = ("--corpus.shards", tmp_path / "corpus", "--corpus.shots", 99, "--train.batch", 16)
    code, folder = pretrain("cut", *flags)
    assert code == 0
    ledger = json.loads((folder / "ledger.json").read_text())
    trained, skipped = 14 * PASSES, {"undecodable": 2 * PASSES}
    assert ledger == {"seen": 16 * PASSES, "trained": trained, "skipped": skipped, "pending": 0}
    assert json.loads((folder / "summary.json").read_text())["skipped"] == skipped


@pytest.mark.parametrize("batch", [4, 10], ids=["in a step", "in the last update"])
def test_a_loss_that_is_not_finite_stops_the_run(pretrain, place, capsys, batch):
    """Also where it is the last update that breaks the prompts, after which comes no loss."""
    flags = ("--train.lr", "1e38", "--train.text_weight", "1e6", "--train.batch", batch)
    passes = ("--train.passes", 2 if batch == 10 else 3)
    code, _ = pretrain(f"wild-{batch}", *flags, *passes)
    told = capsys.readouterr().err
    assert code == 1 and re.search(r"not finite at step \d; lower train\.lr", told)
    assert "Traceback" not in told
    assert not (place / "runs" / f"wild-{batch}" / "prompts.safetensors").exists()


WRONG = {
    "too deep": ("--prompts.depth", "3", "prompts.depth: 3 layers, local-dir:.* has 2"),
    "few words": ("--prompts.words", "a", "prompts.words: 'a' has 1 tokens, prompts.text is 2"),
    "large batch": ("--train.batch", "11", "train.batch is 11, but corpus.shots gives 10"),
    "no shards": ("--corpus.shards", "no/such", "corpus.shards: no .tar shards at .*no/such"),
    "no evaluation": ("--corpus.evaluation", "no/such", "corpus.evaluation: no .tar shards"),
    "no names": ("--classes.names", "no/such.txt", "classes.names: .*no/such.txt cannot be read"),
    "no model": ("--teacher.model", "local-dir:no/such", "teacher.model: .*no/such holds no"),
    "average": ("--train.average_mean", "4", r"train.average_mean \(4\) must be at most"),
    "name": ("--name", "a/b", "name must be a plain folder name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_end_in_a_line_that_names_them(pretrain, place, capsys, case):
    *flags, complaint = WRONG[case]
    code, folder = pretrain("wrong", *flags)
    told = capsys.readouterr().err
    assert code == 2 and not folder.exists()
    assert len(told.splitlines()) == 1
    assert re.match(rf"promptkd pretrain: {complaint}", told), told


def complaint(pretrain, capsys, *flags: object) -> str:
    code, folder = pretrain("wrong", *flags)
    assert code == 2 and not folder.exists()
    return capsys.readouterr().err


def test_labels_must_have_names(pretrain, corpus_folder, tmp_path, capsys):
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text("daisy\noak\n")
    many.write_text("daisy\noak\ntulip\nrose\n")
    told = complaint(pretrain, capsys, "--classes.names", few)
    assert f"classes.names: {few} has 2 names, but corpus.shards ({corpus_folder}) has" in told
    assert "labels up to 2" in told
    flags = ("--classes.names", many, "--corpus.classes", "all")
    assert "corpus.shards: no sample has label 3" in complaint(pretrain, capsys, *flags)


def test_names_must_fit_every_sentence(pretrain, tmp_path, capsys):
    """Of the class vectors, and of the anchor, before there is a run folder."""
    names = tmp_path / "names.txt"
    long, longer = 45 * "x", 60 * "x"
    names.write_text(f"oak\n{longer}\ntulip\n")
    told = complaint(pretrain, capsys, "--classes.names", names)
    assert f"classes.names: {names}: '{longer}' is too long: 'a photo of a {{}}.'" in told
    names.write_text(f"oak\n{long}\ntulip\n")
    told = complaint(pretrain, capsys, "--classes.names", names)
    assert f"classes.names: '{long}' is too long: 'a photo of the hard to see {{}}.'" in told


def test_maple_wants_as_many_prompts_in_both_towers(pretrain, capsys):
    flags = ("--prompts.method", "maple", "--prompts.vision", 3)
    told = complaint(pretrain, capsys, *flags)
    assert "prompts.vision (3) must be prompts.text (2) with prompts.method=maple" in told


def test_a_folder_is_replaced_only_if_told_to(plain, pretrain, place, capsys):
    before = (plain / "prompts.safetensors").read_bytes()
    code, _ = pretrain("plain")
    assert code == 2 and f"name: {plain} exists already" in capsys.readouterr().err
    assert (plain / "prompts.safetensors").read_bytes() == before
    code, folder = pretrain("same", "--overwrite", "--seed", 3)
    assert code == 0 and json.loads((folder / "config.json").read_text())["seed"] == 3
    stranger = place / "runs" / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").touch()
    assert pretrain("stranger", "--overwrite")[0] == 2 and (stranger / "thesis.txt").exists()
