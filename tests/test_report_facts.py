"""What is read out of run folders, however they were left."""

import os
import tracemalloc

import numpy as np
import pytest
import run_folders
from run_folders import START, append, begun, probe, trained, write

from engine.config import UserError
from engine.report.compare import differences, folders
from engine.report.facts import Facts, Probes, Skip, read_facts
from engine.report.findings import agreement, disagreements, drift, extremes, late
from engine.report.records import lineage, read_records
from engine.report.spans import Span, shares
from engine.report.words import bottleneck, duration, verdict


def test_a_run_that_has_just_begun_tells_little(tmp_path):
    facts = read_facts(begun(tmp_path / "young"))
    assert (facts.name, facts.state, facts.train, facts.students) == ("young", "broken off", [], [])
    assert facts.wall_s is None and facts.images_per_second is None and len(facts.probes) == 0
    assert facts.classes == run_folders.CLASSES and facts.class_name(7) == "class 7"
    assert "before its first step" in verdict(facts) and bottleneck(facts) == ""


def test_what_is_no_run_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is no run folder: it has no config\.json"):
        read_facts(tmp_path / "nowhere")
    write(tmp_path / "config.json", {"name": "stage one", "prompts": {}})
    with pytest.raises(UserError, match="is no distillation"):
        read_facts(tmp_path)


def test_torn_and_strange_lines_count_for_nothing(tmp_path):
    folder = begun(tmp_path / "run")
    trained(folder, [1, 2])
    with open(folder / "metrics.jsonl", "a") as lines:
        lines.write('[1]\nnull\n{"kind": "train", "step": "x"}\n{"kind": "train", "st\n')
    trained(folder, [3], loss=float("nan"))
    append(folder / "telemetry" / "probes.jsonl", {"step": 1, "shard": [1, 2], "position": "no"})
    append(folder / "telemetry" / "probes.jsonl", {"kind": "probe", "step": 2, "shard": [1]})
    with open(folder / "telemetry" / "probes.jsonl", "ab") as lines:
        lines.write(b'\xff\xfe{"step": 3')
    (folder / "summary.json").write_text('{"images_per')
    (folder / "rollbacks.json").write_text("{}")
    facts = read_facts(folder)
    assert [record["step"] for record in facts.train] == [1, 2, 3]
    assert len(facts.probes) == 0 and facts.summary == {} and facts.state == "broken off"
    assert facts.images_per_second == pytest.approx(100)
    assert facts.wall_s == pytest.approx(6)


def test_steps_that_a_restart_repeats_are_told_once(tmp_path):
    folder = begun(tmp_path / "run")
    probes = folder / "telemetry" / "probes.jsonl"
    for step in (1, 2, 3, 4):
        append(probes, probe(step, (0, step, 0, 0.5, 1, 0.5, 1.0)))
    trained(folder, [1, 2, 3, 4], images_per_second=1.0)
    append(folder / "metrics.jsonl", {"time": START, "kind": "resumed", "text": "again", "step": 2})
    trained(folder, [3], images_per_second=9.0)
    append(probes, probe(3, (0, 30, 0, 0.5, 1, 0.5, 1.0)))
    facts = read_facts(folder)
    assert [(one["step"], one["images_per_second"]) for one in facts.train] == [
        (1, 1),
        (2, 1),
        (3, 9),
    ]
    assert facts.probes.step.tolist() == [1, 2, 3]
    assert facts.probes.position.tolist() == [1, 2, 30]
    assert [text for _, text in facts.notices] == ["again"]
    assert lineage([{"step": 2}, {"step": 1}, {}, {"step": True}]) == [{"step": 1}]


def test_the_state_of_a_run(tmp_path):
    folder = begun(tmp_path / "run")
    trained(folder, [1])
    end = {"time": START, "kind": "end", "state": "failed", "text": "no room"}
    append(folder / "metrics.jsonl", end)
    facts = read_facts(folder)
    assert (facts.state, facts.why) == ("failed", "no room")
    assert verdict(facts).startswith("Failed at step 1 of 20") and "no room" in verdict(facts)
    trained(folder, [2])  # another life
    assert read_facts(folder).state == "broken off"
    lease = folder / "lease.json"
    lease.write_text("{}")
    assert read_facts(folder).state == "running"
    os.utime(lease, (START, START))
    assert read_facts(folder).state == "broken off"
    write(folder / "summary.json", {"wall_s": 7.5, "images_per_second": 12.0})
    facts = read_facts(folder)
    assert (facts.state, facts.wall_s, facts.images_per_second) == ("ended", 7.5, 12.0)


def test_waits_come_from_telemetry_or_else_from_training_records(tmp_path):
    folder = begun(tmp_path / "run")
    trained(folder, [1, 2, 3])
    trained(folder, [4], waited_labels_s=0.0)  # another life
    facts = read_facts(folder)
    assert [span.parts_s for span in facts.students] == [
        {"labels": pytest.approx(0.5), "data": pytest.approx(0.1)}
    ] * 2
    told = {"time": START + 10, "kind": "worker", "host": "h", "span_s": 10.0, "labels_s": 4.0}
    append(folder / "telemetry" / "worker-0.jsonl", told | {"rank": 0, "data_s": 1.0})
    append(folder / "telemetry" / "worker-1.jsonl", told | {"rank": 1}, {"kind": "worker"})
    facts = read_facts(folder)
    assert [(span.who, span.parts_s["data"]) for span in facts.students] == [("0", 1.0), ("1", 0.0)]
    assert "waited 40 % for labels and 5 % for images: teachers set the pace" in bottleneck(facts)


def test_shares_of_the_time_fall_into_their_bins():
    """Worker a waits 2 of its first 10 s, and is there alone till 5."""
    spans = [
        Span("a", "", 10.0, 10.0, {"labels": 2.0}, {}),
        Span("b", "", 15.0, 10.0, {"labels": 8.0}, {}),
    ]
    told, there = shares(spans, ("labels",), np.array([0.0, 5.0, 10.0, 15.0, 20.0]))
    assert told["labels"].tolist() == pytest.approx([0.2, 0.5, 0.8, 0])
    assert there.tolist() == [True, True, True, False]


def test_a_sample_that_was_skipped_is_told_once(tmp_path):
    folder = begun(tmp_path / "run")
    told = {"kind": "skipped", "step": 1, "reason": "changed", "shard": 0, "position": 4}
    file = folder / "telemetry" / "skipped-1.jsonl"
    append(file, told, told | {"step": 9}, told | {"reason": 3}, told | {"reason": "teacher"})
    assert read_facts(folder).skipped == [Skip("changed", 0, 4), Skip("teacher", 0, 4)]


# ------------------------------------------------------------------- what probes say


def probes(rows: list[tuple]) -> Probes:
    """Of step, shard, position, teacher, its p, student, its p, entropy."""
    kinds = (int, int, int, int, float, int, float, float)
    columns = [np.array(c, k) for c, k in zip(zip(*rows, strict=True), kinds, strict=True)]
    return Probes(*columns)


def test_disagreements_of_the_last_quarter_come_surest_first():
    rows = [(1, 0, 0, 0, 1.0, 1, 1.0, 0.1)]  # early
    rows += [(step, 0, 9, 0, 0.9, 0, 0.9, 0.1) for step in (2, 3)]
    rows += [(4, 0, 1, 0, 0.6, 1, 0.99, 0.1), (4, 0, 2, 2, 0.8, 1, 0.7, 0.1)]
    rows += [(4, 0, 3, 2, 0.9, 2, 0.9, 0.1)]
    found = disagreements(late(probes(rows)), 9)
    assert [(one.position, one.teacher, one.student) for one in found] == [(2, 2, 1), (1, 0, 1)]
    assert disagreements(late(probes(rows)), 1) == found[:1]


def test_of_a_sample_the_newest_probe_counts():
    rows = [(8, 0, 1, 0, 0.9, 1, 0.9, 0.1), (9, 0, 1, 0, 0.9, 0, 0.9, 0.1)]
    latest = late(probes([(1, 5, 5, 0, 0.5, 0, 0.5, 1.0)] * 9 + rows))
    assert latest.student.tolist() == [0] and latest.step.tolist() == [9]


def test_agreement_by_class_is_that_of_a_count():
    rng = np.random.default_rng(0)
    teacher, student = rng.integers(0, 5, 400), rng.integers(0, 5, 400)
    rows = [(1, 0, n, teacher[n], 0.5, student[n], 0.5, 1.0) for n in range(400)]
    found = agreement(probes(rows))
    assert sum(one.samples for one in found) == 400
    for one in found:
        mine = student[teacher == one.number]
        assert one.agreeing == pytest.approx((mine == one.number).mean())
        counts = np.bincount(mine[mine != one.number])
        assert counts[one.mistaken_for] == counts.max()
    assert [one.agreeing for one in found] == sorted(one.agreeing for one in found)
    worst, best = extremes(found, 2)
    assert (worst, best) == (found[:2], found[:-3:-1])
    assert not set(extremes(found[:3], 8)[0]) & set(extremes(found[:3], 8)[1])


def test_a_shard_of_other_images_is_far():
    rng = np.random.default_rng(1)
    rows = [
        (1, shard, n, 0, 0.5, 0, 0.5, (2.5 if shard == 3 else 1.0) + 0.1 * rng.standard_normal())
        for shard in range(12)
        for n in range(7 if shard == 11 else 20)  # too few of the last to judge
    ]
    told = drift(probes(rows))
    assert told.shards.tolist() == list(range(11))
    assert told.shards[told.far].tolist() == [3]
    assert told.entropy[3] == pytest.approx(np.mean([row[-1] for row in rows if row[1] == 3]))
    assert not drift(probes(rows[:60])).far.any(), "too few shards"
    same = [(1, shard, n, 0, 0.5, 0, 0.5, 1.0) for shard in range(6) for n in range(8)]
    assert not drift(probes(same)).far.any()


# ------------------------------------------------------------------- several runs


def test_settings_that_differ(tmp_path):
    runs: dict[str, Facts] = {}
    for name, rate in (("a", 0.1), ("b", 0.2)):
        facts = read_facts(begun(tmp_path / name))
        facts.config["train"]["lr"] = rate
        runs[name] = facts
    assert differences(runs) == {"train.lr": ["0.1", "0.2"]}


def test_a_folder_of_runs_stands_for_them(tmp_path):
    seeds = [begun(tmp_path / "both" / f"seed-{seed}") for seed in (1, 2)]
    assert folders([str(tmp_path / "both")]) == seeds
    assert folders([str(seeds[1]), str(tmp_path / "both")]) == [seeds[1], seeds[0]]
    with pytest.raises(UserError, match="is no run folder, and holds none"):
        folders([str(tmp_path / "nowhere")])


def test_durations():
    told = [duration(seconds) for seconds in (None, 7.25, 119.6, 3600, 90_061)]
    assert told == ["-", "7.25 s", "2 min 0 s", "1 h 0 min", "25 h 1 min"]


# ------------------------------------------------------------------- large files


def test_of_a_large_file_evenly_spaced_pieces_are_read(tmp_path):
    file = tmp_path / "worker-0.jsonl"
    append(file, *({"step": step, "text": "x" * 80} for step in range(60_000)))
    size = file.stat().st_size
    assert [one["step"] for one in read_records(file)] == [*range(60_000)]
    steps = np.array([one["step"] for one in read_records(file, size // 10)])
    assert 4000 < len(steps) < 8000 and (np.diff(steps) > 0).all()
    assert steps[0] == 0 and steps[-1] == 59_999
    assert np.diff(steps).max() < 120, "no part of it is left out"


def test_a_line_without_an_end_is_read_in_bounds(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append(file, {"step": 1})
    with open(file, "r+b") as sparse:
        sparse.truncate(400 << 20)
    tracemalloc.start()
    assert [*read_records(file)] == [{"step": 1}]
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_neighbouring_spans_are_put_together(tmp_path):
    folder = begun(tmp_path / "run")
    told = [
        {"time": START + 5 * n, "rank": 0, "span_s": 5.0, "labels_s": n % 5, "data_s": 1.0}
        | {"gpu_utilisation": n % 2}
        for n in range(1, 10_001)
    ]
    append(folder / "telemetry" / "worker-0.jsonl", *told)
    spans = read_facts(folder).students
    assert len(spans) == 2000 and all(span.span_s == 25 for span in spans)
    assert sum(span.parts_s["labels"] for span in spans) == sum(one["labels_s"] for one in told)
    assert (spans[0].start, spans[-1].end) == (START, START + 50_000)
    assert {round(span.gpu["gpu_utilisation"], 1) for span in spans} == {0.4, 0.6}
