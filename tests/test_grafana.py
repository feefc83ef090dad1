"""The dashboard: a plain file, that names what the code exports and nothing else."""

import json
import re
from itertools import combinations
from pathlib import Path

import jobs
from engine.track.metrics import METRICS
from engine.track.ray_metrics import _TAGS, exported

BOARD = json.loads((Path(jobs.__file__).parent / "grafana" / "promptkd.json").read_text())
EXPORTED = {f"ray_{exported(metric)}": metric for metric in METRICS}
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_it_is_a_dashboard_that_grafana_imports():
    assert BOARD["schemaVersion"] >= 36 and BOARD["uid"] == "promptkd" and BOARD["title"]
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len({*ids}) == len(ids) > 15
    kinds = {one["name"]: one["type"] for one in BOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "run": "query"}


def test_no_panel_lies_over_another():
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert all(0 <= p["x"] and p["x"] + p["w"] <= 24 and p["w"] > 0 < p["h"] for p in places)
    for one, other in combinations(places, 2):
        apart = [
            a[side] + a[size] <= b[side]
            for a, b in ((one, other), (other, one))
            for side, size in (("x", "w"), ("y", "h"))
        ]
        assert any(apart), (one, other)


def test_panels_ask_the_chosen_source_for_metrics_that_are_exported():
    named = set()
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len({*refs}) == len(refs) > 0
    for expression in expressions():
        found = set(re.findall(r"\bray_\w+", expression))
        assert len(found) == 1 and found <= EXPORTED.keys(), expression
        assert '{run=~"$run"}' in expression
        named |= found
    (run,) = [one for one in BOARD["templating"]["list"] if one["name"] == "run"]
    assert re.fullmatch(r"label_values\((\w+), run\)", run["definition"])[1] in EXPORTED
    assert run["query"]["query"] == run["definition"]
    wanted = {"images_per_second", "loss", "agreement", "waited_labels", "waited_data", "busy"}
    wanted |= {"queue", "gpu_utilisation", "gpu_memory_bytes", "gpu_power_w", "skipped"}
    assert all(any(name.endswith(one) for name in named) for one in wanted)


def test_legends_use_labels_that_the_metric_has():
    for panel in PANELS:
        for target in panel["targets"]:
            (name,) = re.findall(r"\bray_\w+", target["expr"])
            group = EXPORTED[name].partition("/")[0]
            known = {"run"} if "by (run)" in target["expr"] else {"run", _TAGS.get(group, "run")}
            assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= known
