"""The errors of xllm-plugins. Each message says what was wrong, where, and what would be right."""


class XllmError(Exception):
    """The base of every error that this package raises on purpose."""


class ConfigError(XllmError):
    """A setting or selection that cannot be used as given."""


class FeatureError(XllmError):
    """A feature that was asked for (mode ``on``) cannot work here."""


class NotAvailableError(XllmError):
    """Raised by a feature's ``attach`` to stand back; its message is the reason shown."""


class CompatError(XllmError):
    """A seam in vLLM is not what its compat file relies on, or was patched twice."""
