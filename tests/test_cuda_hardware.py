"""The wrappers of device_ptx.h on a real GPU: each computes there what its second body computes on the simulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or NVCC is None, reason="a GPU and nvcc are needed")


def test_features_work_on_the_gpu(tmp_path: Path) -> None:
    """The same program that the simulator runs, but for its planted mistakes and what the GPU is too old for."""
    program = tmp_path / "features"
    source = ROOT / "tests" / "cuda_sim" / "subjects" / "features.cu"
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    arch = "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())
    subprocess.run([str(NVCC), "-std=c++20", arch, *include, str(source), "-o", str(program)], check=True)
    names = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    features = [name for name in names if not name.startswith("BAD_")]
    if torch.cuda.get_device_capability() < (9, 0):
        features = [name for name in features if not name.startswith("cluster")]
    assert features
    failed = {}
    for name in features:  # all of them: a device is seldom at hand
        try:
            done = subprocess.run([str(program), name], capture_output=True, text=True, check=False, timeout=20)
        except subprocess.TimeoutExpired:
            failed[name] = "it hangs"
            continue
        if (done.returncode, done.stdout) != (0, "error 0 wrong 0\n"):
            failed[name] = f"{done.stdout}{done.stderr}"
    assert not failed
