"""The framework that brings xLLM's serving techniques into an unmodified vLLM."""

from xllm_plugins._version import __version__

__all__ = ["__version__"]
