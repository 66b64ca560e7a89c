"""Owns: loading the compiled extension rnnfast._C. Must not know: its operators.

Without it the package runs on the reference path; that is said once, with the cause, when this module is imported.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch


def load() -> tuple[ModuleType | None, str]:
    """The extension and an empty string, or None and why there is none."""
    try:
        extension = import_module("rnnfast._C")
    except ModuleNotFoundError:
        record = Path(__file__).with_name("not_built.txt")
        sources = (
            f"the package was imported from its sources in {Path(__file__).parents[1]}, which come before an installed "
            "one where Python is started there: start it elsewhere, or install with pip's --editable"
        )
        reason = record.read_text() if record.exists() else sources
        return None, f"the extension rnnfast._C was not built: {reason}"
    except ImportError as error:
        return None, f"the extension rnnfast._C does not load, was it built for another torch? {error}"
    built_for = extension.build_info()["torch"]
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        return None, f"the extension rnnfast._C was built for torch {built_for}, and this is torch {torch.__version__}"
    return extension, ""


extension, error = load()

if extension is None:
    warnings.warn(f"rnnfast runs on its slow reference path: {error}", RuntimeWarning, stacklevel=2)
