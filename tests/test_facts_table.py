"""docs/facts.md and the tests of facts: each row has a test that exists, each test a row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.portable

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "facts.md"
REFERENCE = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def _rows() -> list[tuple[str, str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    return [row for row in rows if row not in {("fact", "shown by"), ("---", "---")}]


def _named() -> set[tuple[str, str]]:
    return {found for _, shown in _rows() for found in REFERENCE.findall(shown)}


def _tests(*patterns: str) -> set[tuple[str, str]]:
    files = [file for pattern in patterns for file in TESTS.glob(pattern)]
    return {
        (file.name, node.name)
        for file in files
        if file != Path(__file__)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_a_test_or_says_where_it_belongs():
    assert len(_rows()) > 90
    for row in _rows():
        assert len(row) == 2, row
        assert REFERENCE.search(row[1]) or row[1].startswith(("*later*: ", "*measured*")), row


def test_no_fact_is_there_twice():
    facts = [fact for fact, _ in _rows()]
    assert sorted(facts) == sorted(set(facts))


def test_every_test_that_is_named_exists():
    assert _named() - _tests("test_*.py") == set()


def test_every_test_of_a_fact_is_named():
    assert _tests("test_kernel_doc.py", "test_facts_*.py") - _named() == set()
