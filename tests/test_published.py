"""The paper's figures: their averages recompute, and what contradicts itself is marked."""

from typing import get_args

import pytest

from engine.data.datasets import DATASETS, DatasetName
from engine.published import HEADLINE, Protocol, Row, published, table

NAMES = get_args(DatasetName)
OURS = Row(80.0, 70.0, 224 / 3, 60.0)


def harmonic(a: float, b: float) -> float:
    return 2 / (1 / a + 1 / b)


@pytest.mark.parametrize(
    ("protocol", "sets", "methods"),
    [
        ("base-to-novel", 11, "CLIP CoOp CoCoOp MaPLe PromptSRC PromptKD"),
        ("cross-dataset", 10, "CoOp CoCoOp MaPLe PromptSRC PromptKD"),
        (
            "domain-generalisation",
            4,
            "CLIP CoOp CoCoOp MaPLe PromptSRC TPT CoOp+TPT CoCoOp+TPT PromptAlign PromptKD",
        ),
    ],
)
def test_averages_recompute(protocol, sets, methods):
    """As printed, to the last digit; a mean harmonic mean is that of the mean base and novel."""
    rows = [found for name in NAMES if (found := published(protocol, name))]
    average = published(protocol, "average")
    assert len(rows) == sets and list(average) == methods.split()
    for method, mean in average.items():
        for column in ("base", "novel", "all"):
            cells = [getattr(row[method], column) for row in rows]
            if protocol == "base-to-novel" and column != "all":
                assert getattr(mean, column) == pytest.approx(sum(cells) / sets, abs=0.0051)
            elif protocol != "base-to-novel" and column == "all":
                assert mean.all == pytest.approx(sum(cells) / sets, abs=0.0051)
            else:
                assert cells == [None] * sets and getattr(mean, column) is None
        if protocol == "base-to-novel":
            assert mean.hm == pytest.approx(harmonic(mean.base, mean.novel), abs=0.0051)


def test_harmonic_means_recompute_but_two():
    wrong = {
        (name, method)
        for name in NAMES
        for method, row in published("base-to-novel", name).items()
        if abs(row.hm - harmonic(row.base, row.novel)) > 0.0051
    }
    assert wrong == {("stanford_cars", "PromptKD"), ("ucf101", "PromptKD")}
    for name in NAMES:
        lines = table(OURS, "base-to-novel", name).splitlines()
        marked = any("*" in line for line in lines)
        assert marked == ((name, "PromptKD") in wrong)
    assert "* as printed; base and novel give 83.08" in table(
        OURS, "base-to-novel", "stanford_cars"
    )


def test_cells_of_the_tables():
    assert published("base-to-novel", "eurosat")["PromptKD"] == Row(97.54, 82.08, 89.14)
    assert published("base-to-novel", "dtd")["CoCoOp"] == Row(77.01, 56.00, 64.85)
    assert published("cross-dataset", "eurosat")["PromptKD"] == Row(all=63.74)
    assert published("cross-dataset", "fgvc_aircraft")["MaPLe"] == Row(all=24.74)
    assert published("domain-generalisation", "imagenet_a")["PromptSRC"] == Row(all=50.90)
    assert published("cross-dataset", "imagenet") == {}  # it is where they come from
    assert published("few-shot", "eurosat") == {}


def test_a_table_shows_what_belongs_to_its_protocol():
    lines = table(OURS, "base-to-novel", "eurosat").splitlines()
    assert lines[0].split() == ["base", "novel", "hm", "all"]
    assert lines[1].split() == ["this", "bundle", "80.00", "70.00", "74.67", "60.00"]
    assert lines[7].split() == ["PromptKD", "97.54", "82.08", "89.14", "-"]
    assert lines[8].startswith("Published: Table 1 of arXiv:2403.02781")
    assert len({len(line) for line in lines[:8]}) == 1
    lines = table(OURS, "cross-dataset", "eurosat").splitlines()
    assert lines[0].split() == ["all"] and lines[1].split() == ["this", "bundle", "60.00"]
    assert lines[6].split() == ["PromptKD", "63.74"]
    assert table(OURS, "cross-dataset", "imagenet").endswith(
        "Table 2 of the paper has no imagenet."
    )
    assert table(OURS, "few-shot", "dtd").endswith("The paper has no table of few-shot results.")
    assert len(table(Row(None, 1.0, None, 1.0), "base-to-novel", None).splitlines()) == 2


def test_every_protocol_has_a_headline():
    assert set(HEADLINE) == set(get_args(Protocol))
    assert set(HEADLINE.values()) <= set(Row._fields)
    assert set(NAMES) == set(DATASETS)
