import json
import re
import time

import pynvml
import pytest

from engine.telemetry import GpuSampler, Recorder, Stopwatch, gpu


def test_records_are_lines_and_on_disk_at_once(tmp_path):
    recorder = Recorder(tmp_path / "metrics.jsonl")
    recorder.record("train", step=1, loss=0.5)
    before = time.time()
    recorder.record("note", text="two\nlines")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["time"] <= before <= second["time"] <= time.time()
    assert first.items() >= {"kind": "train", "step": 1, "loss": 0.5}.items()
    assert second.items() >= {"kind": "note", "text": "two\nlines"}.items()
    recorder.close()


def test_a_later_life_of_a_run_appends(tmp_path):
    for step in (1, 2):
        recorder = Recorder(tmp_path / "metrics.jsonl")
        recorder.record("train", step=step)
        recorder.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_file_that_cannot_be_made_costs_the_records_alone(tmp_path, caplog):
    (tmp_path / "telemetry").write_text("in the way")
    recorder = Recorder(tmp_path / "telemetry" / "worker-0.jsonl")
    recorder.record("worker", step=1)
    recorder.close()
    assert "worker-0.jsonl: not recorded, and tried again later: File exists" in caplog.text


def test_records_go_on_where_there_is_room_again(tmp_path):
    file = tmp_path / "telemetry" / "worker-0.jsonl"
    file.parent.write_text("in the way")
    recorder = Recorder(file)
    file.parent.unlink()
    recorder.record("worker", step=1)  # too soon to try again
    recorder._again_s = 0.0  # half a minute later
    recorder.record("worker", step=2)
    recorder.close()
    recorder.record("worker", step=3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2]


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
def test_a_record_that_a_full_disk_took_a_part_of_is_cut_off(tmp_path, whole):
    file = tmp_path / "metrics.jsonl"
    file.write_text(whole + '{"step": 2, "lo')
    recorder = Recorder(tmp_path / "metrics.jsonl")
    recorder.record("train", step=3)
    recorder.close()
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == ([1, 3] if whole else [3])


def test_a_sampler_tells_why_it_has_nothing_to_tell():
    sampler = GpuSampler(None)
    assert sampler.means(5) == {} and sampler.absent == "the run is on the CPU"
    sampler.close()
    try:
        pynvml.nvmlInit()
        pytest.skip("this machine has NVML")
    except pynvml.NVMLError as error:
        why = str(error)
    sampler = GpuSampler(0)
    assert sampler.means(5) == {} and sampler.absent == why and gpu() == ""
    sampler.close()


@pytest.mark.gpu
def test_a_gpu_has_a_name_and_a_driver():
    assert re.fullmatch(r".+, driver \d+\.[\d.]+", gpu())


@pytest.mark.gpu
def test_sampler_gives_means_of_a_gpu():
    sampler = GpuSampler(0, period_s=0.05)
    time.sleep(0.5)
    means = sampler.means(0.3)
    assert means.keys() == sampler.means(0).keys(), "of the last sample"
    sampler.close()
    assert 0 <= means["gpu_utilisation"] <= 1
    assert means["gpu_memory_bytes"] > 0 and means["gpu_power_w"] > 0


def test_a_stopwatch_tells_of_its_laps():
    watch = Stopwatch()
    for wait_s in (0.0, 0.0, 0.05):
        with watch.lap(10):
            time.sleep(wait_s)
    told = watch.statement()
    assert told["laps"] == 3 and told["bytes"] == 30 and told["s"] == watch.total_s >= 0.05
    assert told["p50_s"] < 0.05 <= told["p99_s"]
    assert Stopwatch().statement() == {"laps": 0, "s": 0.0, "p50_s": 0.0, "p99_s": 0.0, "bytes": 0}
