"""The driver of stage I: check, choose the samples, learn prompts, evaluate, store."""

import dataclasses
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from engine import run_folder
from engine.clip.class_vectors import encode_classes, own_templates
from engine.clip.names import base_count, read_names
from engine.clip.towers import DTYPES, load_clip, trained_precision
from engine.config import RunFailed, UserError, absolute
from engine.config_pretrain import PretrainConfig
from engine.data.corpus import Corpus
from engine.data.decode import Decoder
from engine.data.loader import Loader, Work
from engine.data.shots import Shots, choose
from engine.data.views import ViewPolicy
from engine.progress import Watch, say
from engine.storage.ranges import Access
from engine.telemetry import Recorder
from engine.train.evaluate import Model, Score, evaluate, zero_shot
from engine.train.ledger import Ledger
from engine.train.pretrain import Average, Tuner, new_prompts
from engine.train.schedule import epoch_rate

__all__ = ["pretrain"]

_BLOCK = 512  # samples of a block in evaluation
_FORWARD = 256  # images of a forward in evaluation


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Learns prompts for a teacher and gives what `summary.json` says.

    The run folder gets `prompts.safetensors`, and `class_vectors.safetensors` of all classes.
    Raises UserError for what the user can mend, RunFailed where loss or prompts are not
    finite.
    """
    started = time.perf_counter()
    config = _resolved(absolute(config))
    run_folder.check_free(config)
    names = read_names(config.classes.names, repeats=config.classes.repeats)
    learned = len(names) if config.corpus.classes == "all" else base_count(len(names))
    corpus = _labelled(config, "shards", len(names))
    held_out = _labelled(config, "evaluation", len(names)) if config.corpus.evaluation else None
    told, device = config.teacher, torch.device(config.device)
    if told.threads:
        torch.set_num_threads(told.threads)
    clip = load_clip(told.model, told.weights, "teacher.")
    learner = new_prompts(clip, config.prompts, config.seed)
    shots = choose(corpus, learned, config.corpus.shots, config.seed, "corpus.shards")
    if shots.steps(config.train.batch) == 0:
        raise UserError(
            f"train.batch is {config.train.batch}, but corpus.shots gives {len(shots.samples)} "
            "images in all; lower train.batch or raise corpus.shots"
        )
    where = f"classes.names: {config.classes.names}"
    clip.text.to(device)
    untuned = encode_classes(clip, names, (f"{config.prompts.words} {{}}.",), field=where)
    say(
        f"{config.prompts.method} on {device}, towers in {told.precision}: {len(shots.samples)} "
        f"images of {learned} classes"
    )
    if len(shots.samples) < learned * config.corpus.shots:
        say(f"some classes have fewer than corpus.shots = {config.corpus.shots} images")
    dtype = DTYPES[told.precision]
    tuner = Tuner(clip, learner, names[:learned], config.prompts, config.train, device, dtype)
    folder = run_folder.create(config)
    policy = ViewPolicy(config.seed, clip.image.pixels, config.train.crop_scale)
    decoder = Decoder(policy, config.device, threads=2)
    with Watch({config.name: folder / "metrics.jsonl"}):
        average, ledger = learn(tuner, shots, decoder, config, folder)
    prompts = folder / "prompts.safetensors"
    average.prompts(clip, config.prompts).save(prompts)

    tuned = load_clip(told.model, told.weights, "teacher.", str(prompts))
    tuned.text.to(device)
    classes = encode_classes(tuned, names, own_templates(tuned, ()))
    classes.save(folder / "class_vectors.safetensors")
    steps = config.train.passes * shots.steps(config.train.batch)
    statement = ledger.statement(steps * config.train.batch)
    run_folder.write(folder / "ledger.json", statement)
    summary: dict[str, Any] = {
        "name": config.name,
        "method": config.prompts.method,
        "images": len(shots.samples),
        "classes": learned,
        "steps": steps,
        "skipped": statement["skipped"],
    }
    if held_out:
        say(f"evaluating on {held_out.samples} images, before and after")
        tuned.image.to(device, dtype)
        models = {
            "zero_shot": zero_shot(clip, untuned, device),
            "tuned": zero_shot(tuned, classes, device),
        }
        summary |= _scores(models, held_out, policy, len(names), device)
    summary["wall_s"] = time.perf_counter() - started
    run_folder.write(folder / "summary.json", summary)
    return summary


def learn(
    tuner: Tuner, shots: Shots, decoder: Decoder, config: PretrainConfig, folder: Path
) -> tuple[Average, Ledger]:
    """Trains the tuner's prompts. Gives their average over the passes, and what became of the
    samples. Raises RunFailed where loss or prompts are not finite."""
    train, device = config.train, torch.device(config.device)
    steps = shots.steps(train.batch)
    works = (
        Work("shards", number, pass_, shots.share(pass_, step, train.batch, config.seed))
        for number in range(train.passes * steps)
        for pass_, step in [divmod(number, steps)]
    )
    average, ledger = Average(train), Ledger()
    recorder = Recorder(folder / "metrics.jsonl")
    loader = Loader(shots, decoder, works, shots.block_bytes(0), device=device)
    sums, images, logged = torch.zeros(3, device=device), 0, time.perf_counter()
    try:
        for batch in loader:
            images_BCHW = batch.here()
            ledger.add(batch, batch.valid_B)
            pass_, done = batch.work.view, batch.work.step + 1
            rows = torch.from_numpy(np.flatnonzero(batch.valid_B)).to(device)
            labels_B = torch.from_numpy(batch.labels_B).to(device)[rows]
            if len(rows):
                sums += len(rows) * tuner.step(pass_, images_BCHW[rows], labels_B)
                images += len(rows)
            if done % train.log_steps == 0 or done % steps == 0:
                loss, cross_entropy, accuracy = (sums / max(images, 1)).tolist()
                finite = all(bool(part.isfinite().all()) for part in tuner.learner.prompts())
                if not (finite and math.isfinite(loss)):
                    raise RunFailed(
                        f"loss or prompts are not finite at step {done}; lower train.lr"
                    )
                now = time.perf_counter()
                recorder.record(
                    "train",
                    step=done,
                    steps=train.passes * steps,
                    pass_=pass_,
                    loss=loss,
                    cross_entropy=cross_entropy,
                    accuracy=accuracy,
                    lr=epoch_rate(pass_, train.passes, train.lr),
                    images_per_second=images / (now - logged),
                    waited_data_s=loader.waited_s,
                )
                sums.zero_()
                images, logged = 0, now
            if done % steps == 0:
                average.add(pass_, tuner.learner.prompts())
    finally:
        loader.close()
        recorder.close()
    return average, ledger


def _scores(
    models: dict[str, Model],
    held_out: Corpus,
    policy: ViewPolicy,
    classes: int,
    device: torch.device,
) -> dict[str, Any]:
    """Scores of each model, and under `evaluation` how many images were scored and skipped."""
    blocks, base = range(len(held_out.blocks)), base_count(classes)
    tallies, seen = evaluate(models, None, held_out, blocks, policy, 2, base, _FORWARD, device)
    scores = {name: asdict(Score.of(counts)) for name, counts in tallies.items()}
    return scores | {"evaluation": {"scored": seen.trained, "skipped": seen.skipped}}


def _resolved(config: PretrainConfig) -> PretrainConfig:
    """Replaces every "auto" by what this machine has."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for, but there is no GPU")
    precision = trained_precision(config.teacher.precision, device)
    teacher = dataclasses.replace(config.teacher, precision=precision)
    return dataclasses.replace(config, device=device, teacher=teacher)


def _labelled(
    config: PretrainConfig, which: Literal["shards", "evaluation"], classes: int
) -> Corpus:
    field, where = f"corpus.{which}", getattr(config.corpus, which)
    corpus = Corpus.open(where, _BLOCK, field, Access(config.corpus.hosts))
    corpus.require_labels_below(classes, config.classes.names, where, field)
    return corpus
