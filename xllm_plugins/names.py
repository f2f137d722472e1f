"""Names that reach across processes; importing them costs nothing."""

ENTRY_POINT = "xllm"
ENV_SELECTION = "XLLM_PLUGINS"
ENV_CONFIG = "XLLM_CONFIG"
ENV_ALLOW_LIST = "VLLM_PLUGINS"
