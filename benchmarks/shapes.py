"""Owns: the shapes that are measured, each with who needs it. Must not know: how anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

CELLS = ("rnn", "gru", "lstm")


@dataclass(frozen=True)
class Shape:
    """T steps, B rows, I input features, H hidden units, L layers, D directions."""

    name: str
    steps: int  # T
    batch: int  # B
    input_size: int  # I
    hidden_size: int  # H
    who: str
    layers: int = 1  # L
    directions: int = 1  # D
    packed: bool = False  # rows of 10 to 100 % of the steps, as a PackedSequence
    training: bool = True  # whether anyone trains at this shape
    cells: tuple[str, ...] = CELLS

    def flops(self, cell: str, steps: int) -> float:
        """Of a forward pass over ``steps`` full steps: the matrix products, input projection included."""
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
        width = self.hidden_size * self.directions
        terms = self.input_size + (self.layers - 1) * width + self.layers * self.hidden_size
        return 2.0 * steps * self.batch * gates * width * terms


# What people run. Robotics and recurrent policies reset states inside a sequence; torch.nn cannot, so here they do not.
DEMAND = (
    Shape("reference", 100, 64, 512, 512, "the usual benchmark of fused recurrent layers"),
    Shape("char_lm", 100, 1, 73, 128, "character language model, one text"),
    Shape("char_lm_batch", 64, 32, 128, 256, "character language model, many texts", layers=2),
    Shape("news", 40, 16, 64, 32, "text classification", packed=True),
    Shape("rl_small", 128, 8, 512, 128, "recurrent policy, few environments"),
    Shape("rl_sim_short", 24, 1024, 64, 256, "robotics simulated on an accelerator, short rollouts"),
    Shape("rl_sim_long", 128, 128, 64, 256, "robotics simulated on an accelerator, long rollouts"),
    Shape("basecall_1024", 1667, 96, 1024, 1024, "nanopore base calling, the accurate model", layers=5),
    Shape("basecall_384", 1667, 96, 384, 384, "nanopore base calling, the fast model", layers=5),
    Shape("amp", 16384, 16, 1, 18, "neural amplifier, training", layers=3),
    Shape("amp_play", 432000, 1, 1, 18, "neural amplifier, rendering", layers=3, training=False),
    Shape("separation", 258, 16, 512, 256, "music source separation", layers=3, directions=2),
    Shape("hydrology", 365, 256, 32, 128, "a year of days for every river gauge"),
    Shape("asr_packed", 500, 64, 89, 512, "speech recognition", layers=3, directions=2, packed=True),
    Shape("diarization", 589, 32, 60, 128, "who speaks when", layers=4, directions=2),
    Shape("tts", 128, 1, 384, 256, "speech synthesis", directions=2),
)

# Small and middling shapes of the CPU, where a step costs little and overhead much.
CPU = (
    Shape("b16_t40_h32", 40, 16, 64, 32, "short texts, small state"),
    Shape("b10_t23_h50", 23, 10, 100, 50, "tagging, odd sizes"),
    Shape("b32_t50_h64", 50, 32, 64, 64, "sensor windows"),
    Shape("b1_t128_h128", 128, 1, 128, 128, "one stream, replayed"),
    Shape("b64_t35_h128", 35, 64, 128, 128, "word language model"),
    Shape("b32_t100_h256", 100, 32, 256, 256, "middling batch and state"),
    Shape("b64_t128_h512", 128, 64, 512, 512, "where matrix products dominate"),
)

# One step of a stream: the time of a call of the module.
STEP = (
    Shape("step_h32", 1, 1, 16, 32, "control loop"),
    Shape("vad", 1, 1, 128, 128, "voice activity detection"),
    Shape("denoise", 1, 1, 256, 256, "noise suppression"),
    Shape("amp_live", 1, 1, 1, 18, "neural amplifier, sample by sample"),
)

# Packed input against torch.nn packed, beside news and asr_packed above.
PACKED = (Shape("packed_h128", 1000, 32, 128, 128, "long sequences of uneven length", packed=True),)

# A GPU's latency of a step at few rows, where all of W_hh has to stay on the chip.
CUDA = (
    Shape("b16_t512_h512", 512, 16, 512, 512, "one cluster holds W_hh"),
    Shape("b16_t512_h768", 512, 16, 768, 768, "the most that one cluster holds"),
)

GROUPS = {"demand": DEMAND, "cpu": CPU, "step": STEP, "packed": PACKED, "cuda": CUDA}
SHAPES = tuple(shape for group in GROUPS.values() for shape in group)
BY_NAME = {shape.name: shape for shape in SHAPES}
