"""What one GPU does, with its share of a node: as told, as a run has measured, or of a roofline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from engine.config import Range, Section, UserError
from engine.json_text import parse_object

__all__ = ["PEAK_TFLOPS", "Rates", "from_peak", "gathered", "label_bytes", "measured", "roofline"]

# Dense bf16, of the vendor's data sheets.
PEAK_TFLOPS = {"h100": 989.0, "a100": 312.0}
# Of an image: CLIP ViT-L/14 forward; ViT-B/16 with 4 prompts, forward and the gradient of its input
# (counted over linear layers, attention and patches; open_clip's own profile has 162.03 and 35.13).
TEACHER_GFLOP, STUDENT_GFLOP = 162.0, 73.0

Positive = Range(0, above=True)


@dataclass(frozen=True, kw_only=True)
class Rates(Section):
    """What one GPU does, and what it has of its node: an equal share of cores, link and disk. None:
    not known, and taken to bound nothing. Raises UserError for what no machine can have."""

    teacher: Annotated[
        float, Positive
    ]  # images/s that a teacher labels; the mean where GPUs differ
    student: Annotated[float, Positive]  # images/s that a student trains on
    decode: Annotated[float | None, Positive] = None  # images/s of one CPU core
    cores: Annotated[int, Range(1, 1024)] = 1  # that decode, of one GPU
    link_gbit_s: Annotated[float | None, Positive] = None  # of a node, each way
    disk_gb_s: Annotated[float | None, Positive] = None  # of a node: reads
    image_bytes: Annotated[float | None, Positive] = None  # encoded
    label_bytes: Annotated[float, Positive] = 1536.0  # of an image
    gpus_per_node: Annotated[int, Range(1, 1024)] = 8
    shared_cores: bool = False  # a device is CPU cores that decode too: all times add up

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.disk_gb_s and not self.image_bytes:
            raise UserError("image_bytes: disk_gb_s bounds nothing without the size of an image")
        if self.shared_cores and not self.decode:
            raise UserError("decode: shared_cores needs it, since decoding takes of the same cores")


def label_bytes(classes: int, width: int, precision: Literal["fp16", "int8"]) -> int:
    """Of one image's soft targets, as they are sent and stored; int8 has a step of 4 bytes."""
    values = min(classes, width)
    return 2 * values if precision == "fp16" else values + 4


def roofline(gpu: str, mfu: float) -> dict[str, float]:
    """Images/s of teacher and student at a fraction `mfu` of the dense bf16 peak: ViT-L/14 teaches
    ViT-B/16. An estimate: nothing is measured."""
    flops = PEAK_TFLOPS[gpu] * 1e3 * mfu
    return {"teacher": flops / TEACHER_GFLOP, "student": flops / STUDENT_GFLOP}


def measured(folder: Path) -> dict[str, float | bool]:
    """The fields of Rates that the run of a folder tells, by its summary.json and config.json.

    The teacher's from the seconds of all teachers' forwards. The student's from what is left of the
    training time after waits, which has checkpoints and collectives in it. Decoding's from the
    loader of rank 0. All are of a run that was not restarted. Raises UserError for a run that has
    not finished, or tells none.
    """
    summary, config = (_json(folder / name) for name in ("summary.json", "config.json"))
    try:
        found = _rates(summary, config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"from: {folder}: summary.json or config.json lacks {error}") from None
    if not found:
        raise UserError(f"from: {folder} tells no rate")
    return found


def gathered(
    told: Mapping[str, Any], sources: Sequence[tuple[str, Mapping[str, Any]]], per_label: float
) -> tuple[Rates, dict[str, str]]:
    """The rates of `sources`, each with what it is called, of which the last that tells one counts;
    what is `told` (None: it is not) before them all. And of each where it comes from, unless it was
    told. Raises UserError where one lacks."""
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, rates in sources:
        found |= rates
        origins |= dict.fromkeys(rates, origin)
    for name in {field.name for field in fields(Rates)} & told.keys():
        value = told[name]
        if value is not None and (value is not False or name not in found):
            found[name] = value
            origins.pop(name, None)
    for name in ("teacher", "student"):
        if name not in found:
            raise UserError(
                f"{name}: give images/s of a GPU, or --from a run that tells it, or --gpu"
            )
    return Rates(**{**found, "label_bytes": per_label}), origins


def from_peak(gpu: str, mfu: float) -> tuple[str, dict[str, float]]:
    """The rates of a roofline, and what they are called."""
    told = f"roofline, not measured: {mfu:g} of {PEAK_TFLOPS[gpu]:g} TFLOP/s of an {gpu.upper()}"
    return told, roofline(gpu, mfu)


def _rates(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float | bool]:
    """Of one run."""
    told: dict[str, float | bool] = {}
    workers, threads = config["student"]["workers"], config["student"]["threads"]
    labels, on_cpu = summary.get("labels") or {}, config["device"] == "cpu"
    source = labels.get("source", config["targets"]["source"])  # the one that "auto" chose
    # On a GPU, an inline teacher's clock sees launches alone, and its work is among the student's.
    seen = labels.get("forward_s", 0) > 0 and (on_cpu or source != "inline")
    if seen:
        told["teacher"] = labels["labelled"] / labels["forward_s"]
    if source != "inline" or seen:
        waits = summary["wait_fraction"]
        busy_s = workers * summary["train_s"] * (1 - waits["labels"] - waits["data"])
        if source == "inline":
            busy_s -= labels["forward_s"]
        if busy_s > 0:
            told["student"] = summary["samples"] / busy_s
    decode = summary["data"]["decode"]
    # Rank 0's share of a step, in as many steps as its loader, the latest, has decoded.
    images = summary["samples"] / summary["steps"] / workers * decode["laps"]
    if decode["s"] > 0 and images:
        told["decode"] = images / decode["s"] / threads
        told["image_bytes"] = decode["bytes"] / images
    if told and on_cpu:
        told["shared_cores"] = True
    return told


def _json(file: Path) -> dict[str, Any]:
    try:
        return parse_object(file.read_text())
    except FileNotFoundError:
        raise UserError(f"from: {file}: no such file; is its run finished?") from None
    except (ValueError, OSError) as error:
        raise UserError(f"from: {file}: cannot be read: {error}") from None
