"""A virtual cluster: vLLM's own scheduler and KV cache manager per instance, on a virtual clock.

Only the model's forward pass is replaced, by a step-time model. Nothing sleeps; time jumps from
event to event, so a run is fast and the same for the same seed.
"""
