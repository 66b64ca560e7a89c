"""Owns: the account of what was built and what is in use here. Must not know: how a layer runs."""

from __future__ import annotations

import torch

from . import _extension
from ._version import __version__


def show_config() -> str:
    """The versions, what was compiled and why not more, and what the CPU engine uses, as a few lines of text."""
    extension = _extension.extension
    facts = {"rnnfast": __version__, "torch": torch.__version__}
    if extension is None:
        facts["extension"] = f"none: {_extension.error}"
    else:
        info = extension.build_info()
        facts["extension"] = f"rnnfast._C, compiled by {info['compiler']}"
        facts["CUDA kernels"] = info["cuda_archs"] or f"none: {info['no_cuda_reason']}"
        facts["instruction set"] = f"{extension.instruction_set()} of {', '.join(extension.instruction_sets())}"
    facts["CUDA devices"] = ", ".join(_cuda_devices()) or "none"
    facts["threads"] = str(torch.get_num_threads())
    return "\n".join(f"{name:<16} {fact}" for name, fact in facts.items())


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [
        f"{torch.cuda.get_device_name(i)} ({'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
