"""Owns: how C++ is compiled, for setup.py and for cells of one's own. Must not know the rest of the package: setup.py
reads this file before there is one.
"""

from __future__ import annotations

from pathlib import Path

import torch

CXX_FLAGS = [
    "-O3",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # Python's own flags ask for debug information, which takes long and makes the library huge
    "-Wno-psabi",  # a note on passing SIMD vectors by value, which never crosses from one instruction set to another
]


def openmp_library() -> list[str]:
    """Link arguments that make a library share torch's OpenMP run time: two in a process fight for cores."""
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]
