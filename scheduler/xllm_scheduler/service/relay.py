"""One streamed answer on its way to its client, and how it goes on at another instance; pure.

The instance is asked for token ids beside the text. They are cut out of what the client gets, by
their position in the bytes, so that a chunk is parsed only after an instance has failed. Only whole
events are passed on, so what the client has seen is always a whole number of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_END = b"\n\n"
_DONE = b"data: [DONE]"
_ERROR = b'data: {"error":'
# Quotes within a JSON string are escaped, so these can only be keys.
_IDS, _NO_IDS = b',"token_ids":[', b',"token_ids":null'
_PROMPT_IDS, _NO_PROMPT_IDS = b',"prompt_token_ids":[', b',"prompt_token_ids":null'
_CALLS, _USAGE = b'"tool_calls":[{', b'"usage":{'


def with_token_ids(body: bytes) -> bytes:
    """A request's JSON that asks for token ids, unless it says something of them itself.

    A key that stands twice counts the last time, so what the client wrote wins.
    """
    start = body.find(b"{") + 1
    rest = body[start:]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return b'{"return_token_ids":true' + comma + rest


class Stream:
    """What came of an answer so far.

    Args:
        strip: whether token ids are to be cut out; False if the client asked for them.

    Attributes:
        done: whether the answer is complete.
        finished: whether its last token has come.
        error: the event in which the instance said that it failed; empty if it did not.
        started: whether the client has been sent anything.
        called: whether a tool call has begun.
        usage: the events in which the first instance said how many tokens there were, if it did.
    """

    def __init__(self, *, strip: bool = True) -> None:
        self.done = self.finished = self.called = self.started = False
        self.error = self.usage = b""
        self._strip = strip
        self._rest = b""
        self._ids: list[bytes] = []  # of each event that had some, as they stood there
        self._kept_ids = 0  # those up to the last event with text
        self._prompt_ids = b""
        self._first: bytes = b""
        self._resumed_after = -1  # tokens that were delivered before it went on elsewhere

    def feed(self, data: bytes) -> bytes:
        """Take in bytes of the instance; returns those for the client, whole events only."""
        whole, end, self._rest = (self._rest + data).rpartition(_END)
        if not end:
            return b""
        if _ERROR in whole:
            whole, _, after = whole.partition(_ERROR)
            self.error = _ERROR + after.partition(_END)[0] + _END
            whole = whole.removesuffix(_END)
        if not whole:
            return b""
        if self._resumed_after < 0:
            out = self._passed(whole)
        else:
            out = b"".join(map(self._resumed, whole.split(_END)))
        self.started = self.started or out != b""
        return out

    @property
    def tokens(self) -> int:
        """How many tokens came, as far as the instances told."""
        return sum(ids.count(b",") + 1 for ids in self._ids)

    def delivered(self) -> list[int]:
        """The tokens that the client has got, without those at the end that had no text yet."""
        return [
            int(part) for ids in self._ids[: self._kept_ids] for part in ids.split(b",") if part
        ]

    def prompt(self) -> list[int]:
        """The prompt's tokens; empty if the instance has not told them."""
        return [int(part) for part in self._prompt_ids.split(b",") if part]

    def ending(self, *, usage: bool) -> bytes:
        """What is still to be sent of an answer whose last token has come.

        Args:
            usage: whether the client wants to be told how many tokens there were.
        """
        done = _DONE + _END
        if not usage or not self._prompt_ids or not self._first.startswith(b"data: "):
            return done
        first, prompt = json.loads(self._first[6:]), len(self.prompt())
        counts = {"prompt_tokens": prompt, "completion_tokens": self.tokens}
        head = {name: first[name] for name in ("id", "object", "created", "model") if name in first}
        last = {**head, "choices": [], "usage": {**counts, "total_tokens": prompt + self.tokens}}
        return b"data: " + json.dumps(last, separators=(",", ":")).encode() + _END + done

    def resume(self) -> None:
        """The instance is lost; what is still to come will come from another one, as a new answer.

        What came of an event that is not whole is dropped.
        """
        self._rest = self.error = b""
        if not self.started:
            return
        del self._ids[self._kept_ids :]
        self._resumed_after = len(self.delivered())

    def _passed(self, events: bytes) -> bytes:
        """Whole events as the client gets them, however many they are at once."""
        if not self._first:
            self._first = events.partition(_END)[0]
        if _USAGE in events:
            self.usage = events
        if _DONE in events:
            self.done = any(event.startswith(_DONE) for event in events.split(_END))
        self.finished = self.finished or b'"finish_reason":"' in events
        self.called = self.called or _CALLS in events
        cut, ids = _cut(events, _IDS, _NO_IDS)
        if ids:
            self._keep(ids, events)
        if b',"prompt_token_ids":' in events:
            cut, prompts = _cut(cut, _PROMPT_IDS, _NO_PROMPT_IDS)
            if prompts and not self._prompt_ids:
                self._prompt_ids = prompts[0]
        return (cut if self._strip else events) + _END

    def _keep(self, ids: list[bytes], events: bytes) -> None:
        """Note token ids, and how many of them there are up to the last event with text."""
        self._ids += ids
        count = len(self._ids)
        for event in reversed(events.split(_END)):
            if _IDS not in event:
                continue
            if _has_text(event):
                self._kept_ids = count
                return
            count -= 1

    def _resumed(self, event: bytes) -> bytes:
        """An event of another instance, as if the first one had gone on."""
        if event.startswith(_DONE):
            self.done = True
            return event + _END
        if not event.startswith(b"data: "):
            return event + _END
        chunk = json.loads(event[6:])
        first = json.loads(self._first[6:]) if self._first.startswith(b"data: ") else {}
        for name in ("id", "created", "model"):
            if name in first:
                chunk[name] = first[name]
        chunk.pop("prompt_token_ids", None)
        text = False
        for choice in chunk.get("choices", ()):
            ids = choice.pop("token_ids", None) if self._strip else choice.get("token_ids")
            delta = choice.get("delta", {})
            if delta.get("role") and not delta.get("content") and not choice.get("finish_reason"):
                return b""  # the answer's head, which the client has
            delta.pop("role", None)
            text = text or bool(choice.get("text") or any(delta.values()))
            if ids:
                self._ids.append(",".join(map(str, ids)).encode())
            self.finished = self.finished or bool(choice.get("finish_reason"))
            self.called = self.called or bool(delta.get("tool_calls"))
        if text:
            self._kept_ids = len(self._ids)
        _correct_usage(chunk.get("usage"), self._resumed_after)
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + _END


def _cut(events: bytes, key: bytes, null: bytes) -> tuple[bytes, list[bytes]]:
    """Events without a key, and what stood in the lists of those that had one."""
    first, *rest = events.split(key)
    lists = [part.partition(b"]") for part in rest]
    left = b"".join([first, *[after for _, _, after in lists]])
    return left.replace(null, b""), [found for found, _, _ in lists if found]


def _has_text(event: bytes) -> bool:
    return b'"content":""' not in event and b'"text":""' not in event and b'"delta":{}' not in event


def _correct_usage(usage: Any, delivered: int) -> None:
    """Tokens that were delivered before stood in the new answer's prompt; count them as answer."""
    if isinstance(usage, dict) and "prompt_tokens" in usage:
        usage["prompt_tokens"] -= delivered
        usage["completion_tokens"] = usage.get("completion_tokens", 0) + delivered


_GUIDED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_UNIT = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "n": 1,
    "best_of": 1,
}


def reason_to_stay(body: Mapping[str, Any]) -> str:
    """Why an answer cannot go on elsewhere; empty if it can.

    Tokens that are sent again become prompt, so what depends on where the answer began would come
    out differently. An answer with tools can go on as long as no call has begun: the instance holds
    a call's beginning back, so that it is not among the tokens that are sent again.
    """
    for name, usual in _UNIT.items():
        if body.get(name) not in (None, usual):
            return f"{name} is {body[name]!r}"
    named = next((name for name in _GUIDED if body.get(name)), "")
    if named:
        return f"{named} keeps a state"
    kind = (body.get("response_format") or {}).get("type", "text")
    if kind != "text":
        return f"response_format {kind} keeps a state"
    for name in ("seed", "logprobs", "prompt_logprobs", "stop", "bad_words", "suffix"):
        value = body.get(name)
        if not (value is None or value is False or value in ([], "")):
            return f"{name} is set"
    choice = body.get("tool_choice")
    if body.get("tools") and choice not in (None, "auto", "none"):
        return f"tool_choice {choice!r} keeps a state"
    if body.get("include_reasoning") is False:
        return "include_reasoning is False, so some of its tokens are not told"
    for name in ("use_beam_search", "echo"):
        if body.get(name):
            return f"{name} is set"
    if has_media(body):
        return "its prompt has more than text"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and not all(type(token) is int for token in prompt):
        return "it has several prompts"
    return ""


def has_media(body: Mapping[str, Any]) -> bool:
    """Whether a chat's messages hold more than text."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(
            not isinstance(part, dict) or part.get("type") not in ("text", "input_text")
            for part in content
        ):
            return True
    return False


def resumed_body(
    body: Mapping[str, Any], prompt: list[int], delivered: list[int], *, chat: bool
) -> dict[str, Any]:
    """What is asked of the next instance, so that the answer goes on after ``delivered``.

    Args:
        body: what the client asked.
        prompt: its prompt's tokens.
        delivered: the answer's tokens that the client has.
        chat: whether it is a chat; those carry token ids beside their messages.
    """
    made = dict(body)
    tokens = [*prompt, *delivered]
    if chat:
        params = {
            k: v for k, v in (body.get("kv_transfer_params") or {}).items() if "remote" not in k
        }
        made["kv_transfer_params"] = {**params, "prompt_token_ids": tokens}
    else:
        made["prompt"] = tokens
        made.pop("kv_transfer_params", None)
    for name in ("max_tokens", "max_completion_tokens"):
        if made.get(name) is not None:
            made[name] -= len(delivered)
    if made.get("min_tokens"):
        made["min_tokens"] = max(0, made["min_tokens"] - len(delivered))
    made["return_token_ids"] = True
    return made
