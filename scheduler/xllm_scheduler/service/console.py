"""The console: one page without a build step, which asks the router for its status."""

from __future__ import annotations

from importlib.resources import files

PAGE = files("xllm_scheduler.service").joinpath("console.html").read_bytes()
