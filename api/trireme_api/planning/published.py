"""Speeds that others have published, told as tokens per second and device: what the speed model was fitted to.

Shapes are put in terms of the gpt family, which has the same products; a gated feed-forward layer is widened to the
same number of parameters. Where a figure is in TFLOPS, tokens follow from the FLOPs its authors counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api.families.gpt import GptConfig


@dataclass(frozen=True)
class PublishedSpeed:
    name: str
    board: str
    gpus: int
    layers: int
    width: int
    heads: int
    sequence_length: int
    micro: int
    checkpointing: bool
    tokens_per_second: float
    """Per device."""
    source: str
    vocabulary: int = 50368
    feed_forward_width: int | None = None
    fitted: bool = True
    """False: held back from the fit, to check it with."""

    @property
    def config(self) -> GptConfig:
        inner = {} if self.feed_forward_width is None else {"feed_forward_width": self.feed_forward_width}
        return GptConfig(
            layers=self.layers, width=self.width, heads=self.heads, vocabulary_size=self.vocabulary,
            maximum_positions=self.sequence_length, dropout=0.0, attention_dropout=0.0, **inner,
        )  # fmt: skip


_FOUNDRY = "llm-foundry scripts/train/benchmarking (FSDP, no checkpointing)"
_FSDP = "FSDP paper (2304.11277) §5.4: {} TFLOPS, taken as computed ones with recomputation"
_OPT = "OPT (2205.01068) §2.4: 147 TFLOPS, which is Megatron's count with recomputation; tensor parallel 8, no reshard"
_LLAMA = "Llama 3 (2407.21783) Table 4: {} TFLOPS; tensor and pipeline parallel"
# 96·l·h²·(1 + s/6h + V/16lh) of OPT-175B, with recomputation (Megatron, 2104.04473).
_OPT_FLOPS = 4.302e23 / 300e9
_GPT_175B = (96, 12288, 96)
_FMS = "fms-fsdp README (hybrid sharding, compiled, no checkpointing)"
_LLAMA_7B = (32, 4096, 32)
_LLAMA_405B = (126, 16384, 128)

PUBLISHED = (
    PublishedSpeed("MPT 125M", "a100-80", 8, 12, 768, 12, 2048, 8, False, 142_800, _FOUNDRY),
    PublishedSpeed("MPT 350M", "a100-80", 8, 24, 1024, 16, 2048, 8, False, 58_800, _FOUNDRY),
    PublishedSpeed("MPT 760M", "a100-80", 8, 24, 1536, 12, 2048, 8, False, 32_400, _FOUNDRY),
    PublishedSpeed("MPT 1.3B", "a100-80", 8, 24, 2048, 16, 2048, 8, False, 20_500, _FOUNDRY),
    PublishedSpeed("GPT-175B, batch 1", "a100-80", 512, *_GPT_175B, 2048, 1, True, 173e12 / _OPT_FLOPS,
                   _FSDP.format(173), vocabulary=50_000),
    PublishedSpeed("GPT-175B, batch 2", "a100-80", 512, *_GPT_175B, 2048, 2, True, 186e12 / _OPT_FLOPS,
                   _FSDP.format(186), vocabulary=50_000),
    PublishedSpeed("OPT-175B", "a100-80", 992, *_GPT_175B, 2048, 1, True, 147e12 / _OPT_FLOPS, _OPT,
                   vocabulary=50_272),
    PublishedSpeed("MPT 760M", "h100", 8, 24, 1536, 12, 2048, 8, False, 63_100, _FOUNDRY),
    PublishedSpeed("MPT 1.3B", "h100", 8, 24, 2048, 16, 2048, 8, False, 45_500, _FOUNDRY),
    PublishedSpeed("MPT 3B", "h100", 16, 32, 2560, 20, 2048, 8, False, 24_100, _FOUNDRY),
    PublishedSpeed("MPT 7B", "h100", 8, 32, 4096, 32, 2048, 4, False, 10_600, _FOUNDRY),
    PublishedSpeed("Llama 3 8B", "h100", 8, 32, 4096, 32, 8192, 2, True, 5_762,
                   "torchtitan benchmarks/llama3_h100_202412 (FSDP2, eager, selective checkpointing, 500 W boards)",
                   vocabulary=128_256, feed_forward_width=18_944),
    PublishedSpeed("Llama 3 405B", "h100", 16_384, *_LLAMA_405B, 8192, 1, False,
                   400e12 / (6 * 405e9 + 12 * 126 * 16384 * 8192), _LLAMA.format(400),
                   vocabulary=128_256, feed_forward_width=64_512),
    PublishedSpeed("Llama 2 7B", "a100-80", 128, *_LLAMA_7B, 4096, 2, False, 4_550, _FMS, vocabulary=32_000,
                   feed_forward_width=16_512, fitted=False),
    PublishedSpeed("Llama 2 7B", "h100", 96, *_LLAMA_7B, 4096, 2, False, 9_600, _FMS, vocabulary=32_000,
                   feed_forward_width=16_512, fitted=False),
)  # fmt: skip
