"""Adaptive speculative decoding: whose draft, how far, and when not at all."""
