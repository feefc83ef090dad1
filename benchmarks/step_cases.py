"""The cases `open_clip` and `reference` of `bench_towers`: whole steps of distillation, ours and
those of its peers."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from decoders import decoder_of
from photos import draw, photos
from reference_peer import BATCH, WORKERS, ReferenceStep, loader
from torch import Tensor
from tower_models import (
    BACKWARD,
    FORWARD,
    KD_WEIGHT,
    PRECISIONS,
    SCALE,
    TEXT,
    Ours,
    Pair,
    default_precisions,
    draw_images,
    gflops,
    normalised,
    our_loader,
    peer_precisions,
    student_gflops,
    student_of,
    text_gflops,
)
from tower_peers import (
    Baseline,
    DistillModel,
    OpenClipStudent,
    OpenClipTower,
    why_no_distill_model,
)
from tower_rig import Call, Rig, Work, compare

from engine.clip.towers import DTYPES
from engine.progress import say

__all__ = ["against_open_clip", "against_reference"]

JPEG, JPEGS, SHARDS = (500, 375), 256, 8
CPU = torch.device("cpu")
Precisions = tuple[str, str]  # of teacher and student
Works = dict[str, Work]


def against_reference(rig: Rig) -> None:
    pair = Pair.drawn(*rig.plan.pair, rig.plan.classes)
    _reference_loads(rig, pair)
    if rig.plan.resident:
        _reference_resident(rig, pair)


def against_open_clip(rig: Rig) -> None:
    pair = Pair.drawn(*rig.plan.pair, rig.plan.classes)
    for batch in rig.plan.steps:
        _open_clip(rig, pair, batch)


def _ours(rig: Rig, pair: Pair, make: Callable[[Precisions, bool], Call], batch: int) -> Works:
    """Ours, compiled and not; and with teachers in eight bits, where there are any."""
    own = default_precisions(rig.device)
    cost = gflops(pair.teacher.visual) + student_gflops(pair.student.visual)
    works = {"ours": Work(partial(make, own, True), batch, cost, own[0], compiled=True)}
    if rig.meter.cuda or batch == rig.plan.steps[0]:
        works["ours-eager"] = Work(partial(make, own, False), batch, cost, own[0])
    for precision in (one for one in PRECISIONS[rig.device.type] if one not in DTYPES):
        made = partial(make, (precision, own[1]), True)
        works[f"ours-{precision}"] = Work(made, batch, cost, precision, compiled=True)
    return works


def _ours_resident(rig: Rig, pair: Pair, raw: Tensor) -> Works:
    def make(precisions: Precisions, compile: bool) -> Call:
        images = len(raw) if compile else 0
        return partial(Ours(pair, rig.device, precisions, images).step, raw)

    return _ours(rig, pair, make, len(raw))


def _reference(rig: Rig, pair: Pair, sdpa: bool = False) -> ReferenceStep:
    dtype = torch.float16 if rig.meter.cuda else torch.float32
    start = student_of(pair, "fp32", CPU)
    models = (pair.teacher, pair.student, pair.prompts, pair.tokens_NL, start)
    return ReferenceStep(*models, rig.device, dtype, KD_WEIGHT, sdpa)


def _reference_work(rig: Rig, pair: Pair, make: Callable[[], Call]) -> Work:
    cost = gflops(pair.teacher.visual) + student_gflops(pair.student.visual)
    cost += text_gflops(pair.teacher) * len(pair.w_ND) / BATCH
    return Work(make, BATCH, cost, "fp16" if rig.meter.cuda else "fp32")


def _reference_loads(rig: Rig, pair: Pair) -> None:
    """Each side with its own loader, from the same JPEGs."""
    threads = os.cpu_count() or 1
    decoder, decodes = decoder_of(pair.pixels, rig.device, threads, BATCH)
    if decoder is None:
        say(f"the reference with loaders is left out: {decodes}")
        return
    jpegs = draw(JPEG, JPEGS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(decoder.close)

        def reference() -> Call:
            made = _reference(rig, pair)
            batches = loader(jpegs, 10**6, pair.pixels, rig.meter.cuda, BATCH, WORKERS)
            return lambda: made.step(next(batches))

        def ours(precisions: Precisions, compile: bool) -> Call:
            place = Path(folder) / f"{precisions[0]}-{compile}"
            shards = photos(place, JPEG, JPEGS, SHARDS)
            batches, close = our_loader(shards, decoder, BATCH, rig.device)
            stack.callback(close)
            made = Ours(pair, rig.device, precisions, BATCH if compile else 0)
            return lambda: made.step(next(batches))

        works = {"reference": _reference_work(rig, pair, reference)}
        works |= _ours(rig, pair, ours, BATCH)
        config = {**_config(rig), "jpeg": list(JPEG), "workers": WORKERS, "decodes": decodes}
        case = f"step, B={BATCH}, loader"
        compare(rig, case, works, config, "ours", rig.plan.long_rounds)


def _reference_resident(rig: Rig, pair: Pair) -> None:
    raw = draw_images(BATCH, pair.pixels, rig.device)

    def reference(sdpa: bool) -> Call:
        return partial(_reference(rig, pair, sdpa).step, normalised(raw, torch.float32))

    works = {"reference": _reference_work(rig, pair, partial(reference, False))}
    if rig.meter.cuda:  # on a CPU its step takes a minute
        works["reference-sdpa"] = _reference_work(rig, pair, partial(reference, True))
    works |= _ours_resident(rig, pair, raw)
    case = f"step, B={BATCH}, resident"
    compare(rig, case, works, _config(rig), "ours", rig.plan.long_rounds)


def _open_clip(rig: Rig, pair: Pair, batch: int) -> None:
    device, theirs = rig.device, peer_precisions(rig.device)
    raw = draw_images(batch, pair.pixels, device)

    def baseline(compile: bool) -> Call:
        dtypes = [DTYPES[precision] for precision in theirs]
        towers = [
            OpenClipTower(clip.visual, dtype, device)
            for clip, dtype in zip((pair.teacher, pair.student), dtypes, strict=True)
        ]
        made = Baseline(
            towers[0],
            pair.prompts.vision_KPC.to(device),
            OpenClipStudent(towers[1], student_of(pair, "fp32", CPU)),
            pair.w_ND.to(device),
            SCALE,
            KD_WEIGHT,
            compile,
        )
        return partial(made.step, normalised(raw, dtypes[1]))

    def distill_model() -> Call:
        made = DistillModel(pair.teacher, pair.student, device)
        tokens = pair.tokens_NL[torch.arange(batch) % len(pair.tokens_NL)].to(device)
        return partial(made.step, normalised(raw, torch.float32), tokens)

    works = _ours_resident(rig, pair, raw)
    for name in [name for name in works if name in ("ours", "ours-eager")]:
        make = partial(baseline, works[name].compiled)
        peer = name.replace("ours", "open_clip")
        works[peer] = works[name]._replace(make=make, precision=theirs[0])
    if why := why_no_distill_model():
        print(f"open_clip's --distill-model takes no part: {why}", flush=True)
    elif batch == rig.plan.steps[0] or rig.meter.cuda:
        # Forwards of both of the teacher's towers; forwards and whole backwards of the student's.
        whole = sum(
            factor * (gflops(clip.visual) + text_gflops(clip))
            for clip, factor in ((pair.teacher, 1), (pair.student, 3))
        )
        precision = "bf16" if rig.meter.cuda else "fp32"
        works["open_clip-distill"] = Work(distill_model, batch, whole, precision)
    rounds = rig.plan.rounds if batch == rig.plan.steps[0] else rig.plan.long_rounds
    compare(rig, f"step, B={batch}, against open_clip", works, _config(rig), "ours", rounds)


def _config(rig: Rig) -> dict[str, object]:
    teacher, student = rig.plan.pair
    return {
        "N": rig.plan.classes,
        "teacher": teacher,
        "student": student,
        "ours": "/".join(default_precisions(rig.device)),
        "open_clip": "/".join(peer_precisions(rig.device)),
        "flops": f"{FORWARD} + {BACKWARD}; of a text {TEXT}",
    }
