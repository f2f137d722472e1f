"""Tiers of KV behind the device: vLLM's offloading, with our decisions."""
