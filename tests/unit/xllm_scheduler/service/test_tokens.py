"""Prompts as tokens: an instance is asked until its tokenizer is here, and if they differ."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from xllm_scheduler.service import tokens as module
from xllm_scheduler.service.peek import Peek
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.tokens import Tokens

WORDS = ("which", "of", "the", "two", "a", "bridge", "user", "chat")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer of a few words."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate((*WORDS, "?"))}, unk_token="?")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    made.chat_template = template
    path = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(path)
    return path


class Instance:
    """Answers /tokenize as if its template began with some further tokens."""

    def __init__(self, folder: Path, before: list[int]) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.before = before
        self.asked = 0

    async def tokenize(self, request: web.Request) -> web.Response:
        self.asked += 1
        body = await request.json()
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False)
        return web.json_response({"tokens": [*self.before, *self.tokenizer.encode(text)]})


Start = Callable[[list[int]], Any]


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[Start]:
    """Starts an instance, and what tokenises for it."""
    runners: list[web.AppRunner] = []
    async with aiohttp.ClientSession() as session:

        async def made(before: list[int]) -> tuple[Instance, Tokens]:
            instance = Instance(folder, before)
            app = web.Application()
            app.router.add_post("/tokenize", instance.tokenize)
            runners.append(web.AppRunner(app))
            await runners[-1].setup()
            await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runners[-1].addresses[0][1]}"
            record = Record("i", url, ("served",), tokenizer=str(folder))
            return instance, Tokens("auto", session, lambda model: record)

        yield made
        for runner in runners:
            await runner.cleanup()


def asked(content: str) -> Peek:
    messages = json.dumps([{"role": "user", "content": content}]).encode()
    return Peek(model="served", messages=msgspec.Raw(messages))


async def settled(tokens: Tokens) -> None:
    async with asyncio.timeout(60):
        while tokens._loading:
            await asyncio.sleep(0.01)


async def test_the_first_prompt_does_not_wait_for_the_tokenizer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load, load = threading.Event(), module._loaded
    monkeypatch.setattr(module, "_loaded", lambda name: may_load.wait(120) and load(name))
    instance, tokens = await start([])
    first = await tokens.prompt(CHAT, asked("a bridge"))
    assert (list(first.tokens), instance.asked) == ([6, 4, 5], 1)
    may_load.set()
    await settled(tokens)  # which asks once to compare
    second = await tokens.prompt(CHAT, asked("the two"))
    assert (list(second.tokens), instance.asked) == ([6, 2, 3], 2)
    tokens.close()


async def test_an_instance_with_another_template_is_always_asked(start: Start) -> None:
    instance, tokens = await start([7])
    await tokens.prompt(CHAT, asked("a bridge"))
    await settled(tokens)
    second = await tokens.prompt(CHAT, asked("the two"))
    assert (list(second.tokens), instance.asked) == ([7, 6, 2, 3], 3)
    tokens.close()
