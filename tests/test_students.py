"""Several students, and several teachers, in whole runs on a real local Ray."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from domains import config_of, losses, write_domain
from safetensors.torch import load_file, save_file
from tiny import clip_folder

from engine.clip.class_vectors import encode_classes
from engine.clip.towers import load_clip
from engine.config import RunFailed, UserError, to_dict
from engine.run import distill
from engine.train import checkpoint
from jobs import cli
from jobs.quickstart import HERE
from jobs.quickstart.domain import CLASSES

SAMPLES, HELD_OUT = 4 * len(CLASSES), 2 * len(CLASSES)
TEACHER = HERE / "models" / "teacher"


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    return write_domain(tmp_path_factory.mktemp("domain"))


def written(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def told_by(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def run_file(domain: Path, runs: Path, name: str, *flags: str) -> str:
    """Of a run, to be completed by students' files."""
    config = to_dict(config_of(domain, runs, name, *flags))
    return written(runs / f"{name}.json", json.dumps(config))


def other_clip(folder: Path, pixels: int) -> str:
    return clip_folder(folder, seed=3, text={"context_length": 40}, image_size=pixels)


@pytest.fixture(scope="module")
def pair(domain, local_ray, tmp_path_factory) -> Path:
    """The folder of a run of two students, that recorded its labels in `store`."""
    folder = tmp_path_factory.mktemp("pair")
    wide = written(folder / "wide.toml", "[student]\ndepth = 3\n[train]\nlr = 1e-3\nbatch = 64\n")
    brief = written(folder / "brief.toml", "[train]\npasses = 1\nviews = 1\n")
    run = run_file(domain, folder, "pair", "--targets.store", str(folder / "store"))
    assert cli.main(["distill", run, "--students", wide, brief]) == 0
    return folder


@pytest.mark.ray
def test_students_share_labels_that_are_made_once(pair):
    wide, brief = (told_by(pair / "pair" / name, "summary") for name in ("wide", "brief"))
    assert (wide["steps"], brief["steps"]) == (2 * SAMPLES // 64, SAMPLES // 32)
    for name, passes in (("wide", 2), ("brief", 1)):
        folder = pair / "pair" / name
        assert told_by(folder, "ledger") == {
            "seen": passes * SAMPLES,
            "trained": passes * (SAMPLES - 1),
            "skipped": {"undecodable": passes},
            "pending": 0,
        }
        assert list((folder / "checkpoints").iterdir()) and (folder / "bundle.safetensors").exists()
        assert told_by(folder, "config")["name"] == name
    last = max(wide["labels"]["labelled"], brief["labels"]["labelled"])
    assert last == 2 * SAMPLES + HELD_OUT
    assert wide["labels"]["source"] == "stream" and wide["labels"]["teachers"] == 1
    # What one has asked for, the other gets from the teacher's memory, or the store.
    asked = sum(told["labels"]["asked"] for told in (wide, brief))
    assert asked + wide["labels"]["from_store"] + brief["labels"]["from_store"] == (
        3 * (SAMPLES - 1) + 2 * HELD_OUT
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_with_all_labels_recorded_starts_no_teacher(pair, domain, tmp_path, capsys):
    flags = ["--targets.store", str(pair / "store"), "--teacher.actors", "2"]
    config = config_of(domain, tmp_path, "again", *flags)
    labels = distill(config)["labels"]
    assert labels["source"] == "store" and "teachers" not in labels
    assert labels["asked"] == 0 and labels["from_store"] == 2 * (SAMPLES - 1) + HELD_OUT
    said = capsys.readouterr().err
    assert "labels: store, all labels are recorded" in said and "100 % of the teacher's" in said


@pytest.mark.ray
def test_a_store_of_other_labels_is_refused_before_a_run_folder_is_made(pair, domain, tmp_path):
    def complaint(*flags: str) -> str:
        config = config_of(domain, tmp_path, "x", "--targets.store", str(pair / "store"), *flags)
        with pytest.raises(UserError, match=r"^targets\.store: ") as error:
            distill(config)
        assert not config.folder.exists()
        return str(error.value)

    other = other_clip(tmp_path / "clip", 64)
    assert "teachers: " in complaint("--teacher.model", other)
    names = written(tmp_path / "names.txt", "\n".join(["newt", *CLASSES[1:]]) + "\n")
    told = complaint("--classes.names", names)
    assert "class_names: 48 here, 48 there; line 1 is newt here, red circle there" in told
    assert "seed: 5 here, 1 there" in complaint("--seed", "5")


@pytest.mark.slow
@pytest.mark.ray
def test_one_student_that_fails_disturbs_no_other(domain, local_ray, tmp_path, capsys):
    """Though both learn from the same two teachers, whose images differ in size."""
    model = other_clip(tmp_path / "clip", 24)
    second = written(tmp_path / "second.toml", f'[teacher]\nmodel = "{model}"\nweight = 0.5\n')
    good = written(tmp_path / "good.toml", "[student]\ndepth = 2\n")
    wild = '[train]\noptimizer = "sgd"\nlr = 1e30\nrollbacks = 0\npasses = 3\nviews = 2\n'
    lost = written(tmp_path / "lost.toml", wild)
    flags = ["--teachers", second, "--targets.precision", "int8"]
    run = run_file(domain, tmp_path, "team", *flags)
    assert cli.main(["distill", run, "--students", good, lost]) == 1
    said = capsys.readouterr()
    assert "student lost failed: the student has collapsed" in said.err
    assert "student good" in said.out and "sizes" not in said.err
    summary = told_by(tmp_path / "team" / "good", "summary")
    assert summary["samples"] == 2 * (SAMPLES - 1)
    assert 0 < summary["teacher"]["hm"] < 100 and summary["teacher"]["agreement"] == 100
    labels = summary["labels"]
    images = 2 * SAMPLES + HELD_OUT
    assert labels["received"] == images
    assert labels["received_bytes"] == images * (48 + 4)  # int8 logits, and a step
    assert 0 < labels["lost_kl_sum"] / images < 0.01
    assert told_by(tmp_path / "team" / "lost", "ledger")["pending"] > 0
    assert not (tmp_path / "team" / "lost" / "summary.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_teacher_of_no_numbers_stops_a_run_before_it_learns(domain, local_ray, tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in TEACHER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.ln_post.bias"][0] = float("nan")
    save_file(state, folder / "open_clip_model.safetensors")
    flags = ["--teacher.model", f"local-dir:{folder}", "--targets.source", "stream"]
    config = config_of(domain, tmp_path, "nan", *flags, "--train.max_failures", "0")
    with pytest.raises(RunFailed, match=r"label of .* is not finite: stopped before it is trained"):
        distill(config)
    assert losses(config.folder) == []
    ledger = told_by(config.folder, "ledger")
    assert ledger == {"seen": 384, "trained": 0, "skipped": {}, "pending": 384}


def test_mistakes_in_students_and_teachers_are_told_before_a_run(domain, tmp_path, capsys):
    run = run_file(domain, tmp_path, "bad")
    (tmp_path / "other").mkdir()
    one = written(tmp_path / "one.toml", "[train]\nlr = 1e-3\n")
    same = written(tmp_path / "other" / "one.toml", "[train]\nlr = 1e-2\n")
    blocks = written(tmp_path / "blocks.toml", "[corpus]\nblock_samples = 16\n")
    teacher = written(tmp_path / "teacher.toml", "[teacher]\nbatch = 7\n")
    seed = written(tmp_path / "seed.toml", "seed = 2\n")
    crop = written(tmp_path / "crop.toml", "[train]\ncrop_scale = 0.5\n")

    def complaint(*words: str) -> str:
        assert cli.main(["distill", run, *words]) == 2
        assert not (tmp_path / "bad").exists()
        return capsys.readouterr().err

    assert "students: two files are named one" in complaint("--students", one, same)
    for file, field in (
        (blocks, "corpus.block_samples"),
        (teacher, "teacher.batch"),
        (seed, "corpus.view_seed"),
        (crop, "train.crop_scale"),
    ):
        told = complaint("--students", one, file)
        assert f"students: {field} must be the same for all" in told and Path(file).stem in told
    third = written(tmp_path / "third.toml", "[student]\ndepth = 1\n")
    inline = complaint("--students", one, third, "--targets.source", "inline")
    assert "several students share teachers; inline does not" in inline
    assert "several students have a seed each" in complaint("--students", one, "--seeds", "1,2")
    assert "nowhere.toml: no such file" in complaint("--students", "nowhere.toml")

    model = other_clip(tmp_path / "clip", 24)
    small = written(tmp_path / "small.toml", f'[teacher]\nmodel = "{model}"\n')
    told = complaint("--teachers", small, "--targets.source", "inline")
    assert "inline needs teachers and student to take images of one size" in told
    vectors = tmp_path / "vectors.safetensors"
    encode_classes(load_clip(model, "", "teacher."), ("a", "b"), ("{}",)).save(vectors)
    text = f'[teacher]\nmodel = "{model}"\n[classes]\nvectors = "{vectors}"\n'
    told = complaint("--teachers", written(tmp_path / "few.toml", text))
    assert "few.toml" in told and "48 names, 2 vectors" in told
    names = written(
        tmp_path / "names.toml", f'[teacher]\nmodel = "{model}"\n[classes]\nnames="a"\n'
    )
    assert "only vectors and template are a teacher's own" in complaint("--teachers", names)


def test_students_files_come_after_the_run_s_own_and_before_the_flags(domain, tmp_path, capsys):
    """Wherever they are named; their folders are below the run's."""
    one = written(tmp_path / "one.toml", "[train]\nlr = 1e-3\nbatch = 64\n[student]\ndepth = 1\n")
    run = written(
        tmp_path / "run.toml", f'name = "n"\nstudents = ["{one}"]\n[train]\nlr = 1.0\npasses = 7\n'
    )
    for words in (["--train.batch", "4", run], [run, "--train.batch", "4", "--students", one]):
        assert cli.main(["distill", *words, "--dry_run"]) == 0
        (told,) = json.loads(capsys.readouterr().out).values()
        assert told["train"]["lr"] == 1e-3 and told["train"]["batch"] == 4
        assert told["train"]["passes"] == 7 and told["student"]["depth"] == 1
        assert (told["name"], told["runs_dir"]) == ("one", "runs/n")


@pytest.mark.ray
@pytest.mark.slow
def test_several_teachers_inside_a_student_are_those_of_the_stream(domain, local_ray, tmp_path):
    model = other_clip(tmp_path / "clip", 64)
    second = written(tmp_path / "second.toml", f'[teacher]\nmodel = "{model}"\nweight = 0.5\n')
    for source in ("inline", "stream"):
        flags = ["--teachers", second, "--targets.source", source]
        told = distill(config_of(domain, tmp_path, source, *flags))
        assert told["labels"]["source"] == source
    inline, streamed = (losses(tmp_path / source) for source in ("inline", "stream"))
    assert streamed == pytest.approx(inline, rel=2e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_teachers_that_are_killed_and_stopped_change_nothing(domain, local_ray, tmp_path):
    flags = ["--targets.source", "stream", "--train.passes", "8"]
    calm = config_of(domain, tmp_path, "calm", *flags)
    distill(calm)
    upset = config_of(domain, tmp_path, "upset", *flags, "--teacher.actors", "2")
    disturber = threading.Thread(target=disturb, args=(upset.folder,))
    disturber.start()
    summary = distill(upset)
    disturber.join()
    assert told_by(upset.folder, "ledger") == told_by(calm.folder, "ledger")
    assert losses(upset.folder) == pytest.approx(losses(calm.folder), rel=1e-5)
    assert summary["labels"]["received"] >= 8 * SAMPLES


def teachers_here() -> list[psutil.Process]:
    """Teacher actors that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [one for one in children if any("TeacherActor" in word for word in one.cmdline())]


def disturb(folder: Path) -> None:
    """Stops one teacher for a while and kills the other, once students learn; and again."""
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not losses(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    one, *others = teachers_here()
    os.kill(one.pid, signal.SIGSTOP)
    for other in others:
        os.kill(other.pid, signal.SIGKILL)
    time.sleep(3)
    os.kill(one.pid, signal.SIGCONT)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_a_run_of_several_students(domain, tmp_path):
    run = run_file(domain, tmp_path, "stopped", "--train.passes", "500")
    one, two = (written(tmp_path / f"{n}.toml", f"[student]\ndepth = {n}\n") for n in (1, 2))
    command = [sys.executable, "-m", "jobs.cli", "distill", run, "--students", one, two]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folders = [tmp_path / "stopped" / name for name in "12"]
    deadline = time.monotonic() + 180
    while not all((folder / "metrics.jsonl").exists() and losses(folder) for folder in folders):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "ended by Ctrl-C after step" in told
    for folder in folders:
        saved = checkpoint.load_latest(folder / "checkpoints")
        assert saved and saved.step == len(losses(folder)), "no step is lost"
        assert told_by(folder, "ledger")["pending"] > 0
