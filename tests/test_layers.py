"""The floors of the house, read off the imports: never back up, and a library in its own place."""

import ast
import sys
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("engine.durable", "engine.imports", "engine.live"),
    (
        "engine.config",
        "engine.telemetry",
        "engine.progress",
        "engine.tensor_files",
        "engine.json_text",
        "kernels",
    ),
    ("engine.storage",),
    ("engine.data", "engine.lease", "engine.parse"),
    ("engine.clip",),  # a bundle predicts on images, which it has decoded
    ("engine.labels",),
    ("engine.train",),
    ("engine.",),  # the driver: whatever else lies in engine/ itself
    ("jobs",),
)
PLACES = {
    "open_clip": (
        "engine/clip/towers.py",
        "engine/clip/layers.py",
        "engine/clip/text.py",
        "engine/clip/weights.py",
        "engine/clip/templates.py",
        "engine/clip/export.py",
        "engine/clip/promptkd_student.py",
        "jobs/quickstart/pretrain.py",
    ),
    "onnxruntime": ("engine/clip/export.py",),
    "deepspeed": ("engine/train/student.py", "engine/doctor/libraries.py"),
    "nvidia": ("engine/data/dali.py", "engine/data/decode.py"),
    "webdataset": ("engine/data/shards.py", "engine/data/index.py"),
    "fsspec": (
        "engine/storage/ranges.py",
        "engine/storage/web.py",
        "engine/storage/bucket.py",
        "engine/storage/folder.py",
    ),
    "aiohttp": ("engine/storage/web.py", "engine/ray_jobs.py"),
    "yarl": ("engine/storage/web.py",),
    "tyro": ("engine/parse.py",),
    "rich": ("engine/progress.py", "engine/live.py"),
    "matplotlib": ("engine/plots.py",),
    "jinja2": ("engine/report/page.py",),
    "markupsafe": ("engine/report/svg.py", "engine/report/charts.py", "engine/report/page.py"),
    "psutil": ("engine/train/gang.py",),
    "pynvml": ("engine/telemetry.py", "engine/doctor/libraries.py"),
    "tensorboardX": ("engine/track/tensorboard.py",),
    "wandb": ("engine/track/services.py",),
    "trackio": ("engine/track/services.py",),
    "mlflow": ("engine/track/services.py",),
    "ray": (
        "engine/labels/pool.py",
        "engine/labels/scaling.py",
        "engine/labels/stream.py",
        "engine/train/gang.py",
        "engine/run.py",
        "engine/cluster.py",
        "engine/index.py",
        "engine/track/ray_metrics.py",
        "engine/ray_jobs.py",
        "engine/doctor/cluster.py",
    ),
}
OURS = ("engine", "kernels", "jobs")
SOURCES = {
    path.relative_to(ROOT): ast.parse(path.read_text())
    for folder in OURS
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(source: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(SOURCES[source]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = source.parts[: -node.level] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from engine.train import checkpoint` imports a module of a package.
            found |= {f"{base}.{a.name}" if base in OURS_PACKAGES else base for a in node.names}
    return found


OURS_PACKAGES = {".".join(path.parent.parts) for path in SOURCES}


def room(module: str) -> tuple[int, str]:
    """Floor of one of our modules, and the package or module there that it belongs to."""
    return next(
        (number, name)
        for number, floor in enumerate(FLOORS)
        for name in floor
        if f"{module}.".startswith(name)
    )


def test_nothing_is_imported_from_above_or_next_door():
    assert len(SOURCES) > 30
    wrong = []
    for source in SOURCES:
        here = room(".".join(source.with_suffix("").parts))
        for module in imports(source):
            if module.split(".")[0] in OURS:
                there = room(module)
                if there[0] > here[0] or (there[0] == here[0] and there[1] != here[1]):
                    wrong.append(f"{source} imports {module}")
    assert wrong == []


def test_a_library_is_imported_in_its_own_place_alone():
    used, wrong = set(), []
    for source in SOURCES:
        for library in {module.split(".")[0] for module in imports(source)} & PLACES.keys():
            used.add(library)
            if not any(fnmatchcase(str(source), place) for place in PLACES[library]):
                wrong.append(f"{source} imports {library}")
    assert wrong == [] and used == PLACES.keys()


def test_kernels_know_torch_and_triton_alone():
    known = {"torch", "triton", "kernels", *sys.stdlib_module_names}
    for source in SOURCES:
        if source.parts[0] == "kernels":
            assert {module.split(".")[0] for module in imports(source)} <= known
