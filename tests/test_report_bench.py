"""Benchmark results as tables and plots."""

import csv
from pathlib import Path

import pytest

from engine.config import UserError
from engine.plots import Bar, bars
from engine.report.bench import COLUMNS, markdown, newest, read, tables
from jobs import report

ROOT = Path(__file__).parents[1]
OLD, NEW = "2026-11-20T10:00", "2026-11-21T09:00"


def row(**changes: object) -> dict[str, object]:
    told = {
        **{"date": NEW, "git_sha": "abc", "device": "H100", "bench": "engine", "case": "inline"},
        **{"provider": "ours", "metric": "images_per_second", "unit": "1/s"},
        **{"p20": 90, "p50": 100, "p80": 120, "n": 3, "config": "{}", "versions": "torch=2"},
    }
    return told | changes


def write(file: Path, *rows: dict[str, object]) -> Path:
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_of_a_case_the_newest_run_counts_wherever_its_rows_stand(tmp_path):
    file = write(
        tmp_path / "engine.csv",
        row(p50=7),
        row(date=OLD, p50=1),
        row(date=OLD, device="A100", p50=2),
        row(date=OLD, case="store", p50=3),
        row(date=OLD, provider="a peer that was left out later", p50=4),
    )
    found = {(one.device, one.case, one.provider): one.p50 for one in newest(read(file))}
    assert found == {
        ("H100", "inline", "ours"): 7,
        ("A100", "inline", "ours"): 2,
        ("H100", "store", "ours"): 3,
    }


def test_of_two_runs_in_a_minute_the_later_counts_alone(tmp_path):
    peer = {"provider": "eager", "p50": 50}
    file = write(tmp_path / "e.csv", row(p50=1), row(**peer), row(git_sha="def", p50=2))
    assert [(one.git_sha, one.p50) for one in newest(read(file))] == [("def", 2)]


def test_tables_go_by_device_and_the_newest_run_first(tmp_path):
    file = write(
        tmp_path / "engine.csv",
        row(date=OLD, case="store"),
        row(),
        row(provider="teacher", p50=200),
        row(metric="inline_over_serial", unit="1", p50=0.97, n=1),
        row(device="A100", p50=30),
    )
    text = markdown(tables(read(file)), ranges=True)
    lines = text.splitlines()
    headings = [line for line in lines if line.startswith(("#", "20"))]
    assert headings == [
        "# engine",
        "## A100",
        f"{NEW}, abc (torch=2):",
        "## H100",
        f"{NEW}, abc (torch=2):",
        f"{OLD}, abc (torch=2):",
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert ["case", "provider", "images_per_second, 1/s", "inline_over_serial"] in cells
    assert ["inline", "ours", "100 (90 to 120)", "0.97"] in cells
    assert ["inline", "teacher", "200 (90 to 120)", ""] in cells


def test_a_case_of_many_metrics_has_a_line_for_each(tmp_path):
    rows = [row(metric=f"metric-{n}", p50=n, provider="a|b") for n in range(9)]
    text = markdown(tables(read(write(tmp_path / "e.csv", *rows))), ranges=False)
    assert "| inline | a\\|b     | metric-8, 1/s | 8      |" in text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("2026,abc,H100,engine", "4 values for 14 columns"),
        ("d,s,D,b,c,p,m,u,1,many,3,1,{},v", "p50 is no number: 'many'"),
        ("d,s,D,b,c,p,m,u,1,nan,3,1,{},v", "p50 is no number"),
        ("d,s,D,b,c,p,m,u,1,2,3,1.5,{},v", "n is no number: '1.5'"),
        ("d,s,D,b,c,p,m,u,1,2,3,1,{half,v", "config is no JSON"),
    ],
)
def test_a_damaged_row_is_named_by_file_and_line(tmp_path, line, why):
    file = write(tmp_path / "engine.csv", row(config='{"B": 1}'))
    file.write_text(f"{file.read_text()}{line}\n")
    with pytest.raises(UserError) as told:
        read(file)
    assert str(told.value).startswith(f"{file}, line 3: ") and why in str(told.value)


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other.csv, line 1: the columns are not"):
        read(tmp_path / "other.csv")


def test_the_command_tells_of_every_file(tmp_path, capsys):
    for bench in ("engine", "loader"):
        write(tmp_path / f"{bench}.csv", row(bench=bench))
    report.main(["bench", "--results", str(tmp_path)])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")] == [
        "# engine",
        "# loader",
    ]


def test_the_command_names_a_folder_without_results(tmp_path):
    with pytest.raises(UserError, match=r"results: .* holds no CSV files"):
        report.main(["bench", "--results", str(tmp_path)])


def test_the_results_in_the_repository_are_sound(capsys):
    report.main(["bench"])
    told = capsys.readouterr().out
    for file in (ROOT / "benchmarks" / "results").glob("*.csv"):
        assert f"# {file.stem}\n" in told


def test_tables_and_plots_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra `bench`")
    write(tmp_path / "engine.csv", row(), row(provider="teacher", p50=5000, p80=5000, p20=1))
    report.main(["bench", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "engine.md and 1 plots" in capsys.readouterr().out
    assert "![engine-1.png](engine-1.png)" in (tmp_path / "out" / "engine.md").read_text()
    assert (tmp_path / "out" / "engine-1.png").read_bytes().startswith(b"\x89PNG")


def test_more_bars_make_a_higher_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra `bench`")
    from PIL import Image

    heights = []
    for number in (2, 60):
        told = [Bar(f"case {n}", "ours", n, n + 1, n + 2) for n in range(number)]
        bars(tmp_path / "b.png", "bench: time", "ms", told)
        heights.append(Image.open(tmp_path / "b.png").height)
    assert heights[1] > 5 * heights[0]
