"""What a model says to a few prompts, and which features were active: one process for each try.

    python -m tests.zoo.answers FOLDER

Prompts come twice, longer together than the device's cache, some online and some offline, and they
repeat themselves: so all that the features do is done to them. The last line printed is JSON.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

PROMPTS, ANSWER, VOCABULARY = 10, 24, 1024
BLOCK, BLOCKS = 32, 48  # fewer tokens than all prompts


def prompts() -> list[list[int]]:
    """Token ids; neighbours share a beginning, and each repeats its own middle."""
    found, draw = [], random.Random(0)
    for number in range(PROMPTS):
        begin = random.Random(number // 2).choices(range(8, VOCABULARY), k=70)
        middle = draw.choices(range(8, VOCABULARY), k=30 + 8 * number)
        found.append(begin + middle + middle)
    return found


def main() -> None:
    """Ask, and print."""
    from vllm import LLM, SamplingParams

    from xllm_plugins.activation import active_features

    llm = LLM(
        sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_num_seqs=8,
        max_model_len=512, max_num_batched_tokens=256, seed=0, disable_log_stats=False,
        **more(sys.argv[1]),
    )  # fmt: skip
    said: list[list[int]] = []
    for _ in range(2):
        params = [
            SamplingParams(
                max_tokens=ANSWER, temperature=0, ignore_eos=True, detokenize=False,
                extra_args={"xllm_class": "offline"} if number % 3 == 0 else None,
            )
            for number in range(PROMPTS)
        ]  # fmt: skip
        asked: Any = [{"prompt_token_ids": tokens} for tokens in prompts()]
        answers = llm.generate(asked, params, use_tqdm=False)
        said += [list(answer.outputs[0].token_ids) for answer in answers]
    config = llm.llm_engine.vllm_config
    active = [feature.name for feature in active_features(config)]
    metrics = {one.name: getattr(one, "value", 0) for one in llm.get_metrics()}
    print(json.dumps({"said": said, "active": active, "metrics": metrics}))


def more(folder: str) -> dict[str, Any]:
    """Arguments that not all models take."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    made: dict[str, Any] = {}
    if getattr(config, "vision_config", None) is not None:
        made["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if not layers & {"mamba", "linear_attention"}:
        made |= {"block_size": BLOCK, "num_gpu_blocks_override": BLOCKS}
    return made


if __name__ == "__main__":
    main()
