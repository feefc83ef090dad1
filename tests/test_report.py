"""Pages of runs: what they say is what the folder says, and nothing in them is anybody's code."""

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from pages import Page
from run_folders import START, append, begun, probe, trained, write
from tars import write_tar

from engine import durable
from engine.closing import close_run
from engine.config import Drained, RunConfig, RunFailed, UserError, to_dict
from engine.parse import parse
from engine.report import again, page
from engine.report.facts import read_facts
from engine.report.svg import Curve, lines, si, ticks
from jobs import cli

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %} &amp; ]]> \u202e 🦜 \x00",
    "x" * 5000,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, encoded, index) -> Path:
    """Six samples, with keys that are hostile, too."""
    folder = tmp_path_factory.mktemp("corpus")
    keys = ["<script>alert(2)<_script>", "a'b\"c", "🦜", "d" * 90, "e", "f"]
    members = [(f"{key}.jpg", encoded(60 + n, 40, n)) for n, key in enumerate(keys)]
    write_tar(folder / "0.tar", members)
    return index(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> Path:
    """The folder of a run that has ended, of hostile names."""
    folder = begun(tmp_path_factory.mktemp("runs") / "<b>run", corpus, HOSTILE)
    trained(folder, range(1, 21))
    scores = {"base": 91.67, "novel": 88.83, "hm": 90.23, "all": 80.08, "agreement": 77.31}
    summary = {"images_per_second": 286.4, "steps": 20, "samples": 14_400, "wall_s": 136.4}
    summary |= dict.fromkeys(("student_before", "teacher"), scores)
    write(folder / "summary.json", summary | {"student_after": scores | {"hm": 90.77}})
    skipped = {HOSTILE[0]: 3, "undecodable": 10}
    ledger = {"seen": 14_413, "trained": 14_400, "skipped": skipped, "pending": 0}
    write(folder / "ledger.json", ledger)
    telemetry = folder / "telemetry"
    told = {"kind": "skipped", "step": 3, "shard": 0, "reason": HOSTILE[0]}
    append(telemetry / "skipped-0.jsonl", told | {"position": 1}, told | {"position": 77})
    samples = [(0, n, n % 4, 0.9, (n + 1) % 4, 0.8, 0.1 * n) for n in range(6)]
    append(telemetry / "probes.jsonl", probe(20, *samples))
    host = {"host": HOSTILE[1], "rank": HOSTILE[2], "span_s": 10.0, "time": START + 10}
    append(telemetry / "worker-0.jsonl", host | {"labels_s": 1.0, "data_s": 2.0})
    busy = {"read_s": 1.0, "decode_s": 3.0, "forward_s": 9.0, "write_s": 0.1}
    append(telemetry / "teachers.jsonl", host | {"teacher": HOSTILE[0], **busy})
    append(folder / "metrics.jsonl", {"time": 1.0, "kind": "notice", "text": HOSTILE[1]})
    return folder


@pytest.fixture(scope="module")
def seen(whole) -> Page:
    return Page.of(page.write(whole))


def test_the_page_says_what_the_folder_says(seen):
    text = seen.text
    for told in ("286", "90.77 %", "+0.54 on zero-shot", "77.31 %", "2 min 16 s", "14,400"):
        assert told in text, told
    assert "reaches a harmonic mean of 90.77 % (zero-shot 90.23, its teacher 90.23)" in text
    assert "trained 14,400 99.91 %" in text and "undecodable 10 0.07 %" in text
    assert "seen 14,413" in text
    assert "Students worked 70 % of the time, waited 10 % for labels and 20 % for images" in text
    assert "PromptKD, published 86.96 80.73 83.73" in text, "the paper's mean"
    assert "torch 2.15.0" in text
    assert seen.csp() == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_of_others_are_shown_and_do_nothing(seen, whole):
    raw = (whole / "report.html").read_text()
    assert "<script" not in raw and "<img src=x" not in raw and "<b>run" not in raw
    for name in HOSTILE[:2]:
        assert name in seen.text or name in " ".join(seen.texts)
    assert "{{ 7 * 7 }} {% raw %} &amp; ]]>" in seen.text and "🦜" in seen.text
    assert any("<script>alert(2)<_script>" in told for told in seen.attributes)
    assert [told for tag, told in seen.tags if tag == "title"] != []


def test_pictures_are_in_the_page_and_small(seen):
    assert len(seen.pictures) == 7, "six of disagreements, one that was skipped"
    assert "not in the corpus any more" in seen.text
    assert all(len(picture) < 8000 for picture in seen.pictures)


def test_a_corpus_that_is_gone_costs_the_pictures(whole, tmp_path, corpus):
    folder = begun(tmp_path / "moved", tmp_path / "nowhere")
    (folder / "telemetry").mkdir()
    for file in ("telemetry/probes.jsonl", "telemetry/skipped-0.jsonl"):
        (folder / file).write_bytes((whole / file).read_bytes())
    found = Page.of(page.write(folder))
    assert found.pictures == [] and "No pictures below: corpus.shards: " in found.text
    assert "nowhere" in found.text and "daisy" in found.text
    (found,) = (Page(page.page(read_facts(whole), pictures="none")),)
    assert found.pictures == [] and "`promptkd report` adds them" in found.text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    found = Page.of(page.write(begun(tmp_path / "young")))
    assert "Broken off before its first step" in found.text
    assert "No sample was probed." in found.text and "No step has been recorded." in found.text


@pytest.mark.parametrize(
    ("why", "state", "text"),
    [
        (RunFailed("the <disk> is full"), "failed", "Failed at step 3 of 20"),
        (Drained("by SIGTERM", 143), "drained", "Drained at step 3 of 20"),
        (KeyboardInterrupt(), "interrupted", "Interrupted at step 3 of 20"),
    ],
)
def test_however_a_run_ends_it_has_a_page(tmp_path, why, state, text):
    folder = begun(tmp_path / "run")
    close_run(folder, why)
    assert not (folder / "report.html").exists(), "it has done nothing"
    trained(folder, range(1, 4))
    close_run(folder, why)
    assert read_facts(folder).state == state
    found = Page.of(folder / "report.html")
    assert text in found.text and ("the <disk> is full" in found.text) == (state == "failed")


def test_a_page_that_cannot_be_made_is_a_warning(tmp_path, capsys):
    folder = begun(tmp_path / "run")
    trained(folder, [1])
    (folder / "report.html").mkdir()
    close_run(folder)
    assert "warning: no report.html: IsADirectoryError" in capsys.readouterr().err


def test_the_settings_come_back_from_the_page(tmp_path):
    """What is printed as run.toml is read by the one parser, to the same settings."""
    flags = [
        "--name",
        "a b'🦜",
        "--classes.template",
        '"\\\x7f\t{}',
        "--train.lr",
        "1e-5",
        "--corpus.hosts",
        "a",
        "b:1",
    ]
    flags += ["--student.offload", "--teacher.gpus", "0.5", "--classes.names", "C:\\x"]
    config = parse(RunConfig, flags, prog="test")
    text = again.toml(to_dict(config))
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    assert tomllib.loads(text)["train"]["lr"] == 1e-5
    assert parse(RunConfig, [str(file)], prog="test", from_files=True) == config
    assert again.command({"name": "a; rm"}) == "promptkd distill run.toml --name 'a; rm-again'"


def test_charts_are_drawn_to_scale():
    """The places of points are those that the ticks of both axes imply."""
    chart = lines("t", "d", [Curve("<c>", [0, 50, 100], [0.0, 0.25, 1.0])], "step", percent=True)
    (points,) = re.findall(r'points="([^"]+)"', chart)
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in p.split(",")] for p in points.split())
    assert x1 == pytest.approx((x0 + x2) / 2) and y1 == pytest.approx(y0 + (y2 - y0) / 4, abs=0.1)
    assert y2 < y0 and "&lt;c&gt;" in chart and "<desc>d</desc>" in chart
    ticks_at = re.findall(r'y1="([\d.]+)" y2="[\d.]+"/><text[^>]*>(\d+) %', chart)
    assert float(dict((t, y) for y, t in ticks_at)["100"]) == pytest.approx(y2, abs=0.1)


def test_round_numbers():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 47) == [10, 20, 30, 40] and ticks(5, 5) == [5]
    assert [si(n) for n in (0, 0.25, 1500, 2e6)] == ["0", "0.25", "1.5k", "2M"]
    many = lines("t", "d", [Curve("c", range(100_000), [1.0] * 100_000)], "step")
    assert len(many) < 20_000
    for odd in ([], [Curve("c", [], [])], [Curve("c", [3], [7.0])]):
        Page(lines("t", "d", odd, "step"))


def test_who_stops_a_run_of_much_telemetry_does_not_wait(tmp_path, capsys):
    folder = begun(tmp_path / "run")
    trained(folder, [1])
    (folder / "telemetry").mkdir()
    with open(folder / "telemetry" / "worker-0.jsonl", "wb") as file:
        file.truncate(17 << 20)
    close_run(folder, Drained("by SIGTERM", 143))
    assert not (folder / "report.html").exists()
    assert f"`promptkd report {folder}` makes the page" in capsys.readouterr().err
    assert read_facts(folder).state == "drained"
    close_run(folder, RunFailed("no room"))
    assert "Failed at step 1" in Page.of(folder / "report.html").text


def test_urls_are_shown_without_secrets(tmp_path, capsys):
    runs = [begun(tmp_path / name, f"https://me:{name}word@host/a?sig={name}") for name in "xy"]
    for run in runs:
        config = json.loads((run / "config.json").read_text())
        config["teachers"] = [{"weights": "https://me:xword@host/w?sig=x"}]
        write(run / "config.json", config)
    found = page.write(runs[0]).read_text()
    out = tmp_path / "both.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    for text in (found, out.read_text()):
        assert "word@" not in text and "sig=" not in text
    assert 'shards = "https://host/a?..."' in Page(found).text


# ------------------------------------------------------------------- the command


def test_the_command_makes_a_page_and_compares(whole, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(whole), "--out", str(out), "--dataset", "eurosat"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "PromptKD, published 97.54 82.08 89.14" in Page.of(out).text
    seeds = [begun(tmp_path / "seeds" / f"seed-{n}") for n in (1, 2)]
    for seed in seeds:
        trained(seed, range(1, 5 + len(seed.name)))
    out = tmp_path / "compare.html"
    words = ["report", str(tmp_path / "seeds"), str(whole), "--out", str(out)]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert re.search(r"<b>run +286 +2 min 16 s +90\.77 +77\.31  ended", told)
    found = Page.of(out)
    assert "3 runs compared" in found.text and "90.77" in found.text
    assert "corpus.shards" in found.text and "broken off" in found.text
    assert len([tag for tag, _ in found.tags if tag == "polyline"]) == 9, "three charts of three"


def test_what_the_command_cannot_do_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "nowhere"]) == 2
    assert "what: nowhere is no run folder" in capsys.readouterr().err
    begun(tmp_path / "bench")
    assert cli.main(["report", "./bench"]) == 0
    assert capsys.readouterr().out == "bench/report.html\n"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert cli.main(["report", "broken"]) == 2
    assert "has no config.json that can be read" in capsys.readouterr().err


def test_runs_of_stage_one_are_left_out(tmp_path, capsys):
    (tmp_path / "runs" / "prompts").mkdir(parents=True)
    write(tmp_path / "runs" / "prompts" / "config.json", {"name": "prompts"})
    words = ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out.html")]
    assert cli.main(words) == 2
    assert "what: " in capsys.readouterr().err
    for name in ("a", "b"):
        trained(begun(tmp_path / "runs" / name), [1])
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert "left out, being no distillations: prompts" in told.err and "broken off" in told.out
    assert cli.main(["report", str(tmp_path / "runs" / "prompts")]) == 2
    assert "what: " in capsys.readouterr().err


# ------------------------------------------------------------------- folders of others


def test_strange_values_leave_a_page(tmp_path, capsys):
    folders = [begun(tmp_path / "\x1b[2Jrun"), begun(tmp_path / "other")]
    config = json.loads((folders[0] / "config.json").read_text())
    write(folders[0] / "config.json", config | {"name": "\x1b[2J\ud800"})
    trained(folders[0], [1, 2], images_per_second=int("9" * 400), loss=5e-324)
    trained(folders[0], [3], images_per_second=-1)
    trained(folders[0], [4], images_per_second=1, agreement=1e299)
    ledger = {"seen": int("9" * 400), "trained": int("8" * 400), "skipped": {"\ud800": 1}}
    write(folders[0] / "ledger.json", ledger)
    span = {"labels_s": 1.0, "data_s": 0.0, "rank": 0, "time": START}
    telemetry = folders[0] / "telemetry" / "worker-0.jsonl"
    append(telemetry, *[span | {"span_s": 1e-9}] * 100, *[span | {"span_s": 3e-7}] * 100)
    append(telemetry, {"kind": "worker"} | span | {"span_s": 1e299})
    append(folders[0] / "metrics.jsonl", {"time": 1.0, "kind": "notice", "text": "\ud800"})
    page.write(folders[0])
    Page.of(folders[0] / "report.html")
    words = ["report", *map(str, folders), "--out", str(tmp_path / "out.html")]
    assert cli.main(words) == 0
    assert "?[2J?" in (told := capsys.readouterr().out) and "\x1b" not in told.replace(
        str(tmp_path), ""
    )
    for corpus in ([1], {"hosts": 5, "shards": "nowhere"}, "x", {"shards": [1]}, {}):
        write(folders[0] / "config.json", config | {"corpus": corpus})
        probes = folders[0] / "telemetry" / "probes.jsonl"
        append(probes, probe(1, (0, 0, 0, 0.5, 1, 0.5, 1.0)))
        page.write(folders[0])
        assert "No pictures below" in Page.of(folders[0] / "report.html").text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "class_vectors.safetensors"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name):
    folder = begun(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == "config.json":
        with pytest.raises(UserError, match=r"what: .* has no config\.json that can be read"):
            read_facts(folder)
    else:
        assert read_facts(folder).state == "broken off"


def test_a_page_is_not_written_through_a_link(tmp_path):
    folder, victim = begun(tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious")
    (folder / "report.html.tmp").symlink_to(victim)
    page.write(folder)
    assert victim.read_text() == "precious" and not (folder / "report.html").is_symlink()
    (folder / "link").symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels"):
        durable.write(folder / "link", b"gone")
    assert victim.read_text() == "precious"
