"""The benchmark suite: what it runs, leaves out and says, over scripts made here."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import suite
from suite import Step, absent, medians, run_all
from test_report_bench import NEW, OLD, row, write

ROOT = Path(__file__).parents[1]
# What a GPU box may not have: the suite's benches for it must load without.
BARE = ("ray", "nvidia.dali", "tyro", "liger_kernel", "spdl", "matplotlib")


@pytest.fixture
def script(tmp_path):
    """script(name, text): a script in tmp_path, and how the suite is to run it."""

    def made(name: str, text: str, limit_s: float = 60, needs: tuple[str, ...] = ()) -> Step:
        (tmp_path / name).write_text(text)
        return Step((name,), limit_s, needs)

    return made


def test_a_script_that_fails_is_told_of_and_the_next_one_runs(script, tmp_path):
    steps = [
        script("bad.py", "raise SystemExit(3)"),
        script("good.py", f"import engine.config; open({str(tmp_path / 'ran')!r}, 'w')"),
        Step(("absent.py",), 60),
        script("far.py", "", needs=("no_such_package",)),
    ]
    done = run_all(steps, 1000, tmp_path)
    assert [(one.what, one.why) for one in done] == [
        ("failed", "exit code 3"),
        ("ran", ""),
        ("left out", "there is no such script"),
        ("left out", "no_such_package not installed"),
    ]
    assert (tmp_path / "ran").exists(), "engine is found without being installed"


def test_a_script_that_takes_too_long_is_ended_with_what_it_has_started(script, tmp_path):
    text = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[0]).with_suffix(".pid").write_text(str(child.pid))
time.sleep(600)
"""
    (done,) = run_all([script("slow.py", text, limit_s=10)], 1000, tmp_path)
    assert (done.what, done.why) == ("failed", "took longer than 10 s")
    child = Path("/proc", (tmp_path / "slow.pid").read_text())
    deadline = time.monotonic() + 30
    while child.exists() and "Z" not in (child / "stat").read_text().rsplit(")", 1)[1].split()[0]:
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.1)


def test_what_there_is_no_time_for_is_left_out(script, tmp_path):
    (done,) = run_all([script("good.py", "")], suite.GRACE_S + suite.LEAST_S - 1, tmp_path)
    assert (done.what, done.why) == ("left out", "no time is left")


def test_the_limits_fit_into_the_time_in_all():
    for total_s, most_s, steps in ((suite.CPU_S, 1200, suite.CPU), (suite.GPU_S, 540, suite.GPU)):
        assert sum(step.limit_s for step in steps) + suite.GRACE_S <= total_s <= most_s
        for step in steps:
            assert "--quick" not in step.words, "its rows tell nothing"


def test_a_package_of_an_absent_one_is_absent():
    assert absent(("json", "no_such.part", "no_such", "os.path")) == ["no_such.part", "no_such"]


def test_the_table_holds_the_newest_medians_of_this_suite(tmp_path):
    write(
        tmp_path / "engine.csv",
        row(date=OLD, case="store"),
        row(p50=0.9712, metric="inline_over_serial", unit="1"),
        row(p50=2525.4),
        row(metric="longest_gaps", unit="ms"),
    )
    assert medians(tmp_path, since=NEW)[1:] == [
        ["engine", "inline", "ours", "inline_over_serial", "0.9712"],
        ["engine", "inline", "ours", "images_per_second", "2525 1/s"],
    ]


def test_the_gpu_benches_load_without_what_a_gpu_box_may_lack():
    names = [Path(step.words[0]).stem for step in suite.GPU]
    there = [name for name in names if (ROOT / "benchmarks" / f"{name}.py").exists()]
    assert len(there) >= 3
    program = f"""
import importlib, sys
sys.modules |= dict.fromkeys({BARE!r})
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
for name in {there!r}:
    importlib.import_module(name)
import engine.train.student, engine.train.worker
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_without_a_gpu_the_gpu_suite_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    told = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "suite.py"), "--gpu"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 1 and "torch sees no GPU here; nothing is measured" in told.stderr
