"""A draft model cut from a model's first layers, with its own embedding and output head.

Nothing is trained, so that such a draft agrees with its model as far as the layers that it lacks
change nothing:

    python -m benchmarks.lab.early_exit --layers 24
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lab.model import MODELS, one_at_a_time, prepare_smollm2


def prepare_early_exit(layers: int, cache: Path = MODELS) -> Path:
    """The folder of SmolLM2's first layers, made if missing.

    Raises:
        ValueError: it has not so many.
    """
    whole = prepare_smollm2(cache)
    target = cache / f"{whole.name}-first-{layers}"
    with one_at_a_time(cache / f".{target.name}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache) as name:
                cut(whole, Path(name) / "made", layers)
                (Path(name) / "made").rename(target)
    return target


def cut(whole: Path, target: Path, layers: int) -> None:
    """Write a model's first layers and what surrounds them.

    Args:
        whole: a folder with ``config.json`` and ``model.safetensors``.
        target: a folder that is made.
        layers: how many to keep.

    Raises:
        ValueError: the model has not so many.
    """
    from safetensors.torch import load_file, save_file  # late: only the first preparation needs it

    config = json.loads((whole / "config.json").read_text())
    if not 1 <= layers < config["num_hidden_layers"]:
        raise ValueError(f"layers is {layers}; allowed is 1 to {config['num_hidden_layers'] - 1}.")
    target.mkdir()
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
    weights = load_file(whole / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if _layer(name) < layers}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    config["num_hidden_layers"] = layers
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else 0  # what is in no layer is kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24, help="of SmolLM2's 30")
    print(prepare_early_exit(parser.parse_args(arguments).layers))


if __name__ == "__main__":
    main()
