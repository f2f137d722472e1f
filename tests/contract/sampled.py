"""A program: samples a Markov chain with our drafts and vLLM's own rejection sampler on CPU.

Prints how often each token followed each other one, and how many drafted tokens were accepted. It
is a process of its own, since vLLM's CPU kernels can only be put in place before numba is imported.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

current_platform.register_triton_kernel_overrides()

from vllm.v1.sample.rejection_sampler import rejection_sample  # noqa: E402

from xllm_spec_decode.drafters import PromptLookup  # noqa: E402
from xllm_spec_decode.recent import RecentOutputs  # noqa: E402
from xllm_spec_decode.slots import Request  # noqa: E402
from xllm_spec_decode.speculator import Speculator, Step  # noqa: E402

REQUESTS, MOST, LENGTH = 64, 4, 900
RANDOM: Any = SimpleNamespace(
    all_greedy=False, all_random=True, temperature=torch.ones(REQUESTS), generators={}
)


def chain(vocabulary: int) -> torch.Tensor:
    """The logits of the token that follows each token, ``[vocabulary, vocabulary]``."""
    logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(7))
    return 1.5 * logits


def main(tokens: int, vocabulary: int) -> None:
    """Sample so many tokens."""
    torch.manual_seed(1)
    logits = chain(vocabulary)
    drafters = {"ngram": PromptLookup(REQUESTS, 256), "suffix": RecentOutputs(REQUESTS, 1 << 20)}
    speculator = Speculator(drafters, REQUESTS, MOST)
    ids = [str(i) for i in range(REQUESTS)]
    texts = np.zeros((REQUESTS, LENGTH), np.int32)
    lengths, prompts = np.ones(REQUESTS, np.int64), np.ones(REQUESTS, np.int64)
    counts = np.zeros((vocabulary, vocabulary), np.int64)
    new = {one: Request("all") for one in ids}
    drafts: list[list[int]] = [[] for _ in ids]
    accepted = steps = 0
    while counts.sum() < tokens:
        last = texts[np.arange(REQUESTS), lengths - 1]
        before = [[int(last[i]), *draft] for i, draft in enumerate(drafts)]
        each = [len(draft) for draft in drafts]
        target = [token for one in before for token in one[:-1]]
        bonus = torch.softmax(logits[[one[-1] for one in before]], -1).multinomial(1)
        said = rejection_sample(
            torch.tensor([token for draft in drafts for token in draft], dtype=torch.int32),
            each,
            MOST,
            torch.tensor(np.cumsum(each), dtype=torch.int32),
            None,
            logits[target].contiguous(),
            bonus.to(torch.int32),
            RANDOM,
        ).tolist()
        spoken = [[token for token in one if token >= 0] for one in said]
        for i, one in enumerate(spoken):
            for token in one:
                counts[texts[i, lengths[i] - 1], token] += 1
                texts[i, lengths[i]] = token
                lengths[i] += 1
            accepted += len(one) - 1
        drafted = {ids[i]: each[i] for i in range(REQUESTS) if each[i]}
        step = Step(ids, new, (), drafted, REQUESTS + sum(each), prompts)
        drafts = speculator.propose(step, spoken, lengths, texts, 0.5 * steps)
        steps += 1  # all last half a second, so that drafts cost nothing and are long
        new = {}
    print(json.dumps({"counts": counts.tolist(), "accepted": accepted}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
