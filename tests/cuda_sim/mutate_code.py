"""Changes the stepwise kernels, one small change at a time, and asks whether the tests on the simulator notice.

Owns the choice of changes. Must not know what the kernels compute. Run it from the root of the repository:

    python tests/cuda_sim/mutate_code.py --count 20
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
FILES = ["stepwise_forward.cu", "stepwise_backward.cu", "stepwise.cuh"]
# A pattern, and what to put in its place.
CHANGES = [
    (r"(?<![\w.\[])\b0\b(?![\w.])", "1"),
    (r"(?<![\w.<])\b1\b(?![\w.>])", "2"),
    (r" < (?=[\w(])", " <= "),
    (r" \+ 1\b", ""),
    (r" - 1\b", ""),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r" == ", " != "),
    (r"!(?=[a-z])", ""),
    (r"\bif \((?!constexpr)", "if (false && "),
    (r"\? ", "&& false ? "),
    (r" \+= ", " = "),
    (r"\breverse\b", "(!reverse)"),
]


class Mutant(NamedTuple):
    file: str
    line: int  # from 0
    text: str


def mutants(file: str) -> Iterator[Mutant]:
    for number, line in enumerate((ROOT / "csrc" / "cuda" / file).read_text().splitlines()):
        code = line.split("//")[0]
        default = re.match(r"\s*(const )?\w[^()]*= (0|nullptr|false)[;,]", code)  # of a member, which is always set
        if code.lstrip().startswith("#") or "template" in code or default:
            continue
        for pattern, replacement in CHANGES:
            for match in re.finditer(pattern, code):
                yield Mutant(file, number, line[: match.start()] + replacement + line[match.end() :])


def verdict(copy: Path, mutant: Mutant) -> str:
    """What a copy of the repository says of a mutant: noticed, missed, or does not compile."""
    path = copy / "csrc" / "cuda" / mutant.file
    original = path.read_text()
    lines = original.splitlines()
    lines[mutant.line] = mutant.text
    path.write_text("\n".join(lines) + "\n")
    tests = "test_kernels_against_reference or test_kernels_have_no_races"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "tests/test_cuda_sim.py", "-k", tests]
    try:
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=600)
    except subprocess.TimeoutExpired:
        return "noticed"
    finally:
        path.write_text(original)
    if done.returncode == 0:
        return "missed"
    return "does not compile" if "RuntimeError: g++" in done.stdout else "noticed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="how many changes to try")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    options = parser.parse_args()
    everything = [mutant for file in FILES for mutant in mutants(file)]
    chosen = random.Random(options.seed).sample(everything, min(options.count, len(everything)))
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs"))
        verdicts = {mutant: verdict(copy, mutant) for mutant in tqdm(chosen)}
    for kind in ("noticed", "does not compile", "missed"):
        print(f"{kind}: {sum(v == kind for v in verdicts.values())}")
    for mutant, answer in verdicts.items():
        if answer == "missed":
            print(f"  {mutant.file}:{mutant.line + 1}: {mutant.text.strip()}")


if __name__ == "__main__":
    main()
