"""The wheel that users install: the import packages, typed, and nothing that could clash."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("xllm_eplb", "xllm_kv", "xllm_plugins", "xllm_scheduler", "xllm_spec_decode")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a freshly built wheel."""
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_it_holds_exactly_the_import_packages(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_whole_and_typed(names: set[str], package: str) -> None:
    places = (ROOT, ROOT / "scheduler", ROOT / "kv", ROOT / "eplb", ROOT / "spec_decode")
    (source,) = (place / package for place in places if (place / package).is_dir())
    files = {
        f"{package}/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert f"{package}/py.typed" in files
    assert files <= names


def test_it_carries_the_licence_and_the_entry_points(names: set[str]) -> None:
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
