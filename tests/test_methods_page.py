"""The page of methods: that it is up to date in all but figures, and that no published method is left out silently."""

from __future__ import annotations

import json

import pytest

from benchmarks.measured import MODELS, RESULTS
from benchmarks.method_settings import SETTINGS
from benchmarks.methods_page import PAGE, page, read
from benchmarks.survey import BEYOND, SURVEY
from diffcache.recipes import METHODS


def structure(text: str) -> list[str]:
    """The page without figures: no measured table, and rows of recipes without the models' cells."""
    before, _, rest = text.partition("## Measured")
    head, _, described = rest.partition("## What each recipe does")
    assert head, "the page lacks the measured table"
    lines = []
    for line in before.splitlines():
        cells = line.split(" | ")
        lines.append(" | ".join(cells[: -len(MODELS)]) if line.startswith("| [`") else line)
    return lines + described.splitlines()


def test_the_page_is_up_to_date() -> None:
    assert structure(PAGE.read_text()) == structure(page([])), "run python -m benchmarks.methods_page"


def test_no_row_of_the_survey_is_left_out() -> None:
    assert sorted(SURVEY) == list(range(1, 100))
    for row in (*SURVEY.values(), *BEYOND):
        if not any(name in METHODS for name in row.recipes):
            assert row.reason, row.title
            assert row.nearest, row.title


def test_recipes_named_as_nearest_exist() -> None:
    known = " ".join(METHODS)
    assert "dbcache" in known
    for row in SURVEY.values():
        named = {word.strip(",:;().") for word in row.nearest.split()}
        assert not {word for word in named if "_" in word and word not in METHODS and "=" not in word}, row.title


def test_every_recipe_stands_on_the_page_and_in_the_survey_or_is_ours() -> None:
    text = PAGE.read_text()
    in_survey = {name for row in (*SURVEY.values(), *BEYOND) for name in row.recipes}
    ours = {"uniform", "evenly", "steps", "step_mask"}
    for name in METHODS:
        assert f'<a id="{name}"></a>' in text
        assert name in in_survey | ours, f"give {name} its row in benchmarks/survey.py"


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("fora", {"when": "17 of 50", "gate": "-", "predictor": "reuse", "calibration": "none", "memory": "1 x 32"}),
        ("teacache", {"when": "first 1 and last 1, then the gate", "gate": "polynomial", "calibration": "changes"}),
        ("budcache", {"when": "20 of 50, chosen by generations", "predictor": "reuse"}),
        ("deepcache", {"sites": "deep[0]"}),
        ("taylorseer", {"predictor": "taylor 1", "memory": "2 x 32"}),
    ],
)
def test_axes_are_those_of_the_recipe(name: str, axes: dict[str, str]) -> None:
    found = read(name)
    assert {axis: found[axis] for axis in axes} == axes


def test_results_are_of_recipes_and_settings_that_exist() -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for row in rows:
        assert row["model"] in MODELS
        assert row["way"] in METHODS or row["way"] in ("fewer steps", "Speedup")
    assert set(SETTINGS) <= set(METHODS)
