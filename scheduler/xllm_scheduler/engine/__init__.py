"""The elastic scheduler inside one vLLM engine."""
