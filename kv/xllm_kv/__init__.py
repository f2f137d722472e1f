"""The global KV cache: which instance holds which KV, in which tier."""
