"""A trace as a picture: the load of devices, first and last, and moves against balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from xllm_eplb.replay import Score, device_shares
from xllm_eplb.trace import Window
from xllm_plugins.errors import ConfigError

matplotlib.use("agg")

from matplotlib import pyplot

_HOTTEST = 2.0  # of the mean: the end of the colour scale


def draw(
    windows: Sequence[Window],
    frontier: Mapping[float, Score],
    others: Mapping[str, Score],
    path: Path,
) -> None:
    """Write the picture.

    Args:
        windows: of a trace.
        frontier: what our policy makes of it, by ``wanted``.
        others: what other rules make of it, by name.
        path: its ending says the format.

    Raises:
        ConfigError: a format that matplotlib does not write.
    """
    figure, (first, last, right) = pyplot.subplots(
        1, 3, figsize=(13, 5), width_ratios=(1, 1, 1.3), layout="constrained"
    )
    for axes, window in ((first, windows[0]), (last, windows[-1])):
        image = axes.imshow(
            device_shares(window), vmin=0.0, vmax=_HOTTEST, aspect="auto", cmap="coolwarm"
        )
        axes.set(xlabel="device", ylabel="layer", title=f"window of plan {window.plan}")
    figure.colorbar(image, ax=[first, last], label="load of a device by the layer's mean")
    points = sorted(frontier.items())
    right.plot([s.moves for _, s in points], [s.balance for _, s in points], "o-", label="ours")
    for wanted, score in points[:: max(1, len(points) // 4)]:
        right.annotate(f"wanted {wanted:g}", (score.moves, score.balance), fontsize=8)
    for name, score in others.items():
        right.plot([score.moves], [score.balance], "s", label=name)
    right.set(xlabel="slots moved by a plan", ylabel="max/mean on the next window")
    right.legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"The picture {path} cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)
