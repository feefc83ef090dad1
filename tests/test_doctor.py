"""engine.doctor and `promptkd doctor`: what is broken for real, and a healthy machine."""

import email.utils
import http.server
import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import sick
import torch
from servers import Answering, serving

from engine.config import CorpusConfig, StudentConfig, UserError
from engine.doctor import cluster, libraries, machine
from engine.doctor.apart import Check, Finding
from engine.doctor.checks import checks, examine
from jobs import cli
from jobs.doctor import AnyRun, row
from jobs.quickstart import HERE

ROOT = HERE.parents[1]
CLOSED = "127.0.0.1:1"  # where nothing listens
TEACHER, STUDENT = (f"local-dir:{HERE / 'models' / name}" for name in ("teacher", "student"))


def states(found: list[Finding]) -> list[tuple[str, str]]:
    return [(one.name, one.state) for one in found]


# ------------------------------------------------------------ apart


def test_a_check_that_crashes_is_a_finding_beside_what_it_has_found():
    first, lost = Check("native", sick.crashes, mend="another version").run()
    assert first == sick.FIRST
    assert lost == Finding("native", "fail", "the check died of SIGSEGV", "another version")


def test_a_check_that_hangs_is_ended_with_all_that_it_has_started(tmp_path):
    """It gets the time to start it, on a busy machine too."""
    told = {"pid": str(tmp_path / "pid")}
    first, lost = Check("slow", sick.hangs, told, timeout_s=4).run()
    assert first == sick.FIRST and lost.state == "fail" and "no answer in 4 s" in lost.found
    grandchild = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60  # it has been killed, and dies once it gets a processor
    while lives(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_check_that_raises_tells_its_last_line():
    found = Check("lib", sick.raises, mend="so").run()
    assert found == [sick.FIRST, Finding("lib", "fail", "broken", "so")]


def test_a_users_mistake_and_what_libraries_print():
    assert Check("x", sick.complains).run() == [Finding("x", "fail", "field: mend it so")]
    assert Check("x", sick.prints).run() == [sick.FIRST]


def test_what_rests_on_something_broken_is_not_tried():
    broken, told = Check("b", sick.complains), []
    rests = Check("rests", sick.crashes, needs=("a", "b"))
    alone = Check("alone", sick.prints, needs=("a",))
    found = list(examine([broken, rests, alone], told.append))
    assert states(found) == [("b", "fail"), ("rests", "skip"), ("first", "ok")]
    assert told == ["b", "alone"] and "first mend b" in found[1].found


# ------------------------------------------------------------ the machine


def test_another_kernels_is_found_before_and_behind_ours(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    check = Check("kernels", machine.kernels)
    (found,) = check.run()
    assert found.state in ("ok", "warn") and "ours" in found.found  # Hugging Face's may be there
    with monkeypatch.context() as behind:
        behind.setattr(sys, "path", [*sys.path, str(tmp_path)])
        (found,) = check.run()
        assert found.state == "warn" and "there is another" in found.found
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = check.run()
    assert found.state == "fail" and str(tmp_path / "kernels") in found.found and found.mend


def test_few_open_files_are_told_of_by_their_number():
    (few,) = Check("f", sick.few_files, {"most": 300}).run()
    assert few.state == "warn" and "300 in a process of Ray" in few.found
    assert "ulimit -n" in few.mend


def test_a_disk_that_cannot_be_written_to(tmp_path):
    """As root one may write anywhere but below a file."""
    (tmp_path / "file").write_text("")
    new = tmp_path / "to" / "be" / "made"
    good, bad = machine.disks({"runs_dir": str(new), "corpus.cache": str(tmp_path / "file" / "x")})
    assert good.state in ("ok", "warn") and "GB free" in good.found
    assert bad.state == "fail" and "corpus.cache" in bad.found and "Not a directory" in bad.found
    (full,) = Check("disk", sick.full_disk, {"folder": str(new)}).run()
    assert full.state == "fail" and "File too large" in full.found
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left


def test_little_shared_memory_says_how_to_get_more():
    (none,) = machine.shared_memory("/proc")
    assert none.state == "warn" and "--shm-size" in none.mend
    (missing,) = machine.shared_memory("/nowhere/shm")
    assert missing.state == "warn" and "No such file" in missing.found


def test_packages_that_are_not_as_pinned_are_named(tmp_path):
    pins = tmp_path / "constraints.txt"
    # A torch of 2.15.0+cpu is as pinned.
    pins.write_text(f"rich==0.0.1 ; python_version > '3'\ntorch=={torch.__version__}\nnowhere==1\n")
    (found,) = machine.packages(str(pins))
    assert found.state == "warn" and ", pinned 0.0.1" in found.found
    assert "torch" not in found.found and "nowhere" not in found.found


@pytest.mark.parametrize("ahead_s, state", [(0, "ok"), (3600, "warn"), (-3600, "warn")])
def test_the_clock_is_held_against_the_shard_servers(ahead_s, state):
    class Handler(Answering):
        def do_HEAD(self) -> None:
            self.answer(404)

        def date_time_string(self, timestamp=None) -> str:
            return email.utils.formatdate(time.time() + ahead_s, usegmt=True)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        url = f"http://127.0.0.1:{server.server_port}/train-{{00..09}}.tar"
        (found,) = machine.clock(url, ["127.0.0.1"])
        (refused,) = machine.clock(url, [])
    assert found.state == state, found
    assert refused.state == "skip" and "listed" in refused.found


def test_without_a_server_no_clock_is_compared():
    (alone,) = machine.clock("", [])
    (closed,) = machine.clock(f"http://{CLOSED}/a.tar", ["127.0.0.1"])
    assert alone.state == closed.state == "skip" and "Connection refused" in closed.found


# ------------------------------------------------------------ libraries, cluster, inputs


def test_a_gpu_that_is_asked_for_and_not_there():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    (asked,) = libraries.torch_("cuda")
    assert asked.state == "fail" and asked.mend
    if not libraries.has_gpu():
        (fine,) = libraries.torch_("auto")
        assert fine.state == "ok" and "no GPU" in fine.found
        assert states([*libraries.triton_("auto"), *libraries.gpus()]) == [
            ("Triton", "skip"),
            ("NVML", "skip"),
        ]


def test_a_library_that_cannot_be_loaded_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = Check("torch", libraries.torch_, {"device": "auto"}, mend="run make").run()
    assert found.state == "fail" and "No module named 'no_such_library'" in found.found
    assert found.mend == "run make"


def test_a_cluster_that_is_not_there_is_told_at_once():
    with pytest.raises(UserError, match=r"nothing answers at 127.0.0.1:1 \(Connection refused"):
        list(cluster.ray_(CLOSED))


def test_shards_sound_changed_and_unreachable(corpus_folder, tmp_path):
    changed = shutil.copytree(corpus_folder, tmp_path / "changed")
    shard = changed / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 64] = bytes(64)
    shard.write_bytes(data)
    common = {"block_samples": 10, "hosts": ["127.0.0.1"], "timeout_s": 5.0}
    told = [
        {"field": "corpus.shards", "where": str(corpus_folder), **common},
        {"field": "corpus.evaluation", "where": str(changed), **common},
        {"field": "x", "where": f"http://{CLOSED}/train-{{00..09}}.tar", **common},
    ]
    sound, damaged, unreachable = Check("corpus.shards", sick.corpora, {"told": told}).run()
    assert states([sound, damaged, unreachable]) == [
        ("corpus.shards", "ok"),
        ("corpus.evaluation", "warn"),
        ("corpus.shards", "fail"),
    ]
    assert "24 images in 3 shards" in sound.found
    assert "changed" in damaged.found and str(shard) in damaged.mend
    assert CLOSED in unreachable.found


def test_what_a_config_names_is_checked_and_nothing_else():
    def named(**fields) -> list[str]:
        config = run_of(**fields)
        return [check.name for check in checks(config, "run.json")]

    alone = named()
    assert {"Python", "torch", "Ray", "disk", "clock"} <= {*alone}
    assert not {"corpus.shards", "models", "run"} & {*alone}
    assert named(shards="a")[len(alone) :] == ["corpus.shards"]
    run = named(shards="a", evaluation="b", model="ViT-B-16")
    assert run[len(alone) :] == ["corpus.shards", "corpus.evaluation", "models", "run"]


def run_of(shards: str = "", evaluation: str = "", model: str = "") -> AnyRun:
    corpus = CorpusConfig(shards=shards, evaluation=evaluation)
    return AnyRun(corpus=corpus, student=StudentConfig(model=model))


# ------------------------------------------------------------ the command


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_row_fits_the_terminal(width):
    found = Finding("corpus.evaluation", "warn", "found " * 30 + "x" * 99, "mend " * 20)
    lines = list(row(found, width))
    assert max(map(len, lines)) <= width and len(lines) > 3
    told = " ".join("".join(lines).split())
    assert told.startswith("warn corpus.evaluation") and "-> mend mend" in told
    assert list(row(Finding("Ray", "ok", "2.60 starts"), width))[-1].endswith("2.60 starts")


def test_without_a_terminal_a_finding_is_one_line():
    (line,) = row(Finding("disk", "fail", "found " * 30, "mend it"), None)
    assert line.split()[:2] == ["fail", "disk"] and line.endswith("-> mend it")


def test_a_wrong_file_is_told_before_anything_is_checked(tmp_path, capsys):
    (tmp_path / "run.toml").write_text('[corpus]\nshard = "a"\n')
    assert cli.main(["doctor", str(tmp_path / "run.toml")]) == 2
    told = capsys.readouterr()
    assert "corpus.shard: there is no such field; is it corpus.shards?" in told.err
    assert told.out == ""


def doctor(*words: object) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "jobs.doctor", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_healthy_machine_and_run(corpus_folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("daisy\noak tree\ntulip\n")
    run = tmp_path / "run.toml"
    run.write_text(
        f'name = "a"\nruns_dir = "{tmp_path}/runs"\n[corpus]\nshards = "{corpus_folder}"\n'
        f'evaluation = "{corpus_folder}"\n[classes]\nnames = "{names}"\n'
        f'[teacher]\nmodel = "{TEACHER}"\n[student]\nmodel = "{STUDENT}"\ndepth = 2\n'
    )
    told = doctor(run, "--json")
    assert told.returncode == 0, told.stdout + told.stderr
    found = {one["name"]: one for one in json.loads(told.stdout)}
    needed = ("Python", "torch", "DALI (cpu)", "DeepSpeed", "Ray", "corpus.shards", "student")
    assert {found[name]["state"] for name in (*needed, "classes.names", "teacher", "run")} == {"ok"}
    assert not (tmp_path / "runs").exists()

    names.unlink()  # now the same, with something broken
    told = doctor(run, "--corpus.evaluation", tmp_path / "nowhere")
    lines = {line[6:].split("  ")[0].strip(): line for line in told.stdout.splitlines()}
    assert told.returncode == 1 and lines["DeepSpeed"].startswith("ok")
    assert lines["classes.names"].startswith("fail") and str(names) in lines["classes.names"]
    assert lines["corpus.evaluation"].startswith("fail")
    assert "first mend corpus.evaluation, classes.names" in lines["run"]
    assert told.stdout.splitlines()[-1] == "to be mended: corpus.evaluation, classes.names"
