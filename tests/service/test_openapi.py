"""The router does as its OpenAPI document says, whatever is sent: checked by schemathesis."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import TOKEN

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance"
SCHEMA = "response_schema_conformance,unsupported_method"


async def checked(url: str, folder: Path, *more: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color",
        "--max-examples", "25", "--seed", "1", "--request-timeout", "60",
        "--suppress-health-check", "too_slow", *more,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=folder,
    )  # fmt: skip
    said, _ = await process.communicate()
    return process.returncode, said.decode()


@pytest.mark.timeout(600)
async def test_all_operations_do_as_documented(stub: Any, router: Any, tmp_path: Path) -> None:
    url = await router(await stub(), routing="slo_aware", tokenizers="off", data=str(tmp_path))
    status, said = await checked(
        url.url,
        tmp_path,
        "--header",
        f"Authorization: Bearer {TOKEN}",
        "--checks",
        f"{CHECKS},{SCHEMA}",
    )
    assert status == 0, said


async def test_it_names_what_can_be_asked(stub: Any, router: Any) -> None:
    url = await router(await stub())
    async with url.session.get(f"{url.url}/openapi.json") as answer:
        found = await answer.json()
    paths = {"/v1/chat/completions", "/v1/embeddings", "/v1/models", "/xllm/v1/instances"}
    assert paths <= found["paths"].keys()
    for operations in found["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "default" in operation["responses"]


async def test_without_the_admin_token_only_the_status_is_told(stub: Any, router: Any) -> None:
    url = await router(await stub())
    async with url.session.get(f"{url.url}/openapi.json") as answer:
        paths = (await answer.json())["paths"]
    admin = {p: operations for p, operations in paths.items() if p.startswith("/xllm/v1/")}
    told = set()
    for path, operations in admin.items():
        for method in operations:
            call = url.session.request(method, url.url + path.replace("{name}", "x"), json={})
            async with call as answer:
                if answer.status != 401:
                    told.add((method, path, answer.status))
    assert told == {("get", "/xllm/v1/status", 200)}
    assert len(admin) > 5
