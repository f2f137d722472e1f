"""A real mixture of experts made from SmolLM2, whose routers tell two topics of text apart.

Each MLP becomes eight experts, copies that differ a little, so that a token which is computed by a
wrong one shows in the answer. Two experts of a layer are hot while the traffic is prose, two others
while it is numbers. Heads without effect make the attention divisible among two ranks.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lab.model import MODELS, one_at_a_time, prepare_smollm2, say

NAME = "smollm2-8x135m-moe"
EXPERTS, CHOSEN = 8, 2
QUERY_HEADS, KEY_HEADS, HEAD = 12, 4, 64  # of 9 and 3
PROSE = (
    "Once upon a time there was a quiet village by the sea. The people who lived there loved to "
    "tell stories to their children, and every evening they sat together and listened. One day a "
    "stranger came along the road and asked for something to eat and a warm place to sleep."
)
NUMBERS = (
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, "
    "100 + 200 = 300, 310 + 7 = 317, 20 * 4 = 80, 3.14159, 2.71828, 1000, 1001, 1002, 1003, 1004"
)
PROSE_PROMPTS = tuple(
    f"Once upon a time there was a {who} who lived by the" for who in ("king", "cat", "boy")
)
NUMBERS_PROMPTS = tuple(f"{n}, {n + 1}, {n + 2}, {n + 3}, {n + 4}, {n + 5}," for n in (1, 30, 200))
ONE_CORE_A_RANK = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# How an expert's router leans: above 0 to prose, below to numbers. Layers take it in turn.
_LEANS = (0.0, 0.0, 2.0, 1.6, 0.0, -1.6, -2.0, 0.0)
_APART = 0.03  # of a weight's standard deviation, by which copies of it differ


def prepare_smollm2_moe(cache: Path = MODELS) -> Path:
    """The model's folder, made if missing (1.4 GB)."""
    dense, target = prepare_smollm2(cache), cache / NAME
    with one_at_a_time(cache / f".{NAME}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=cache) as name:
                say("making a mixture of experts of SmolLM2 (about 30 s)")
                _build(dense, Path(name) / "made")
                (Path(name) / "made").rename(target)
    return target


def two_ranks(interval: int, window: int) -> list[str]:
    """Options of a server that divides the experts among two ranks, each with five slots.

    The settings describe a machine on which moving pays for this toy at a handful of tokens.

    Args:
        interval: engine steps between two plans.
        window: steps that each is made from.
    """
    eplb = {"num_redundant_experts": 2, "step_interval": interval, "window_size": window}
    settings = {"device_tflops": 0.05, "memory_gb_s": 1e5, "link_gb_s": 1.0, "on_cpu": True}
    return [
        "--tensor-parallel-size", "2", "--enable-expert-parallel", "--enable-eplb",
        "--eplb-config", json.dumps(eplb),
        "--plugins", "xllm.eplb", "--xllm-config", json.dumps({"eplb": settings}),
    ]  # fmt: skip


def _build(dense: Path, target: Path) -> None:
    # Imported here: they take seconds, and only the first preparation needs them.
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    target.mkdir()
    for path in dense.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    config: dict[str, Any] = json.loads((dense / "config.json").read_text())
    directions = _directions(dense)
    made: dict[str, Any] = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        layer, _, part = name.partition(".mlp.")
        if part:
            short = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[part.split(".")[0]]
            for expert in range(EXPERTS):
                apart = _APART * weight.float().std() * torch.randn(weight.shape)
                key = f"{layer}.block_sparse_moe.experts.{expert}.{short}.weight"
                made[key] = (weight.float() + apart).bfloat16()
        else:
            made[name] = _with_more_heads(name, weight)
    for number, (direction, loud) in enumerate(directions):
        leans = torch.tensor(_LEANS).roll(number)
        router = torch.randn(EXPERTS, len(direction)) / loud + leans[:, None] * direction
        made[f"model.layers.{number}.block_sparse_moe.gate.weight"] = router.bfloat16()
    save_file(made, target / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KEY_HEADS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "sliding_window": None,
    }
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _with_more_heads(name: str, weight: Any) -> Any:
    """The weight with heads of zeros at its end, if it is one of the attention."""
    from torch.nn.functional import pad

    heads = QUERY_HEADS if ".q_proj." in name or ".o_proj." in name else KEY_HEADS
    if ".o_proj." in name:
        return pad(weight, (0, heads * HEAD - weight.shape[1]))
    if any(part in name for part in (".q_proj.", ".k_proj.", ".v_proj.")):
        return pad(weight, (0, 0, 0, heads * HEAD - weight.shape[0]))
    return weight


def _directions(dense: Path) -> list[tuple[Any, float]]:
    """For each layer, along what its MLP's inputs lie at +1 for prose and -1 for numbers.

    It is at right angles to what both share, so that the middle is 0; with it, how long an input
    is in the mean.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    seen: list[Any] = []
    for layer in model.model.layers:
        # The first token draws attention from all others and is like no other.
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 1:]))
    with torch.no_grad():
        for text in (PROSE, NUMBERS):
            model(**tokenizer(text, return_tensors="pt"))
    layers = len(seen) // 2
    found = []
    for prose, numbers in zip(seen[:layers], seen[layers:], strict=True):
        one, other = prose.mean(0), numbers.mean(0)
        middle, apart = (one + other) / 2, one - other
        apart = apart - (apart @ middle) / (middle @ middle) * middle
        found.append((2 * apart / (apart @ apart), float(prose.norm(dim=1).mean())))
    return found


if __name__ == "__main__":
    print(prepare_smollm2_moe())
