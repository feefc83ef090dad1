"""The card that an export brings along: true, parsed as the Hub does, and of use."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import make_bundle, photo, printed_by
from huggingface_hub import ModelCard
from tiny import clip_folder

from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.weights import hub_model
from engine.config import UserError
from engine.model_card import Run, code, model_card, run_of, write
from jobs import cli

SUMMARY = {
    "name": "mine",
    "steps": 228,
    "samples": 14400,
    "student_before": {"base": 62.0, "novel": 58.5, "hm": 60.199, "all": 46.5, "agreement": 42.67},
    "student_after": {"base": 91.667, "novel": 88.833, "hm": 90.228, "all": None},
    "teacher": {"base": 92.333, "novel": 90.5, "hm": 91.407, "all": 83.083, "agreement": 100.0},
    "skipped": {"undecodable": 6},
    "evaluation": {"scored": 1200, "skipped": {}},
    "selection": {"rule": "last"},
}
CONFIG = {
    "preset": "fast",
    "seed": 7,
    "teacher": {"model": "local-dir:/home/somebody/models/teacher", "prompts": "/x/prompts.st"},
    "train": {"passes": 6, "optimizer": "adamw", "lr": 0.01, "batch": 64},
    "versions": {"torch": "2.15.0"},
    "lives": [{"started": 1795305600.5, "host": "secret-host", "git_sha": "abc123"}],
}
HOSTILE = (
    "a`b``c",
    "``` fence",
    "<script>alert(1)</script>",
    "| pipe | [link](javascript:x) ![i](http://evil/x.png)",
    "---\nlicense: mit\n---",
    "tab\tand\x00nul\u202eright to left",
    "x" * 500,
    "# heading $\\frac{a}{b}$ **bold** &lt;",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return make_bundle(clip_folder(tmp_path_factory.mktemp("backbone")))


def run_folder(folder: Path, bundle: Bundle, summary=SUMMARY, config=CONFIG) -> Path:
    """A folder as a run leaves it; gives its bundle."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))
    vectors = bundle.class_vectors.float().numpy()
    own = ClassVectors(bundle.class_names, vectors, ("a {}.",), bundle.teacher, 20.0)
    own.save(folder / "class_vectors.safetensors")
    bundle.save(folder / "bundle.safetensors")
    return folder / "bundle.safetensors"


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,.]*\d|\d", text))


def test_a_card_has_the_numbers_of_its_run(bundle, tmp_path):
    file = run_folder(tmp_path / "run", bundle)
    text = model_card(bundle, run_of(file, bundle), "open_clip", "student")
    card = ModelCard(text)  # which is the Hub's parser, and offline
    assert card.data.to_dict() == {
        "pipeline_tag": "image-classification",
        "library_name": "open_clip",
        "tags": ["promptkd", "clip", "knowledge-distillation"],
        "metrics": ["accuracy"],
    }
    assert "| **student, distilled** | 91.67 | 88.83 | 90.23 | - | - |\n" in card.text
    assert "| student, zero-shot | 62.00 | 58.50 | 60.20 | 46.50 | 42.67 |\n" in card.text
    assert "Over 1,200 labelled images." in card.text
    assert "14,400 views of images, without labels, in 228 steps, 6 passes" in card.text
    assert "`undecodable` 6" in card.text and "those after the last step" in card.text
    assert "begun on 2026-11-22, at commit `abc123`" in card.text
    assert bundle.backbone in card.text and bundle.teacher in card.text
    assert "2 visual prompts of width 16 in 3 layers" in card.text
    assert "a projector of widths 8, 12 and 10" in card.text
    assert "In label order: `daisy`, `oak tree`, `ü`." in card.text
    for private in ("somebody", "secret-host", str(tmp_path), "/x/"):
        assert private not in text


def test_weights_chosen_on_test_images_are_told(bundle):
    chosen = SUMMARY | {"selection": {"rule": "paper", "pass": 3, "accuracy": 91.6}}
    text = model_card(bundle, Run(CONFIG, chosen), "onnx", "s.onnx")
    assert "accuracy on the evaluation images was the best: pass 4, 91.60 %" in text
    assert "chosen by their accuracy on the very images that the results are of" in text
    assert "the very images" not in model_card(bundle, Run(CONFIG, SUMMARY), "onnx", "s.onnx")


def test_what_is_not_known_is_not_told(bundle, tmp_path):
    """Neither without a run's files, nor of another run's, nor of files that lack them."""
    alone = tmp_path / "bundle.safetensors"
    bundle.save(alone)
    why = run_of(alone, bundle)
    bare = model_card(bundle, why, "open_clip", "student")
    assert "Not known: the files of its run were not beside the bundle" in bare
    assert "Its accuracy is not known." in bare and "%" not in bare and "metrics" not in bare
    file = run_folder(tmp_path / "run", bundle)
    renamed = bundle.renamed({"daisy": "rose"})
    assert "no longer those of its run" in run_of(file, renamed)
    other = replace(bundle, class_vectors=bundle.class_vectors.flip(0))
    assert "no longer those of its run" in run_of(file, other)
    copied = file.with_name("other.safetensors")
    bundle.save(copied)
    assert isinstance(run_of(copied, bundle), str)

    odd = {
        "student_after": {"base": "<b>99</b>", "novel": True, "hm": float("nan"), "all": 10**400},
        "samples": "many",
        "skipped": ["x"],
        "selection": None,
        "evaluation": 3,
    }
    text = model_card(bundle, Run({"train": 3, "lives": [None], "teacher": []}, odd), "onnx", "x")
    assert "None: the run had no labelled images" in text
    assert numbers(text) == numbers(model_card(bundle, Run({}, {}), "onnx", "x"))


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_damaged_file_of_the_run_is_named(bundle, tmp_path, content):
    file = run_folder(tmp_path / "run", bundle)
    (tmp_path / "run" / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"^bundle: .*summary.json is damaged"):
        run_of(file, bundle)


def test_names_of_others_stay_what_they_are(bundle):
    names = tuple(HOSTILE[:3])
    text = model_card(replace(bundle, class_names=names), Run({}, {}), "onnx", "s.onnx")
    assert "In label order: ```a`b``c```, ```` ``` fence ````, `<script>" in text
    for name in HOSTILE:
        plain = model_card(bundle, Run({}, {}), "open_clip", "s")
        evil = replace(bundle, class_names=(name, "b", "c"), teacher=name, model=name, weights=name)
        text = model_card(evil, Run({"git_sha": name}, {}), "open_clip", "s")
        assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
        assert text.count("\n") == plain.count("\n") and "\u202e" not in text and "\x00" not in text
        for line in text.splitlines():
            assert "<script>" not in without_code(line) and "](" not in without_code(line).replace(
                "[PromptKD](", ""
            )


def without_code(line: str) -> str:
    """A line of markdown without its code spans, by CommonMark's rule: a run of backticks is ended
    by the next run of the same length."""
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line)


def test_code_spans():
    assert code("plain") == "`plain`"
    assert code("a`b") == "``a`b``" and code("`") == "`` ` ``"
    assert code("two\nlines") == r"`two\nlines`" and code("") == '`""`'
    assert len(code("x" * 500)) == 102


def test_the_backbone_is_named_where_the_hub_has_it(tmp_path, monkeypatch):
    wanted = "timm/vit_base_patch16_clip_224.openai"
    assert hub_model("ViT-B-16-quickgelu", "openai") == wanted
    assert hub_model("ViT-B-16-quickgelu", "nobody's") is None
    assert hub_model("local-dir:/models/clip", "") is None
    monkeypatch.chdir(tmp_path)
    Path("openai").write_bytes(b"")  # a file comes first, as where weights are loaded
    assert hub_model("ViT-B-16-quickgelu", "openai") is None


def test_what_a_card_says_to_type_predicts(bundle, tmp_path, capsys, monkeypatch):
    file = run_folder(tmp_path / "run", bundle)
    out = tmp_path / "student"
    assert cli.main(["export", str(file), str(out), "--format", "open_clip"]) == 0
    assert f"{out / 'model_card.md'}: with the results of its run" in capsys.readouterr().out
    card = (out / "model_card.md").read_text()
    assert "90.23" in card
    assert cli.main(["predict", str(file), str(photo(out))]) == 0
    (best, *_) = json.loads(capsys.readouterr().out)["top"]
    assert printed_by(card, out) == best
    monkeypatch.chdir(out)
    words = next(line.split() for line in card.splitlines() if "promptkd predict" in line)
    assert cli.main(words[1:]) == 0
    (again, *_) = json.loads(capsys.readouterr().out)["top"]
    assert again == best


def test_a_card_that_is_there_is_left_as_it_is(tmp_path):
    assert write(tmp_path, "ours") and not write(tmp_path, "another")
    assert (tmp_path / "model_card.md").read_text() == "ours"


def test_a_trained_tower_wants_the_backbone_it_had(tmp_path):
    trained = make_bundle(clip_folder(tmp_path / "clip", seed=4), layers=1)
    text = model_card(trained, Run({}, {}), "open_clip", "student")
    assert "weights of the image tower" in text and "--model MODEL --weights WEIGHTS" in text
