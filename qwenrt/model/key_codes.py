"""How the codes of an int8 cache are laid over a layer's keys: an offset and a factor for each channel.

Some models have keys with channels that are huge at every token: Qwen2.5's biases of k_proj reach 200 where the rest of
a key stays below 10. One range for all channels would spend its 256 codes on them. What they add to a key is known from
the weights: the bias, turned by the token's position. In the channels that turn slowly that is nearly the same
everywhere, and an offset takes it away; of what turns, a factor takes the size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenrt.config import ModelConfig
from qwenrt.model.attention import Attention
from qwenrt.model.layers import DecoderLayer
from qwenrt.model.rotary import RotaryTables, ntk_alpha
from qwenrt.ops import reference
from qwenrt.ops.steps import LayerCache, LayerKV

_TOKENS = 16  # random ones, each with its opposite
_SPREADS = 4.0  # standard deviations that a channel goes from its middle
_NEAR, _FAR = 128, 32768  # positions that count, as many in each octave
_POSITIONS = 256
_LEAST = 0.25  # of the factor of a head's middle channel


@torch.no_grad()
def fit_key_codes(
    layers: list[DecoderLayer],
    kv: Sequence[LayerCache],
    rotary: RotaryTables,
    tokens: torch.Tensor,
    config: ModelConfig,
) -> None:
    """Set offset and factor of every layer's cache by its weights, seen through the keys of ``tokens``
    (random_tokens), at positions up to the longest that the model is made for.

    So every form of weights serves. Of a head's factors the largest is 1, and none is below a quarter of that of its
    middle channel: what is small by the weights may be larger in a text. A float cache needs none of this.
    """
    cos, sin = _turns(rotary, config)
    for layer, cache in zip(layers, kv, strict=True):
        if not (isinstance(layer.mixer, Attention) and isinstance(cache, LayerKV)):
            continue
        keys = layer.mixer.keys(tokens, cos.shape[1]).float()
        middle = keys.mean(0)
        turned = reference.rotary(middle.expand(len(cos), *middle.shape), cos, sin)
        offset = turned.mean(0)
        size = _of_pairs((turned - offset).square().mean(0), cos.shape[1]).sqrt()
        size += _SPREADS * _of_pairs((keys - middle).square().mean(0), cos.shape[1]).sqrt()
        if bool(torch.isfinite(size).all()) and bool((size.median(-1).values > 0).all()):
            cache.k_offset, cache.k_factor = offset.contiguous(), _factors(size).contiguous()


def _turns(rotary: RotaryTables, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of some positions, each as a text that ends there is turned: dynamic NTK turns long ones more slowly,
    and what no text meets must not count."""
    last = min(config.max_position_embeddings, _FAR) - 1
    near = min(_NEAR, last)
    positions = near * (last / max(near, 1)) ** torch.linspace(0, 1, _POSITIONS)
    alphas = [ntk_alpha(int(position) + 1, config) for position in positions.tolist()]
    some = [rotary.turns(positions[[a == alpha for a in alphas]], alpha) for alpha in dict.fromkeys(alphas)]
    cos, sin = (torch.cat(parts) for parts in zip(*some, strict=True))
    return cos, sin


def random_tokens(width: int) -> torch.Tensor:
    """Rows [T, width] of 1 and -1, which every norm leaves as they are, each with its opposite: their keys have the
    bias in their middle, and spread as the rows of k_proj are long."""
    signs = torch.randint(0, 2, (_TOKENS, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return torch.cat((signs, -signs))


def _of_pairs(squares: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Mean squares [KVH, hd] of channels -> those of the pairs that are rotated together, for both of a pair."""
    first, second, rest = squares.split_with_sizes(
        (rotary_dim // 2, rotary_dim // 2, squares.shape[1] - rotary_dim), dim=1
    )
    pair = (first + second) / 2
    return torch.cat((pair, pair, rest), dim=1)


def _factors(size: torch.Tensor) -> torch.Tensor:
    """How large each channel is [KVH, hd] -> factors."""
    size = torch.maximum(size, _LEAST * size.median(-1, keepdim=True).values)
    return size / size.amax(-1, keepdim=True)
