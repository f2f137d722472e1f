"""Prompts as tokens, so that routing can look their KV up; tokenised here, or by an instance.

With the model's tokenizer at hand it is done here, in a thread; else, and until it is loaded, an
instance is asked (``/tokenize``), which costs a round trip and is exact. Where neither can, the
text itself stands for the tokens, and what was routed for what an instance holds.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import aiohttp

from xllm_kv.index import Prompt
from xllm_scheduler.service.call import CHAT, COMPLETIONS
from xllm_scheduler.service.peek import Peek
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.relay import has_media

_KEPT_TOKENS = 16 << 20  # of prompts seen before
_TIMEOUT_S = 5.0
_PROBE = [{"role": "user", "content": "Which of the two?"}]
logger = logging.getLogger("xllm.router")


class Tokens:
    """See the module.

    Args:
        mode: ``auto``, ``instances`` or ``off``.
        session: to the instances.
        instance_of: an instance that serves a model; None if there is none.
        threads: for tokenizers.
    """

    def __init__(
        self,
        mode: str,
        session: aiohttp.ClientSession,
        instance_of: Callable[[str], Record | None],
        threads: int = 2,
    ) -> None:
        self._mode, self._session, self._instance_of = mode, session, instance_of
        self._pool = ThreadPoolExecutor(threads, "tokenizer")
        self._tokenizers: dict[str, Any] = {}  # None where there is none here
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._kept: OrderedDict[bytes, Sequence[int]] = OrderedDict()
        self._kept_tokens = 0

    def prepare(self) -> None:
        """Import what tokenises before anything is served; later it is done in a thread, slowly."""
        if self._mode == "auto":
            _library()

    def close(self) -> None:
        """End its threads."""
        for task in self._loading.values():
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def prompt(self, path: str, what: Peek) -> Prompt | None:
        """The tokens of a request's prompt, or its text where they are not known.

        None for what has no text alone: nothing is claimed of its KV.
        """
        if path not in (CHAT, COMPLETIONS):
            return None
        raw = bytes(what.messages if path == CHAT else what.prompt)
        if not raw or (path == CHAT and has_media({"messages": json.loads(raw)})):
            return None
        salt = what.cache_salt or ""
        record = self._instance_of(what.model)
        model, lora = (record.models[0], "") if record else (what.model, "")
        if record and what.model in record.loras:
            lora = what.model
        if self._mode == "off":
            return Prompt.of_text(model, raw, salt, lora)
        named = b"\0".join([what.model.encode(), raw, *what.templated.values()])
        name = blake2b(named, digest_size=16).digest()
        tokens = self._kept.get(name)
        if tokens is None:
            tokens = await self._tokens(record, path, what, json.loads(raw))
            if tokens is None:
                return Prompt.of_text(model, raw, salt, lora)
            self._keep(name, tokens)
        else:
            self._kept.move_to_end(name)
        return Prompt(model, tokens, lora, salt)

    def _keep(self, name: bytes, tokens: Sequence[int]) -> None:
        self._kept[name] = array("I", tokens)
        self._kept_tokens += len(tokens)
        while self._kept_tokens > _KEPT_TOKENS:
            _, dropped = self._kept.popitem(last=False)
            self._kept_tokens -= len(dropped)

    async def _tokens(
        self, record: Record | None, path: str, what: Peek, content: Any
    ) -> Sequence[int] | None:
        if isinstance(content, list) and content and all(map(_is_token, content)):
            return content  # it came as tokens
        if path == COMPLETIONS and not isinstance(content, str):
            return None  # several prompts
        if record is None:
            return None
        local = self._mode == "auto" and not what.templated
        tokenizer = self._tokenizer(record) if local else None
        if tokenizer is None:
            return await self._asked(record, path, what, content)
        loop = asyncio.get_running_loop()
        encode = functools.partial(_encoded, tokenizer, path, content)
        try:
            return await loop.run_in_executor(self._pool, encode)
        except Exception:
            logger.debug("a prompt for %s could not be tokenised here", what.model, exc_info=True)
            return await self._asked(record, path, what, content)

    def _tokenizer(self, record: Record) -> Any:
        """Its tokenizer; None if it is not here, or not yet: that takes seconds."""
        name = record.tokenizer or record.models[0]
        if name not in self._tokenizers and name not in self._loading:
            self._loading[name] = asyncio.create_task(self._load(name, record))
        return self._tokenizers.get(name)

    async def _load(self, name: str, record: Record) -> None:
        loop = asyncio.get_running_loop()
        try:
            tokenizer = await loop.run_in_executor(self._pool, _loaded, name)
            if tokenizer is None:
                logger.info("the tokenizer %s is not on this machine; instances are asked", name)
            elif not await self._agree(tokenizer, record):
                logger.info("%s has another chat template; instances are asked", record.name)
                tokenizer = None
            self._tokenizers[name] = tokenizer
        finally:
            del self._loading[name]

    async def _agree(self, tokenizer: Any, record: Record) -> bool:
        """Whether the instance makes the same tokens of a chat; it may have another template."""
        what = Peek(model=record.models[0])
        theirs = await self._asked(record, CHAT, what, _PROBE)
        try:
            return theirs is not None and list(theirs) == list(_encoded(tokenizer, CHAT, _PROBE))
        except Exception:
            logger.debug("%s has no chat template here", record.name, exc_info=True)
            return False

    async def _asked(
        self, record: Record, path: str, what: Peek, content: Any
    ) -> Sequence[int] | None:
        field = "messages" if path == CHAT else "prompt"
        body = {"model": what.model, field: content, "add_special_tokens": path != CHAT}
        body |= {name: json.loads(part) for name, part in what.templated.items()}
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with self._session.post(
                record.url + "/tokenize", json=body, timeout=timeout
            ) as answer:
                if answer.status != 200:
                    return None
                tokens: Sequence[int] = (await answer.json())["tokens"]
                return tokens
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, KeyError, ValueError) as error:
            logger.debug("%s could not tokenise: %s", record.url, error)
            return None


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _library() -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    return AutoTokenizer


def _loaded(name: str) -> Any:
    """A tokenizer if its files are on this machine; None else."""
    library = _library()
    if library is None:
        return None
    try:
        return library.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return None


def _encoded(tokenizer: Any, path: str, content: Any) -> Sequence[int]:
    if path == CHAT:
        text = tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
        content = text
    found: Sequence[int] = tokenizer.encode(content, add_special_tokens=path != CHAT)
    return found
