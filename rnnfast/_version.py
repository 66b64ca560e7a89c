"""Owns: the package's version, which setup.py and the extension share."""

__version__ = "0.1.0"
