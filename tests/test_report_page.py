"""The report of a run, and of several, as a browser shows them."""

import io
from pathlib import Path

import pytest
from PIL import Image
from run_folders import append, begun, probe, trained, write

from jobs import cli

CLASSES = (
    "<script>alert(1)</script>",
    "one word of great length: " + 300 * "x",
    *(f"class {number}" for number in range(30)),
)
STEPS = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory, corpus_folder) -> list[Path]:
    """Two runs over a small corpus, as they leave their folders, with all that they may tell."""
    runs = tmp_path_factory.mktemp("runs")
    return [run_folder(runs / name, corpus_folder) for name in ("first", 20 * "second")]


def run_folder(folder: Path, corpus: Path) -> Path:
    begun(folder, corpus, CLASSES)
    trained(folder, range(1, STEPS + 1))
    append(folder / "metrics.jsonl", {"time": 1.0, "kind": "notice", "text": 300 * "w"})
    scores = {"base": 91.67, "novel": 88.83, "hm": 90.23, "all": 80.08, "agreement": 77.33}
    summary = {"images_per_second": 286.4, "steps": STEPS, "samples": 14_400, "wall_s": 136.4}
    models = ("student_before", "student_after", "teacher")
    write(folder / "summary.json", summary | dict.fromkeys(models, scores))
    skipped = {"undecodable": 12, 80 * "reason": 1}
    ledger = {"seen": 14_413, "trained": 14_400, "skipped": skipped, "pending": 0}
    write(folder / "ledger.json", ledger)
    telemetry = folder / "telemetry"
    for number, reason in enumerate(skipped):
        told = {"kind": "skipped", "step": 3, "reason": reason, "shard": 0, "position": number}
        append(telemetry / "skipped-0.jsonl", told)
    classes = len(CLASSES)
    for step in range(1, STEPS + 1):
        samples = [
            (number % 2, number, step % classes, 0.9, (step + number) % classes, 0.8, 0.3 * number)
            for number in range(8)
        ]
        append(telemetry / "probes.jsonl", probe(step, *samples))
    span = {"host": 60 * "h", "span_s": 10.0, "gpu_utilisation": 0.8, "gpu_power_w": 300.0}
    busy = {"read_s": 0.5, "decode_s": 2.0, "forward_s": 8.0, "write_s": 0.1}
    for number in range(1, 5):
        span["time"] = 1_795_305_600.0 + 10 * number
        append(telemetry / "worker-0.jsonl", span | {"rank": 0, "labels_s": 1.0, "data_s": 0.5})
        append(telemetry / "teachers.jsonl", span | {"teacher": str(number % 2), **busy})
    return folder


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("count", [1, 2])
def test_the_report_looks_right(browser, folders, artefacts, tmp_path, capsys, count, width):
    """No error, no request, nothing beyond the edge; the picture is kept for who wants to look."""
    page = tmp_path / "page.html"
    assert cli.main(["report", *map(str, folders[:count]), "--out", str(page)]) == 0
    seen = browser.look(page, width)
    picture = artefacts / f"report-of-{count}-{width}.png"
    picture.write_bytes(seen.screenshot)
    assert seen.errors == [], picture
    assert seen.requests == [], picture
    assert seen.width == width and seen.page_width <= width, picture
    shot = Image.open(io.BytesIO(seen.screenshot)).convert("RGB")
    pixels = shot.width * shot.height
    assert shot.width == width and shot.height > 900, picture
    assert max(number for number, _ in shot.getcolors(pixels)) < 0.99 * pixels, f"{picture}: blank"
