"""The model card of an export: what it is, what its run has measured, how to use it, its limits.

In the Hugging Face Hub's format: YAML, then markdown. Every number is the bundle's, or one of the
files that its run has left beside it; what they do not tell is left out. Names come from others:
none is in the YAML, and in the text they are code spans, which nothing in them can end.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from engine import durable
from engine.clip.bundle import Bundle
from engine.clip.class_vectors import ClassVectors
from engine.clip.weights import LOCAL, hub_model
from engine.config import UserError
from engine.json_text import parse_object

__all__ = ["CARD", "Format", "Run", "code", "model_card", "run_of", "write"]

CARD = "model_card.md"
_CLASSES = 20  # that are named
_LONGEST = 100  # letters of a name
_MODELS = {
    "student_before": "student, zero-shot",
    "student_after": "**student, distilled**",
    "teacher": "teacher",
}
_SCORES = {"base": "base", "novel": "novel", "hm": "HM", "all": "all", "agreement": "agreement"}
Format = Literal["onnx", "open_clip"]


class Run(NamedTuple):
    """What the files of a run say: JSON objects as they were read."""

    config: Mapping[str, Any]
    summary: Mapping[str, Any]


def run_of(file: Path, bundle: Bundle) -> Run | str:
    """The run in whose folder the bundle of a `file` lies; or why its numbers are not known. Raises
    UserError for files that are damaged."""
    told = [file.with_name(name) for name in ("config.json", "summary.json")]
    vectors = file.with_name("class_vectors.safetensors")
    if file.name != "bundle.safetensors" or not all(path.exists() for path in (*told, vectors)):
        return "the files of its run were not beside the bundle"
    classes = ClassVectors.load(vectors, "bundle")
    stored = torch.from_numpy(classes.vectors).half()
    if classes.names != bundle.class_names or not torch.equal(stored, bundle.class_vectors):
        return "the bundle's classes are no longer those of its run"
    return Run(*map(_object, told))


def _object(file: Path) -> dict[str, Any]:
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        raise UserError(f"bundle: {file} is damaged: {error}") from None


def model_card(bundle: Bundle, run: Run | str, format: Format, name: str) -> str:
    """The card of a bundle that was exported to a file or folder of this `name`."""
    known = run if isinstance(run, Run) else Run({}, {})
    scores = _scores(known.summary)
    parts = [
        _front(bundle, format, bool(scores)),
        f"# A CLIP student of {len(bundle.class_names):,} classes, distilled with PromptKD",
        "An image classifier: the image tower of a CLIP, which a larger CLIP has taught by its "
        "answers to images ([PromptKD](https://arxiv.org/abs/2403.02781)). Its class vectors are "
        "the teacher's, and stored: it needs neither teacher nor text tower.",
        "## Results",
        *(_results(scores, known) if scores else [_why_none(run)]),
        "## How it was made",
        _listed(_made(bundle, known)),
        "## Classes",
        _classes(bundle.class_names),
        "## Use",
        "Images are resized by their shorter side, bicubically, and cropped in the centre, to "
        f"{bundle.pixels} x {bundle.pixels} pixels in RGB.",
        *(_onnx(name) if format == "onnx" else _open_clip(bundle)),
        "## Limits",
        _listed(_limits(known, bool(scores))),
        "## License",
        "TODO: choose a license, here and as `license:` at the top. Those of the backbone, of the "
        "teacher and of the images may bind you.",
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, text: str) -> bool:
    """Whether the card was written: not where there is one, which may hold somebody's own words."""
    if (folder / CARD).exists():
        return False
    durable.replace(folder / CARD, text.encode())
    return True


def code(text: object) -> str:
    """Markdown in which any text stands for itself: a code span, fenced by more backticks than it
    has in a row, of letters that can be seen; cut where it is long."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)) or '""'
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _front(bundle: Bundle, format: Format, scored: bool) -> str:
    lines = ["# license: TODO", "pipeline_tag: image-classification"]
    lines += ["library_name: open_clip"] * (format == "open_clip")
    if base := hub_model(bundle.model, bundle.weights):
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- promptkd", "- clip", "- knowledge-distillation"]
    lines += ["- onnx"] * (format == "onnx")
    lines += ["metrics:", "- accuracy"] * scored
    return "\n".join(["---", *lines, "---"])


def _scores(summary: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model that has any."""
    rows = []
    for model, shown in _MODELS.items():
        values = [_number(summary, model, score) for score in _SCORES]
        if any(value is not None for value in values):
            rows.append([shown, *("-" if value is None else f"{value:.2f}" for value in values)])
    return rows


def _results(scores: Sequence[Sequence[str]], run: Run) -> Iterator[str]:
    head = ["% top-1", *_SCORES.values()]
    rows = [head, ["---", *["---:"] * len(_SCORES)], *scores]
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)
    scored = _number(run.summary, "evaluation", "scored")
    yield (
        (f"Over {scored:,.0f} labelled images. " if scored is not None else "")
        + "Base: images of the first half of the classes, classified among these; novel: those of "
        "the other half, likewise; HM: the harmonic mean of the two; all: all images, among all "
        "classes; agreement: images whose top class is the teacher's."
    )


def _why_none(run: Run | str) -> str:
    if isinstance(run, str):
        return f"Not known: {run} when this card was written."
    return "None: the run had no labelled images to be evaluated on."


def _made(bundle: Bundle, run: Run) -> Iterator[str]:
    config, summary = run
    if (samples := _number(summary, "samples")) is not None:
        steps, passes = _number(summary, "steps"), _number(config, "train", "passes")
        told = f"trained on {samples:,.0f} views of images, without labels"
        told += f", in {steps:,.0f} steps" if steps is not None else ""
        yield told + (f", {passes:,.0f} passes over the corpus" if passes is not None else "")
    skipped = _at(summary, "skipped")
    if counts := [f"{code(why)} {_number(skipped, why) or 0:,.0f}" for why in sorted(skipped)]:
        yield f"views left out, by reason: {', '.join(counts)}"
    yield from _weights(_at(summary, "selection"))
    yield from _settings(config)
    yield f"backbone: {_model(bundle.model, bundle.weights)}, sha256 {code(bundle.backbone)}"
    teacher = _at(config, "teacher")
    named = f"{_model(teacher.get('model'), teacher.get('weights'))}, " if teacher else ""
    if prompts := teacher.get("prompts"):
        named += f"with learned prompts {code(Path(str(prompts)).name)}, "
    yield f"teacher: {named}sha256 {code(bundle.teacher)}"
    if isinstance(others := config.get("teachers"), list) and others:
        yield f"beside it {len(others)} more teachers, whose answers were mixed with its own"
    yield _learned(bundle)
    if versions := _at(config, "versions"):
        yield "versions: " + ", ".join(code(f"{name} {versions[name]}") for name in versions)


def _weights(selection: Mapping[str, Any]) -> Iterator[str]:
    if "rule" not in selection:
        return
    if selection["rule"] == "last":
        yield "weights: those after the last step"
        return
    pass_, accuracy = _number(selection, "pass"), _number(selection, "accuracy")
    best = "" if pass_ is None or accuracy is None else f": pass {pass_ + 1:.0f}, {accuracy:.2f} %"
    yield f"weights: of the pass whose accuracy on the evaluation images was the best{best}"


def _settings(config: Mapping[str, Any]) -> Iterator[str]:
    train = _at(config, "train")
    told = {"preset": config.get("preset"), "seed": config.get("seed")}
    told |= {name: train.get(name) for name in ("optimizer", "lr", "batch", "kd_weight")}
    shown = [f"{name} {code(value)}" for name, value in told.items() if value is not None]
    if shown:
        yield f"settings: {', '.join(shown)}"
    lives = config.get("lives")
    first = lives[0] if isinstance(lives, list) and lives else {}
    if isinstance(first, dict) and (started := _number(first, "started")) is not None:
        commit = first.get("git_sha")
        day = time.strftime("%Y-%m-%d", time.gmtime(started))
        yield f"begun on {day}" + (f", at commit {code(commit)}" if commit else "")


def _model(model: object, weights: object) -> str:
    """Without the folders that they lay in, which are nobody's business."""
    name = str(model)
    if name.startswith(LOCAL):
        return f"a folder called {code(Path(name.removeprefix(LOCAL)).name)}"
    return code(name) + (f" of {code(Path(str(weights)).name)}" if weights else "")


def _learned(bundle: Bundle) -> str:
    hidden, inputs = bundle.learned["projector.first.weight"].shape
    told = [f"a projector of widths {inputs}, {hidden} and {bundle.class_vectors.shape[1]}"]
    if "prompts" in bundle.learned:
        depth, prompts, width = bundle.learned["prompts"].shape
        told.insert(0, f"{prompts} visual prompts of width {width} in {depth} layers")
    if bundle.tower_weights:
        count = sum(tensor.numel() for tensor in bundle.tower_weights.values())
        told.append(f"{count:,} weights of the image tower")
    return f"learned: {', '.join(told)}"


def _classes(names: Sequence[str]) -> str:
    more = f", and {len(names) - _CLASSES:,} more" if len(names) > _CLASSES else ""
    return f"In label order: {', '.join(map(code, names[:_CLASSES]))}{more}."


def _open_clip(bundle: Bundle) -> Iterator[str]:
    yield "open_clip's own transform does that, and normalises them. In this folder:"
    yield """    from PIL import Image
    from promptkd_student import load

    model, preprocess, classes = load(".")
    image = preprocess(Image.open("photo.jpg").convert("RGB"))[None]
    logits = classes.logits(model.encode_image(image, normalize=True))
    print(classes.names[logits[0].argmax()])"""
    yield "`open_clip.create_model_and_transforms` by itself loads a CLIP that is not the student."
    if bundle.tower_weights:
        yield (
            "With the PromptKD engine, and the backbone as it was before it was trained (a tag of "
            "open_clip, or a file):"
        )
        yield "    promptkd predict promptkd.safetensors photo.jpg --model MODEL --weights WEIGHTS"
    else:
        yield "With the PromptKD engine:"
        yield "    promptkd predict promptkd.safetensors photo.jpg --model local-dir:."


def _onnx(name: str) -> Iterator[str]:
    yield "The file takes them as uint8, not normalised; class names are in its metadata:"
    yield f"""    import json

    import numpy as np
    import onnxruntime
    from PIL import Image

    session = onnxruntime.InferenceSession({name!a})
    about = session.get_modelmeta().custom_metadata_map
    names, side = json.loads(about["class_names"]), json.loads(about["preprocessing"])["pixels"]
    image = Image.open("photo.jpg").convert("RGB")
    size = [side * edge // min(image.size) for edge in image.size]
    left, top = ((edge - side) // 2 for edge in size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    logits, _ = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None]}})
    print(names[logits[0].argmax()])"""
    yield "With the PromptKD engine, and the bundle that this was exported from:"
    yield "    promptkd predict bundle.safetensors photo.jpg"


def _limits(run: Run, scored: bool) -> Iterator[str]:
    if not scored:
        yield "Its accuracy is not known."
    elif _at(run.summary, "selection").get("rule") != "last":
        yield (
            "Its weights were chosen by their accuracy on the very images that the results are of, "
            "as the paper does: on new ones they are to be expected lower."
        )
    yield (
        "It has learned from its teacher's answers alone, and no label has corrected them: the "
        "teacher's mistakes and biases, and those of the data that both CLIPs were trained on, are "
        "its own."
    )
    yield (
        "It knows these classes and nothing else: an image of none of them is given one all the "
        "same. Nobody has checked how far its probabilities can be trusted."
    )
    yield (
        "It was fitted to images of one collection. On others it may do worse than the CLIP that "
        "it was made from."
    )


def _listed(lines: Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _at(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object within an object; an empty one, where there is none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _number(tree: Mapping[str, Any], *path: str) -> float | None:
    """A finite number within an object."""
    *above, last = path
    for key in above:
        tree = _at(tree, key)
    value = tree.get(last)
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return value if fine else None
