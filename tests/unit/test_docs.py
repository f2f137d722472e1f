"""The pages say what the code says: settings, metrics and seams, value for value."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from tests.upstream import seams
from xllm_plugins.compat import SEAMS, VLLM, upstream_of
from xllm_plugins.config import Group, Limits, allowed
from xllm_plugins.features import Feature
from xllm_plugins.manager import registry
from xllm_scheduler.service.config import RouterSection

ROOT = Path(__file__).resolve().parents[2]
PART_HEADINGS = (
    "## Method",
    "## Inputs",
    "## Settings",
    "## Metrics",
    "## Trade-offs, and when to switch it off",
    "## How it was measured",
)
FOLDERS = (
    "", "scheduler", "kv", "eplb", "spec_decode", "docs", "benchmarks", "examples/cluster",
    "examples/shortest_first",
)  # fmt: skip
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
FEATURES = list(registry().features().values())
HOMES = {"service": ROOT / "docs" / "router.md"}  # of features that are not a part of their own
PARTS = [feature for feature in FEATURES if feature.name not in HOMES]


def page(feature: Feature) -> str:
    """The README of the part that a feature is, or the page that it stands on."""
    return HOMES.get(feature.name, ROOT / feature.name / "README.md").read_text()


def rows(text: str, prefix: str) -> list[tuple[str, ...]]:
    """The cells of the table rows whose first cell starts with a prefix."""
    found = re.findall(rf"^\| `({re.escape(prefix)}[^`]+)` \|(.*)\|$", text, re.MULTILINE)
    return [(name, *(cell.strip() for cell in rest.split("|"))) for name, rest in found]


def settings(section: type[Group], name: str) -> list[tuple[str, ...]]:
    """The rows that a section's settings have in a table."""
    hints = typing.get_type_hints(section)
    expected: list[tuple[str, ...]] = []
    for field in dataclasses.fields(section):
        limits: Limits = field.metadata["limits"]
        default = getattr(section(), field.name)
        default = getattr(default, "value", default)
        accepts = allowed(hints[field.name], limits)
        expected.append((f"{name}.{field.name}", str(default), accepts, limits.doc))
    return expected


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_every_setting_stands_in_its_table(feature: Feature) -> None:
    expected = settings(feature.section, feature.name)
    assert rows(page(feature), f"{feature.name}.") == expected


def test_the_routers_settings_stand_on_its_page() -> None:
    text = (ROOT / "docs" / "router.md").read_text()
    assert rows(text, "router.") == settings(RouterSection, "router")
    for name in ("round_robin", "least_loaded", "power_of_two", "session", "kv_aware", "slo_aware"):
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_every_metric_stands_in_its_table(feature: Feature) -> None:
    expected = [
        (f"xllm:{metric.name}", metric.kind, ", ".join(("engine", *metric.labels)), metric.doc)
        for metric in feature.metrics
    ]
    assert rows(page(feature), "xllm:") == expected


@pytest.mark.parametrize("feature", PARTS, ids=lambda f: f.name)
def test_every_part_has_a_readme_of_the_one_form(feature: Feature) -> None:
    text = page(feature)
    positions = [text.find(f"\n{heading}\n") for heading in PART_HEADINGS]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert text.index("**Swaps**") < text.index("**Why.**") < positions[0]


def test_every_seam_stands_on_the_compatibility_page() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert [name for name, *_ in rows(text, "")] == [*SEAMS, *seams.LISTED]  # how; where each holds


def test_every_seam_was_looked_at_on_every_version_and_holds_where_it_is_declared_to() -> None:
    kept = seams.read()
    assert kept.keys() >= {"0.23.0", "0.26.0", "0.27.1", "0.30.0", "0.32.0"}
    assert list(kept["0.23.0"]) == seams.LISTED  # for which there is a vllm-ascend
    for version, found in kept.items():
        assert found.keys() >= {seam for seam in SEAMS if upstream_of(seam) == VLLM}
        cells = {seam: seams.cell(seam, version, kept) for seam in found}
        assert "broken" not in cells.values(), cells
    assert seams.table(kept) in (ROOT / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
