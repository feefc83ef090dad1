import json

import pytest

from engine.config import UserError
from jobs import quickstart
from jobs.seeds import mean, parse_seeds, spread
from jobs.table import scores


def test_lists_of_seeds():
    assert parse_seeds("1,2, 30") == (1, 2, 30) and parse_seeds("7") == (7,)
    for text, complaint in (("1;2", "is not a list"), ("", "is not a list"), ("2,2", "twice")):
        with pytest.raises(UserError, match=f"^seeds: .*{complaint}"):
            parse_seeds(text)


def test_mean_and_spread_go_field_by_field():
    runs = [
        {"name": "a", "rule": "last", "score": {"hm": 80.0, "none": None}, "steps": 3},
        {"name": "b", "rule": "last", "score": {"hm": 84.0, "none": None}, "steps": 3},
    ]
    told = {"name": None, "rule": "last", "score": {"hm": 82.0, "none": None}, "steps": 3}
    assert mean(runs) == told
    assert spread(runs)["score"]["hm"] == pytest.approx(8**0.5) and spread(runs)["steps"] == 0
    assert mean(runs[:1]) == runs[0] and spread(runs[:1])["score"]["hm"] == 0
    assert mean([{"hm": 1.0}, {"hm": None}]) == {"hm": None}


def test_the_table_shows_what_there_is():
    summary = {"student_after": {"base": 90.0, "novel": None, "hm": None, "all": 1.0}}
    line = scores(summary, ("student_after",)).splitlines()[1]
    assert line.split() == ["student", "after", "90.00", "-", "-", "1.00", "-"]
    line = scores(summary, ("student_after",), {"student_after": {"base": 0.5}}).splitlines()[1]
    assert "90.00 ± 0.50" in line


def test_the_quickstarts_table_is_of_both_stages(tmp_path):
    for seed, hm in ((1, 80.0), (2, 83.0)):
        score = {"base": hm, "novel": hm, "hm": hm, "all": hm, "agreement": None}
        told = {"zero_shot": score, "tuned": score}
        told |= {name: score for name in ("student_before", "student_after")}
        told["teacher"] = score | {"hm": 90.0, "agreement": 100.0}
        for name in ("teacher", "student"):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps(told))
    tables = [quickstart.table(tmp_path, seed) for seed in (1, 2)]
    assert tuple(mean(tables)) == quickstart.ROWS
    assert mean(tables)["zero_shot_teacher"]["hm"] == 81.5
    assert mean(tables)["tuned_teacher"]["hm"] == 90
    assert spread(tables)["distilled_student"]["hm"] == pytest.approx(3 / 2**0.5)
