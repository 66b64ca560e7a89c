"""Owns: the rate of torch's own micro-kernel for small matrix products on this CPU, the roof over every time step.

Must not know: recurrent layers. Needs a C++ compiler, once; what it built is kept in torch's extension cache.
"""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils import cpp_extension

SOURCE = r"""
#include <ATen/native/CPUBlas.h>

// c [tiles, m, n] = a [m, k] b [tiles, k, n], as often as told; every tile of b is contiguous, as packed weights are.
extern "C" void products(int64_t m, int64_t n, int64_t k, int64_t tiles, int64_t repeats, const float* a,
                         const float* b, float* c) {
  for (int64_t i = 0; i < repeats; ++i)
    for (int64_t tile = 0; tile < tiles; ++tile)
      at::native::cpublas::brgemm(m, n, k, k, n, n, false, a, b + tile * k * n, c + tile * m * n);
  at::native::cpublas::brgemm_release(false);
}
"""


class Brgemm:
    """Measures the product of one time step: h [B, H] with the weights [H, 4H], the columns divided among threads."""

    def __init__(self) -> None:
        """Raises RuntimeError where the measuring code cannot be built."""
        path = cpp_extension.load_inline(
            "rnnfast_benchmark_brgemm",
            SOURCE,
            extra_cflags=["-O2"],
            is_python_module=False,
            no_implicit_headers=True,
        )
        self._products = ctypes.CDLL(path).products  # a foreign call leaves the GIL to the other threads
        self._rates: dict[tuple[int, int, int], float] = {}

    def rate(self, batch: int, hidden: int, threads: int) -> float:
        """FLOP/s, all threads together, with the best of a few widths of tiles."""
        key = batch, hidden, threads
        if key not in self._rates:
            self._rates[key] = max(self._measure(batch, hidden, threads, width) for width in (32, 64, 128))
        return self._rates[key]

    def _measure(self, batch: int, hidden: int, threads: int, width: int, seconds: float = 0.05) -> float:
        tiles = -(-4 * hidden // width // threads)
        flops = 2.0 * batch * hidden * width * tiles  # of one thread's share of a step
        operands = [
            (torch.randn(batch, hidden), torch.randn(tiles, hidden, width), torch.empty(tiles, batch, width))
            for _ in range(threads)
        ]

        def run(repeats: int, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
            sizes = (ctypes.c_int64(size) for size in (batch, width, hidden, tiles, repeats))
            self._products(*sizes, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))

        with ThreadPoolExecutor(threads) as pool:

            def timed(repeats: int) -> float:
                start = time.perf_counter()
                list(pool.map(run, [repeats] * threads, operands))
                return time.perf_counter() - start

            timed(1)
            repeats = max(1, int(seconds * 5e10 / flops))
            return threads * flops * repeats / min(timed(repeats) for _ in range(3))
