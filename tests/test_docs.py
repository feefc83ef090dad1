"""What README.md and docs/ say can be typed, can: every command is parsed by its own parser, and
those of the walk-through are run, in their order, with small models in place of the large ones."""

import ast
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
from conftest import CLASSES
from documents import PAGES, ROOT, anchors, blocks, commands, files, links, typed

import jobs
from engine.config import RunConfig
from engine.parse import parse
from jobs import cli
from jobs.quickstart import HERE

COMMON = "docs/own-data.md"  # whose files other pages go on with
WALK = tuple(
    f"docs/{name}.md"
    for name in ("own-data", "labels", "training", "runs", "report", "curate", "python")
)
# Pages whose commands are parsed alone, or run elsewhere; and why.
UNWALKED = {
    "README.md": "they are those of the pages",
    "docs/quickstart.md": "test_the_quickstart, below",
    "docs/benchmarks.md": "they measure for minutes",
    "docs/cluster.md": "they need a cluster: test_submitted.py has a local one",
    "docs/coming-from-the-reference.md": "they need the paper's data sets and weights: "
    "test_datasets.py, test_learned.py and test_protocols.py have small ones",
    "docs/doctor.md": "test_doctor.py",
    "docs/tracking.md": "test_tracking.py",
    "docs/watching.md": "they are those of own-data.md and runs.md",
}
# What stands for what in the walk-through, in commands, TOML and Python.
STAND_INS = {
    "ViT-L-14-quickgelu": f"local-dir:{HERE / 'models' / 'teacher'}",
    "ViT-B-16-quickgelu": f"local-dir:{HERE / 'models' / 'student'}",
    "openai": "",  # which have no weights beside them
    'train={"passes": 2}': 'train={"passes": 2, "batch": 8}, student={"depth": 2}, device="cpu"',
}
SMALL = {  # said before a command's own words: sizes of those models, and little work
    "pretrain": "--device cpu --prompts.depth 2 --teacher.threads 1 --corpus.shots 2 "
    "--train.batch 4 --train.passes 2 --train.average_mean 1",
    "distill": "--device cpu --student.depth 2 --train.passes 2 --train.batch 8 "
    "--corpus.block_samples 8",
}
SMALL["label"] = SMALL["distill"]
COLOURS = [f"colour{number}" for number in range(12)]
SHAPES = [f"shape{number}" for number in range(12)]
# Commands of the walk-through's pages that it does not run, by how they begin; and why.
NOT_RUN = {
    "promptkd index laion/": "needs a thousand shards; test_corpus.py has numbers in braces",
    "promptkd index https://host/": "needs a server; test_remote_corpus.py has one",
    "promptkd distill run.toml --name thrice": "three runs more; test_jobs.py has --seeds",
}


class Parsed(Exception):
    """A command has come as far as its parser."""


@pytest.fixture
def told(tmp_path, monkeypatch):
    """told(page): in a folder with the files that the page shows, and those it goes on with."""

    def write(page: str) -> None:
        for name, text in (files(COMMON) | files(page)).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    monkeypatch.chdir(tmp_path)
    return write


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_parser_takes(page, told, monkeypatch, capsys):
    def only_parse(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    told(page)
    for info in pkgutil.iter_modules(jobs.__path__, "jobs."):  # some hand on to another
        if hasattr(module := importlib.import_module(info.name), "parse"):
            monkeypatch.setattr(module, "parse", only_parse)
    for program, *words in commands(page):
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), words
            continue
        if program != "promptkd" or words[:1] in (["--help"], ["--version"]):
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
            continue
        module = importlib.import_module(f"jobs.{words[0]}")
        try:
            with pytest.raises(Parsed):
                module.main(words[1:])
        except SystemExit as end:
            assert end.code == 0, f"promptkd {' '.join(words)}: {capsys.readouterr().err}"
        for word in words:
            if word.endswith(".toml"):
                assert Path(word).exists() or (ROOT / word).exists(), f"{page} shows no {word}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page):
    named = re.findall(r"`promptkd (\w+)", PAGES[page])
    assert set(named) <= cli.COMMANDS.keys() | {"COMMAND"}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_programs_can_be_read(page, tmp_path, capsys):
    names = files(page)
    for block in blocks(page):
        if block.kind == "python":
            ast.parse(block.text)
        if block.kind == "toml":
            tomllib.loads(block.text)
        if block.kind == "toml" and block.text not in names.values():  # a part of a run's file
            (part := tmp_path / "part.toml").write_text(block.text)
            parse(RunConfig, [str(part), "--name", "a"], prog="p", from_files=True)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page} links to {path}#{anchor}"


def test_every_page_is_named_by_another():
    reached = {"README.md"}
    for page in PAGES:
        reached |= {
            str(((ROOT / page).parent / path).resolve().relative_to(ROOT))
            for path, _ in links(page)
        }
    assert PAGES.keys() <= reached


def test_every_page_with_commands_is_walked_or_not_for_a_reason():
    assert not UNWALKED.keys() & set(WALK)
    typed_on = {page for page in PAGES if commands(page)}
    assert typed_on <= UNWALKED.keys() | set(WALK) <= PAGES.keys()
    for why in UNWALKED.values():
        assert all((ROOT / "tests" / name).exists() for name in re.findall(r"test_\w+\.py", why))


def test_what_is_not_run_is_there():
    every = [" ".join(words) for page in WALK for words in commands(page)]
    for start in NOT_RUN:
        assert any(one.startswith(start) for one in every), f"{start} is in no page any more"


def test_the_readmes_own_walk_is_that_of_the_pages():
    walked = {words for page in WALK for words in commands(page)}
    heads = PAGES["README.md"].split("## ")
    assert any(head.startswith("Your own images") for head in heads)
    ours = [
        words
        for words in commands("README.md")
        if words[1:2]
        and words[1] in ("shards", "index", "pretrain", "evaluate", "predict", "export")
    ]
    assert len(ours) > 5 and set(ours) <= walked


def put(text: str) -> str:
    """With the stand-ins."""
    for word, stand_in in STAND_INS.items():
        text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", stand_in, text)
    return text


def stay_in(folder: Path, monkeypatch) -> None:
    """There, with workers that load this tree all the same."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def home(tmp_path, monkeypatch, encoded) -> Path:
    """A user's folder: photos, some of them in class folders, and lists of names."""
    names = [*CLASSES, "crane"]
    for folder, per_class in (("photos", 8), ("held_out", 3), ("few_photos", 3), ("a_folder", 1)):
        for label, name in enumerate(names):
            for number in range(per_class):
                file = tmp_path / folder / name / f"{number}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encoded(90, 70, 10 * label + number))
    (tmp_path / "some.jpg").write_bytes(encoded(64, 48, 1))
    names = [name.replace("_", " ") for name in names]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    others = (f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    (tmp_path / "words.txt").write_text("\n".join([*names, *others]) + "\n")  # 100 are asked for
    (tmp_path / "more.txt").write_text("dandelion\nrose\n")
    (tmp_path / "keep.txt").write_text("crane machine\nrose\ndaisy\n")
    stay_in(tmp_path, monkeypatch)
    return tmp_path


def walk(page: str, words: list[str]) -> None:
    line = " ".join(["promptkd", *words])
    if not any(map(line.startswith, NOT_RUN)):
        command, *rest = map(put, words)
        code = cli.main([command, *SMALL.get(command, "").split(), *rest])
        assert code == 0, f"{page}: {line}"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_through(home, capfd):
    """From a folder of photos to predictions, page by page, and whatever else the pages type."""
    for page in WALK:
        for name, text in files(page).items():
            (home / name).write_text(put(text))
        variables: dict = {}
        for block in blocks(page):
            if block.kind == "python":
                exec(compile(put(block.text), page, "exec"), variables)
            for program, *words in typed(block):
                if program == "promptkd":
                    walk(page, words)
    errors = capfd.readouterr().err
    assert "Traceback" not in errors, errors
    assert (home / "answers.csv").read_text().count("\n") == 1 + 1 + 4 + 32
    assert (home / "student.onnx").exists() and (home / "own.safetensors").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart(tmp_path, monkeypatch, capfd):
    stay_in(tmp_path, monkeypatch)
    assert cli.main(["quickstart"]) == 0
    told = capfd.readouterr().out
    assert "distilled student" in told.splitlines()[-1]
    for program, *words in commands("docs/quickstart.md"):
        if program == "promptkd" and words[0] != "quickstart":  # once will do
            assert cli.main(words) == 0, words
    assert (tmp_path / "answers.jsonl").read_text().count("\n") == 1200
