"""The shape and the constants of a network, whichever generation wrote its config.json."""

from __future__ import annotations

from dataclasses import dataclass

from qwenrt.config.quant import QuantConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # what a model computes in, by name


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): frequencies slower than ``beta_slow`` turns within ``original_length`` tokens are
    divided by ``factor``, faster ones than ``beta_fast`` are kept, those between are blended; cos and sin are
    multiplied by ``attention_factor``. Static: the same for every length."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts: each token goes to ``top_k`` of ``num_experts`` MLPs of width ``intermediate_size``.

    ``shared_intermediate_size``: width of the expert every token goes to as well, 0 where there is none.
    ``norm_topk_prob``: the chosen experts' weights are made to sum to 1. ``dense_layers``: layers that keep one
    MLP of the model's own intermediate_size.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    norm_topk_prob: bool = False
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Gated delta nets (arXiv 2412.06464) in place of attention in ``layers``: what a sequence has said is kept in a
    matrix [key_dim, value_dim] for each of ``num_value_heads``, whatever its length.

    ``num_key_heads`` divides num_value_heads: as many value heads share a query and a key. Queries, keys and values
    each pass a causal convolution over the last ``conv_kernel`` tokens, channel by channel. ``grouped``: the file has
    the rows of its projections key head by key head (Qwen3-Next), which is undone when they are read. ``converted``:
    the file is as llama.cpp's converter leaves it: norms have their 1, decays are -exp(A_log), and unless grouped,
    value head h reads key head h mod num_key_heads (`tiled`), not h // (num_value_heads / num_key_heads).
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    layers: frozenset[int]
    grouped: bool = False
    converted: bool = False

    @property
    def tiled(self) -> bool:
        """Whether the value heads that share a key head are num_key_heads apart, not beside each other."""
        return self.converted and not self.grouped

    @property
    def keys(self) -> int:
        """Channels of all queries, and of all keys."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Channels that are convolved: queries, keys, values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class ModelConfig:
    """``model_type`` names the generation: "qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5"
    or "qwen3_5_moe".

    ``intermediate_size`` is the width of each MLP projection (Qwen-1's config.json stores twice that).
    ``train_length`` is Qwen-1's seq_length: the length NTK and LogN are relative to, not the longest context.
    ``qkv_bias``, ``o_bias``, ``mlp_bias``: which linears have biases. ``qk_norm``: queries and keys are normalised
    head by head. ``windows``: for each layer how many tokens a query sees, itself included (0: all); empty where no
    layer is limited. ``is_causal``: whether a token sees only earlier ones; some models for embeddings see later ones
    as well, and generate nothing. ``linear_attention``: layers that keep a state in place of keys and values;
    ``attn_gate``: the others multiply what they attended to by a gate, which q_proj gives beside the query;
    ``zero_centred_norms``: the file has the weights of norms less 1. ``mtp_layers``: of a head that guesses the token
    after next (MTP), which is a part of the network where ``with_mtp`` says that it is to be loaded. ``eos_token_ids``:
    those named in config.json.
    ``dtype`` is None where the checkpoint does not say. ``tie_word_embeddings``: the head is the embedding;
    ``has_head``: False where the files have no head at all, which is enough for embeddings. Files overrule config.json:
    see loader.checkpoint.as_stored.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    train_length: int
    max_position_embeddings: int
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    tie_word_embeddings: bool = False
    has_head: bool = True
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    is_causal: bool = True
    yarn: YarnConfig | None = None
    moe: MoeConfig | None = None
    linear_attention: LinearAttentionConfig | None = None
    attn_gate: bool = False
    zero_centred_norms: bool = False
    mtp_layers: int = 0
    with_mtp: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    quant: QuantConfig | None = None

    def window(self, layer: int) -> int:
        """How many tokens a query of a layer sees, itself included; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def is_linear(self, layer: int) -> bool:
        """Whether a layer keeps a state of fixed size in place of keys and values."""
        return self.linear_attention is not None and layer in self.linear_attention.layers

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep the keys and values of every token."""
        return self.num_layers - self.num_linear_layers

    @property
    def num_paged_layers(self) -> int:
        """Layers with keys and values in pages, that of a head that guesses among them."""
        return self.num_kv_layers + self.num_mtp_layers

    @property
    def num_mtp_layers(self) -> int:
        """Layers of the head that guesses the token after next, 0 where it is not loaded: they keep keys and values
        too."""
        return self.mtp_layers if self.with_mtp else 0

    @property
    def num_linear_layers(self) -> int:
        return 0 if self.linear_attention is None else len(self.linear_attention.layers)

    @property
    def num_moe_layers(self) -> int:
        return sum(map(self.is_moe, range(self.num_layers)))
