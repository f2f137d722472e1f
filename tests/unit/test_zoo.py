"""The table of models says what there is."""

from __future__ import annotations

import pytest

from benchmarks.lab.model import ROOT
from tests.zoo.families import FAMILIES, Family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_its_row(family: Family) -> None:
    assert f"| {family.name} |" in (ROOT / "docs" / "models.md").read_text()
