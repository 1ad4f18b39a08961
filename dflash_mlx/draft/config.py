"""What a draft is, whichever packaging said so: the one config that every reader fills."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The attention kinds of layer_types.
FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
        theta: the base.
        scaling: Transformers' rope parameters other than the base; None for none.
        interleaved: pairs are neighbours instead of halves.
        max_positions: of the config; None when it does not say.
        share: of a head's dimensions, how much is rotated.
    """

    theta: float
    scaling: Mapping[str, Any] | None = None
    interleaved: bool = False
    max_positions: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """How one layer attends.

    Attributes:
        rope: its rotary positions.
        window: it sees a context row only at a distance below this, its own row counted; None for
            all rows.
        anchored: every row of the block sees the same context, the last `window` rows of it.
        causal: a row of the block sees no later row of the block.
        sinks: it has a logit per head that takes part in the softmax and has no value.
    """

    rope: Rope
    window: int | None = None
    anchored: bool = False
    causal: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    """What the attention of all layers has in common.

    Attributes:
        bias: of the projections.
        fused: queries, keys and values are one projection, `qkv_proj`, whose bias is `bias`.
        gating: "per-head" or "per-element" multiplies the result by softplus(g_proj(x)).
        values_from_keys: there is no v_proj; values are the keys before norm and rotation.
        value_norm: values are normalised per head, without a weight.
        scale: of the scores; None is head_dim ** -0.5.
    """

    bias: bool = False
    fused: bool = False
    gating: str | None = None
    values_from_keys: bool = False
    value_norm: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class ContextConfig:
    """How tapped outputs become what the layers see.

    Attributes:
        tap_norms: each tap is normalised before fc.
        layer_norms: a context row passes each layer's input norm before its keys and values.
        fusion: each layer adds its own mixture of the taps.
    """

    tap_norms: bool = False
    layer_norms: bool = False
    fusion: bool = False


@dataclass(frozen=True)
class VocabularyConfig:
    """Token ids in and out.

    Attributes:
        size: of the target's vocabulary as the draft knows it; None where nothing depends on it.
        draft_size: rows of a reduced vocabulary of the draft's own; None without one.
        own_embedding, own_head: the draft has these itself; the target's are left aside then.
        tied: its head is its embedding.
        embedding_scale: factor of its own embedding.
        mask_embedding: what stands for the mask is a vector of its own.
    """

    size: int | None
    draft_size: int | None = None
    own_embedding: bool = False
    own_head: bool = False
    tied: bool = False
    embedding_scale: float = 1.0
    mask_embedding: bool = False


@dataclass(frozen=True)
class ConvolutionConfig:
    """DFlash 2's convolutions over the block."""

    kernel_size: int
    group_size: int


@dataclass(frozen=True)
class SelectorConfig:
    """DFlash 2's selector: rank of its codebooks, candidates per position."""

    rank: int
    top_k: int


@dataclass(frozen=True)
class MarkovConfig:
    """DSpark's chain: rank, and "vanilla", "gated" or "rnn"."""

    rank: int
    kind: str


@dataclass(frozen=True)
class RefinerConfig:
    """XPress's refiner: rank, width of its MLP over rank, Jacobi passes."""

    rank: int
    mlp_ratio: int
    passes: int


@dataclass(frozen=True)
class CorrectionConfig:
    """DFly's correction of hidden states: its inner width."""

    width: int


HeadConfig = SelectorConfig | MarkovConfig | RefinerConfig | CorrectionConfig


@dataclass(frozen=True)
class DraftConfig:
    """A draft, defaults filled in.

    Attributes:
        packaging: who packs drafts so, in words.
        architecture: the class its config.json names.
        hidden_size, target_hidden_size: of the draft and of the tapped outputs.
        num_attention_heads, num_key_value_heads, head_dim, intermediate_size, rms_norm_eps: of a
            layer.
        block_size: rows of a block, the anchor's included.
        anchor_proposes: row k of a block proposes the token k + 1 positions after the anchor's, so
            that the anchor's own row proposes too; else the token at its own position.
        mask_token_id: what fills a block behind the anchor.
        target_layer_ids: the target's layers whose outputs are tapped, 0-based; -1 is its
            embedding's output.
        num_target_layers: None when the file does not say.
        layers: one for each layer.
        sandwich: norms behind the sublayers as well, and a factor for each layer.
        activation: of the MLP, "silu" or "gelu".
        input_scale: factor of all block embeddings.
        output_multiplier, final_logit_softcapping: applied to the head's logits, in this order.
        head: what makes proposals of logits; None where each row stands alone.
        confidence: there is a confidence head; with_markov, if it sees the chain's embedding.
        quantization: MLX's block of the config.json, checked.
    """

    packaging: str
    architecture: str
    hidden_size: int
    target_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    block_size: int
    anchor_proposes: bool
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    layers: tuple[LayerConfig, ...]
    vocabulary: VocabularyConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    sandwich: bool = False
    activation: str = "silu"
    input_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    convolution: ConvolutionConfig | None = None
    head: HeadConfig | None = None
    confidence: bool = False
    confidence_with_markov: bool = False
    quantization: dict[str, Any] | None = None

    @property
    def num_hidden_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Of the target, as the draft knows it; 0 where nothing depends on it."""
        return self.vocabulary.size or 0

    @property
    def first_row(self) -> int:
        """The first row of a block that proposes."""
        return 0 if self.anchor_proposes else 1

    @property
    def most_proposals(self) -> int:
        """Proposals that a block makes at most."""
        return self.block_size - self.first_row

    @property
    def is_dflash1(self) -> bool:
        """Whether it is DFlash 1 in its authors' own packaging, and nothing beyond it."""
        plain = (
            self.packaging == "DFlash 1"
            and self.convolution is None
            and self.head is None
            and not self.confidence
        )
        return (
            plain
            and not (self.anchor_proposes or self.sandwich)
            and self.attention == AttentionConfig(bias=self.attention.bias)
            and self.context == ContextConfig()
            and self.vocabulary == VocabularyConfig(self.vocabulary.size)
            and not any(layer.anchored or layer.sinks for layer in self.layers)
        )
