"""Fused recurrent layers for PyTorch, with torch.nn's interface."""

__version__ = "0.1.0"
