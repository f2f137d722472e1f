"""Elastic scheduling: online and offline requests share one engine and online SLOs hold."""
