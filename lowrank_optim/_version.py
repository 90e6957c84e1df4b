"""The version and its date, in one place that can be read without importing torch."""

__version__ = "0.4.0"
__released__ = "2026-11-21"
