"""What this part raises."""

from xllm_plugins.errors import XllmError


class PlacementError(XllmError):
    """A placement or a load that cannot be used; the message says which, where and why."""
