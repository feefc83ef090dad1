"""The benchmarks that fit in a given time, one after the other.

`python benchmarks/suite.py` on CPUs, at most 20 minutes (`make bench`); `--gpu` on one GPU, at most
9 (`make bench-gpu`). Each script is a process with a time limit of its own. What ran, what was left
out and why is told at the end, with a table of the newest medians; the exit code is 1 if a script
failed or ran out of time. Rows that it had added by then stay.

A GPU box without network needs no virtual environment: any Python that has torch, Triton,
torchvision, numpy, pillow, pyarrow, xxhash, fsspec, aiohttp, psutil, rich, safetensors and
nvidia-ml-py will do, with open_clip_torch, webdataset and deepspeed (and ftfy, braceexpand, hjson,
py-cpuinfo, which they need) from a folder of wheels:

    python3 -m pip install --no-index --no-deps --target /tmp/site WHEELS/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/suite.py --gpu

or the same by `PYTHONPATH=/tmp/site make bench-gpu BENCH_PYTHON=python3`. Ray is not used there.
DALI, TurboJPEG (the package turbojpeg), Liger, SPDL and matplotlib are used where they are
installed; where one is absent it is said so, and the rest goes on.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a plain checkout is not installed

from engine.config import UserError  # noqa: E402
from engine.report.bench import Row, aligned, newest, read  # noqa: E402

OPTIONAL = ("ray", "nvidia.dali", "turbojpeg", "liger_kernel", "spdl", "matplotlib")
LEAST_S = 20.0  # in which a script can do something
GRACE_S = 10.0  # to end, once it is told to


class Step(NamedTuple):
    """A script with its arguments, and the time that it may take."""

    words: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()  # packages without which it is left out


class Done(NamedTuple):
    step: Step
    what: str  # ran, failed or left out
    why: str
    took_s: float


CPU_S, GPU_S = 20 * 60, 9 * 60
# The most telling first, should time run out. What takes longer is run by itself: see README.md.
CPU = (
    Step(("bench_engine.py",), 150),
    Step(("bench_towers.py", "--short"), 560),
    Step(("bench_kernels.py", "--short"), 80),
    Step(("bench_loader.py", "--short"), 70),
    Step(("bench_labels.py", "--only", "overlap", "--rounds", "1"), 330, ("ray",)),
)
GPU = (
    Step(("bench_towers.py", "--short", "--only", "open_clip"), 150),
    Step(("bench_engine.py",), 160),
    Step(("bench_towers.py", "--short", "--only", "teacher"), 120),
    Step(("bench_kernels.py", "--short"), 60),
    Step(("bench_loader.py", "--short"), 40),
)
SHOWN = {  # of benches with many metrics, those for the table at the end
    "engine": ("images_per_second", "gpu_busy"),
    "towers": ("images_per_second", "share"),
    "kernels": ("time",),
    "loader": ("images_per_second",),
    "labels": ("images_per_second",),
}
RATIO = "_over_"  # in the name of a metric that compares: shown too


def absent(packages: Iterable[str]) -> list[str]:
    """Those that cannot be imported."""
    return [package for package in packages if not _found(package)]


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the package that it is in is absent
        return False


def run_all(steps: Sequence[Step], total_s: float, folder: Path = HERE) -> list[Done]:
    """Runs the scripts of a folder, for no longer than that in all."""
    end = time.monotonic() + total_s
    done = []
    for step in steps:
        left_s = end - time.monotonic() - GRACE_S
        missing = absent(step.needs)
        if not (folder / step.words[0]).exists():
            done.append(Done(step, "left out", "there is no such script", 0.0))
        elif missing:
            done.append(Done(step, "left out", f"{', '.join(missing)} not installed", 0.0))
        elif left_s < LEAST_S:
            done.append(Done(step, "left out", "no time is left", 0.0))
        else:
            done.append(_run(step, min(step.limit_s, left_s), folder))
    return done


def _run(step: Step, limit_s: float, folder: Path) -> Done:
    print(f"\n== {' '.join(step.words)} (at most {limit_s:.0f} s)", flush=True)
    paths = (str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    began = time.monotonic()
    words = [sys.executable, str(folder / step.words[0]), *step.words[1:]]
    # With a group of its own, so that its workers end with it.
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    try:
        code = process.wait(limit_s)
        why = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        code, why = 1, f"took longer than {limit_s:.0f} s"
    finally:
        _end(process)
    return Done(step, "failed" if code else "ran", why, time.monotonic() - began)


def _end(process: subprocess.Popen) -> None:
    """It and all that it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def medians(results: Path, since: str) -> list[list[str]]:
    """Lines of a table: the rows since a minute (UTC, as rows tell it) that are to be shown."""
    rows = [row for file in sorted(results.glob("*.csv")) for row in newest(read(file))]
    return [["bench", "case", "provider", "metric", "median"]] + [
        [row.bench, row.case, row.provider, row.metric, _median(row)]
        for row in rows
        if row.date >= since
        and (RATIO in row.metric or row.metric in SHOWN.get(row.bench, (row.metric,)))
    ]


def _median(row: Row) -> str:
    return f"{row.p50:.4g}" if row.unit == "1" else f"{row.p50:.4g} {row.unit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gpu", action="store_true")
    asked = parser.parse_args()
    if asked.gpu:
        import torch

        if not torch.cuda.is_available():
            sys.exit("suite: --gpu: torch sees no GPU here; nothing is measured")
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for package in absent(OPTIONAL):
        print(f"{package} is absent: what needs it is left out")
    since, began = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M"), time.monotonic()
    done = run_all(*((GPU, GPU_S) if asked.gpu else (CPU, CPU_S)))
    print(f"\n{'script':<52}{'s':>6}")
    for one in done:
        why = f": {one.why}" if one.why else ""
        print(f"{' '.join(one.step.words):<52}{one.took_s:>6.0f}  {one.what}{why}")
    print(f"{'in all':<52}{time.monotonic() - began:>6.0f}\n", flush=True)
    try:
        print("\n".join(aligned(medians(HERE / "results", since))))
    except UserError as error:
        sys.exit(f"suite: {error}")
    if any(one.what == "failed" for one in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
