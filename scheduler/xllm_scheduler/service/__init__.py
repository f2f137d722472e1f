"""The service in front of several instances: here, the interface of its policies."""
