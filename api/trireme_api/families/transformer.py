"""What transformers of every family share: the numbers of a block, and its arithmetic."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator

from trireme_api.families.activations import BlockMemory, Pass, PerToken, Unit
from trireme_api.families.base import ModelConfig, ParameterCount
from trireme_api.schema import PositiveInt

PAD_TOKEN = 1
"""Of fairseq's dictionaries, which every family here inherits: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3."""
POSITION_OFFSET = PAD_TOKEN + 1
"""The first token of a sequence takes row 2 of the position table; row 1 belongs to padding, row 0 to nothing."""


class TransformerConfig(ModelConfig):
    """Blocks of self-attention and a feed-forward layer, all projections with biases, two LayerNorms a block."""

    layers: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    feed_forward_width: PositiveInt = Field(default_factory=lambda data: 4 * data["width"])
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """After the attention and feed-forward sub-layers; where a family drops embeddings too, with the same rate."""
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            whole = [n for n in range(1, self.width + 1) if self.width % n == 0]
            near = max(n for n in whole if n < self.heads), min((n for n in whole if n > self.heads), default=1)
            raise ValueError(
                f"width must be a multiple of heads; {self.width} is not a multiple of {self.heads}; set heads to "
                f"{near[0]}" + (f" or {near[1]}" if near[1] > 1 else "")
            )
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @abstractmethod
    def outer_parameters(self) -> int:
        """Parameters outside the blocks: token and position tables, last norm, output layer where it is not tied."""

    @abstractmethod
    def outer_flops_per_token(self) -> float:
        """Forward FLOPs per token outside the blocks, output layer included."""

    @abstractmethod
    def lookup_parameters(self) -> int:
        """Parameters that are only looked up and multiply nothing: position tables."""

    def block_parameters(self) -> int:
        d, f = self.width, self.feed_forward_width
        attention = 4 * (d * d + d)
        feed_forward = 2 * d * f + f + d
        norms = 2 * 2 * d
        return attention + feed_forward + norms

    def undivided_parameters(self) -> int:
        """Of a dense block, those that tensor parallelism does not divide: norms, biases of the projections back."""
        return 6 * self.width

    def unit(self, index: int) -> Unit:
        return Unit(self.block_parameters(), undivided=self.undivided_parameters())

    @property
    def nonlinearity(self) -> Literal["gelu", "relu", "relu2"]:
        return "gelu"

    def block_memory(self, index: int, one: Pass) -> BlockMemory:
        # Input, normalised input, sum after attention, that normalised; post-LN: sum, input of each sub-layer.
        stream = PerToken(values=4 * self.width, masks=2 * self.width * (self.dropout > 0))
        inner = self.feed_forward_memory(index, one)
        attention, scores = self.attention_memory(one)
        # Attention's backward pass comes when the feed-forward layer's tensors are gone.
        work = max(inner.work, scores + inner.kept * -1.0, key=lambda part: part.bytes(one))
        return BlockMemory(stream + attention + inner.kept, work, inner.weight_gradients)

    def attention_memory(self, one: Pass) -> tuple[PerToken, PerToken]:
        """Kept, and the most its backward pass adds: queries, keys, values and what attention gives; one number a head
        for the scores, or the scores themselves."""
        d, heads = self.width / one.tensor, self.heads / one.tensor
        if one.fused_dropout or self.attention_dropout == 0:
            return PerToken(values=4 * d, single=heads), PerToken(values=4 * d + self.width)
        scores = heads * one.length
        # Probabilities, their mask, and what the mask left of them; fp32, as are queries, keys and values.
        return PerToken(values=d, single=3 * d + 3 * scores), PerToken(values=d + self.width, single=3 * d + 2 * scores)

    def feed_forward_memory(self, index: int, one: Pass) -> BlockMemory:
        d, f = self.width, self.feed_forward_width // one.tensor
        # ReLU keeps its result, which the next product needs as well; GELU its input; squared ReLU both its results.
        kept = f if self.nonlinearity == "relu" else 2 * f
        work = f if self.nonlinearity == "gelu" else 2 * f
        return BlockMemory(PerToken(values=kept), PerToken(values=work + d), d * f)

    def parameters(self) -> ParameterCount:
        total = self.outer_parameters() + self.layers * self.block_parameters()
        return ParameterCount(total=total, activated=total)

    def block_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        d, f = self.width, self.feed_forward_width
        keys = (sequence_length + 1) / 2 if causal and self.causal else sequence_length
        projections = 2 * (4 * d * d + 2 * d * f)
        attention = 2 * 2 * d * keys
        return float(self.layers * (projections + attention))

    def recomputed_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        # A pre-LN block ends with fc2, whose result nobody's gradient needs.
        last = 2 * self.feed_forward_width * self.width
        return self.block_flops_per_token(sequence_length, causal=causal) - self.layers * last

    def forward_flops_per_token(self, sequence_length: int, *, causal: bool = True) -> float:
        return self.block_flops_per_token(sequence_length, causal=causal) + self.outer_flops_per_token()

    def palm_flops_per_token(self, sequence_length: int) -> float:
        multiplying = self.parameters().total - self.lookup_parameters()
        return float(6 * multiplying + 12 * self.layers * self.width * sequence_length)
