"""A streamed answer: what the client gets, byte for byte, also where it goes on elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_scheduler.service.relay import (
    Stream,
    reason_to_stay,
    resumed_body,
    with_token_ids,
)

PROMPT = [5, 6, 7]
DONE = b"data: [DONE]\n\n"


def event(
    text: str | None, ids: list[int] | None, *, first: bool = False, finish: str | None = None,
    usage: dict[str, int] | None = None, name: str = "chatcmpl-1",
) -> bytes:  # fmt: skip
    """A chunk as vLLM writes it: fields that were set, in this order, without spaces."""
    delta: dict[str, Any] = {} if text is None else {"content": text}
    if first:
        delta = {"role": "assistant", "content": ""}
    choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    if not first:
        choice["token_ids"] = ids
    chunk: dict[str, Any] = {"id": name, "object": "chat.completion.chunk", "created": 1,
                             "model": "m", "choices": [choice]}  # fmt: skip
    if first:
        chunk["prompt_token_ids"] = PROMPT
    if usage:
        chunk["usage"] = usage
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def answer(tokens: list[int], *, start: int = 0, name: str = "chatcmpl-1") -> list[bytes]:
    """A whole answer: token n has the text "tn "."""
    texts = [event(f"t{t} ", [t], name=name) for t in tokens[start:-1]]
    last = event(f"t{tokens[-1]} ", [tokens[-1]], finish="length", name=name)
    return [event("", None, first=True, name=name), *texts, last, DONE]


def parsed(data: bytes) -> list[dict[str, Any]]:
    events = [e for e in data.split(b"\n\n") if e and e != b"data: [DONE]"]
    return [json.loads(e.removeprefix(b"data: ")) for e in events]


def text_of(data: bytes) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in parsed(data))


def test_token_ids_are_cut_out_and_kept() -> None:
    stream = Stream()
    out = b"".join(stream.feed(part) for part in answer([1, 2, 3]))
    assert b"token_ids" not in out
    assert text_of(out) == "t1 t2 t3 "
    assert (stream.delivered(), stream.prompt(), stream.tokens) == ([1, 2, 3], PROMPT, 3)
    assert stream.done
    assert stream.finished


def test_a_client_that_asked_for_them_gets_them() -> None:
    stream = Stream(strip=False)
    whole = answer([1, 2])
    assert b"".join(stream.feed(part) for part in whole) == b"".join(whole)
    assert stream.delivered() == [1, 2]


def test_other_fields_are_passed_on_as_they_stand() -> None:
    chunk = event('says ,"token_ids":[7] and \\"prompt_token_ids\\":[8]', [9], usage={"a": 1})
    out = Stream().feed(chunk)
    assert out == chunk.replace(b',"token_ids":[9]', b"")


@given(cuts=st.lists(st.integers(0, 2000), max_size=30))
def test_it_does_not_matter_where_the_network_cuts(cuts: list[int]) -> None:
    whole = b"".join(answer([1, 2, 3, 4]))
    expected = Stream().feed(whole)
    stream, out, last = Stream(), b"", 0
    for cut in [*sorted(c for c in cuts if c < len(whole)), len(whole)]:
        out += stream.feed(whole[last:cut])
        last = cut
    assert out == expected


@given(broken_at=st.integers(0, 1500), again_at=st.integers(0, 1500))
def test_a_broken_answer_goes_on_without_a_token_lost_or_doubled(
    broken_at: int, again_at: int
) -> None:
    tokens = list(range(10, 20))
    stream, out = Stream(), b""
    first = b"".join(answer(tokens))
    out += stream.feed(first[:broken_at])
    for number, cut in enumerate((again_at, None)):
        if stream.done or stream.finished:
            break
        stream.resume()
        delivered = stream.delivered()
        assert delivered == tokens[: len(delivered)]
        rest = b"".join(answer(tokens, start=len(delivered), name=f"chatcmpl-other-{number}"))
        out += stream.feed(rest[:cut])
    if not stream.done:  # broken between the last token and its end
        assert stream.finished
    assert text_of(out) == "".join(f"t{t} " for t in tokens)
    chunks = parsed(out)
    assert {c["id"] for c in chunks} <= {"chatcmpl-1", "chatcmpl-other-0", "chatcmpl-other-1"}
    assert len({c["id"] for c in chunks}) == 1
    assert sum("role" in c["choices"][0]["delta"] for c in chunks) == 1
    assert b"token_ids" not in out


def test_tokens_without_text_are_generated_again() -> None:
    """Half of a character has no text yet; the other instance's would begin in its middle."""
    stream = Stream()
    stream.feed(event("", None, first=True) + event("a", [1]) + event("", [2]))
    stream.resume()
    assert stream.delivered() == [1]
    assert text_of(stream.feed(event("", [2]) + event("é", [3]))) == "é"
    assert stream.delivered() == [1, 2, 3]


def test_an_instance_that_says_it_failed_is_not_quoted() -> None:
    stream = Stream()
    out = stream.feed(event("a", [1]) + b'data: {"error": {"message": "dead"}}\n\n')
    assert text_of(out) == "a"
    assert b"dead" in stream.error
    stream.resume()
    assert stream.error == b""


def test_usage_counts_what_was_delivered_before_as_answer() -> None:
    stream = Stream()
    stream.feed(event("", None, first=True) + event("a", [1]) + event("b", [2]))
    stream.resume()
    usage = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    (chunk,) = parsed(stream.feed(event("c", [3], usage=usage)))
    assert chunk["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


def test_a_request_asks_for_token_ids_unless_it_says_otherwise() -> None:
    assert json.loads(with_token_ids(b'{"a": 1}')) == {"return_token_ids": True, "a": 1}
    assert json.loads(with_token_ids(b" { }")) == {"return_token_ids": True}
    own = json.loads(with_token_ids(b'{"return_token_ids": false}'))
    assert own == {"return_token_ids": False}


def test_the_rest_is_asked_for_from_the_tokens_on() -> None:
    body = {"messages": [], "max_tokens": 10, "min_tokens": 4, "kv_transfer_params": {
        "remote_host": "h", "do_remote_prefill": True, "own": 1}}  # fmt: skip
    made = resumed_body(body, PROMPT, [1, 2], chat=True)
    assert made["kv_transfer_params"] == {"own": 1, "prompt_token_ids": [5, 6, 7, 1, 2]}
    assert (made["max_tokens"], made["min_tokens"]) == (8, 2)
    made = resumed_body({"prompt": "p", "max_completion_tokens": 3}, PROMPT, [1], chat=False)
    assert (made["prompt"], made["max_completion_tokens"]) == ([5, 6, 7, 1], 2)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"n": 2}, "n is 2"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"seed": 0}, "seed"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"stop": ["x"]}, "stop"),
        ({"tools": [{}], "tool_choice": "required"}, "tool_choice 'required' keeps a state"),
        ({"include_reasoning": False}, "include_reasoning is False"),
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": True}, "echo"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, "more than text"),
    ],
)
def test_what_depends_on_where_an_answer_began_stays(body: dict[str, Any], part: str) -> None:
    assert part in reason_to_stay(body)


def test_an_ordinary_request_may_go() -> None:
    body = {"n": 1, "temperature": 0.7, "top_p": 0.9, "stop": [], "logprobs": False, "tools": None,
            "presence_penalty": 0.0, "repetition_penalty": 1.0, "response_format": {"type": "text"},
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}  # fmt: skip
    assert reason_to_stay(body) == ""


def test_an_answer_with_tools_can_go_on_until_a_call_begins() -> None:
    assert reason_to_stay({"tools": [{"type": "function"}], "tool_choice": "auto"}) == ""
    stream = Stream()
    stream.feed(event("", None, first=True) + event('I call "tool_calls":[{', [1]))
    held = event(None, [2])  # the beginning of a call, of which nothing is shown yet
    stream.feed(held)
    assert not stream.called
    assert stream.delivered() == [1]
    call = {"index": 0, "function": {"name": "weather", "arguments": ""}}
    stream.feed(event(None, [3]).replace(b'"delta":{}', b'"delta":' + json.dumps(
        {"tool_calls": [call]}, separators=(",", ":")).encode()))  # fmt: skip
    assert stream.called
