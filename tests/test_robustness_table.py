"""docs/robustness.md: every case is there, and the tests that it names are."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "robustness.md"
RESULTS = ("proved", "partly: ", "not yet: ")


def rows() -> list[list[str]]:
    """Number, what happens, what comes of it, tests, result."""
    lines = [line for line in TABLE.read_text().splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@cache
def functions_of(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_all_thirty_cases_have_a_row_and_a_result():
    assert [int(row[0]) for row in rows()] == list(range(1, 31))
    for row in rows():
        assert len(row) == 5 and row[1], row[0]
        assert row[4] == "proved" or row[4].startswith(RESULTS[1:]), row[4]


def test_every_test_that_is_named_exists():
    named = 0
    for number, _, told, tests, result in rows():
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert len(names) == len([one for one in tests.split(",") if one.strip()]), number
        assert (names and told) or result.startswith("not yet"), number
        for file, name in names:
            assert name in functions_of(ROOT / "tests" / file), f"case {number}: {file}::{name}"
        assert len(set(names)) == len(names), number
        named += len(names)
    assert named > 80
