"""The reference OLMo, every generation in one file, meant to be read whole.

               norm                    where             extras                                    equals transformers'
OLMo 1         LayerNorm, no weights   before (pre)      clip_qkv (0424, 0724)                     OlmoForCausalLM
DataDecide     RMSNorm                 before (pre)      none; its norms cast before the weight    LlamaForCausalLM
OLMo 2         RMSNorm                 after (post)      qk_norm                                   Olmo2ForCausalLM
OLMo 3         RMSNorm                 after (post)      qk_norm, sliding windows, YaRN            Olmo3ForCausalLM

Every generation: SwiGLU, RoPE on two contiguous halves, no biases. Module names are Hugging Face's, so
`Olmo(config).load_state_dict(hf.state_dict())` is strict and needs no converter.

Norms, RoPE, softmax and loss are computed in float32, or in float64 where the model is in float64. transformers stops
at float32 there, which bounds a comparison in float64 at about 1e-6. Only the RoPE frequencies are float32 numbers in
every dtype: they are constants of the model, and these are the ones it was trained with.

Shapes: B batch, T tokens, S keys (cached and new), H heads, K key/value heads, D head_dim, E hidden_size,
I intermediate_size, V vocab_size.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer_norm", "rms_norm"]
NormPosition = Literal["pre", "post"]
LayerType = Literal["full_attention", "sliding_attention"]
AttnImplementation = Literal["eager", "sdpa"]

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each [1 or B, T, D]

IGNORE_INDEX = -100  # torch's and transformers' mark for a label that does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's stretching of RoPE (https://arxiv.org/abs/2309.00071), used on full-attention layers only."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: the paper's 0.1 ln(factor) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OlmoConfig:
    """The sizes and choices of one model, under Hugging Face's field names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # None: one for each head
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    norm: Norm = "rms_norm"
    norm_position: NormPosition = "pre"
    norm_eps: float = 1e-6
    # Seen in bfloat16 only. Llama and ai2-olmo cast to the model's dtype and then multiply by the norm's weight;
    # transformers' Olmo2 and Olmo3 multiply in float32 and then cast.
    norm_casts_before_weight: bool = False
    qk_norm: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = None  # type: ignore[assignment]  # None: full attention everywhere
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    eos_token_id: int | None = None
    attn_implementation: AttnImplementation = "sdpa"

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        layer_types = self.layer_types or ("full_attention",) * self.num_hidden_layers
        object.__setattr__(self, "layer_types", tuple(layer_types))
        if complaints := _complaints(self):
            raise ValueError("; ".join(complaints))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return {**asdict(self), "layer_types": list(self.layer_types)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; a name that is not a field is a ValueError."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"OlmoConfig: expected fields among {', '.join(known)}; observed {', '.join(unknown)}")
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": YarnScaling(**scaling) if isinstance(scaling, Mapping) else scaling})


class KVCache:
    """Rotated keys and values of each layer, `[B, K, S, D]`; every forward that is given the cache lengthens it.

    Sliding-window layers keep all keys as well; the mask hides the old ones.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def seq_length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def update(self, layer_index: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends one layer's new keys and values and returns all that it has, `[B, K, S, D]`."""
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_index == len(kept):
                kept.append(new)
            else:
                kept[layer_index] = torch.cat([kept[layer_index], new], dim=2)
        return self.keys[layer_index], self.values[layer_index]


class OlmoOutput(NamedTuple):
    logits: Tensor
    loss: Tensor | None
    past_key_values: KVCache | None


class OlmoLayerNorm(nn.Module):
    """OLMo 1's LayerNorm, without weight and bias."""

    def __init__(self, size: int, config: OlmoConfig) -> None:
        super().__init__()
        self.size, self.eps = size, config.norm_eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        precise = hidden_states.to(at_least_float32(hidden_states.dtype))
        return F.layer_norm(precise, (self.size,), eps=self.eps).to(hidden_states.dtype)


class OlmoRMSNorm(nn.Module):
    def __init__(self, size: int, config: OlmoConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.casts_before_weight = config.norm_eps, config.norm_casts_before_weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        # A square overflows float16 from 256 on.
        precise = hidden_states.to(at_least_float32(hidden_states.dtype))
        normed = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.casts_before_weight:
            return self.weight * normed.to(hidden_states.dtype)
        return (self.weight * normed).to(hidden_states.dtype)


NORMS: dict[Norm, type[OlmoLayerNorm] | type[OlmoRMSNorm]] = {"layer_norm": OlmoLayerNorm, "rms_norm": OlmoRMSNorm}


class OlmoRotaryEmbedding(nn.Module):
    """The cosines and sines of RoPE for given positions, stretched where YaRN is given."""

    inv_freq: Tensor

    def __init__(self, config: OlmoConfig, yarn: YarnScaling | None) -> None:
        super().__init__()
        self.head_dim, self.rope_theta, self.yarn = config.head_dim, config.rope_theta, yarn
        self.attention_factor = 1.0
        if yarn is not None:
            self.attention_factor = yarn.attention_factor or 0.1 * math.log(max(yarn.factor, 1.0)) + 1.0
        # They stay real in a meta build, so that load_state_dict(assign=True) completes the model.
        device = torch.get_default_device()
        inv_freq = self.frequencies().to("cpu" if device.type == "meta" else device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosine and sine in `dtype`, each `[1 or B, T, D]` as `position_ids` is `[1 or B, T]`."""
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(position_ids.device, dtype)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def frequencies(self) -> Tensor:
        """The angle per position of each rotated pair, float32 on the CPU, `[D / 2]`; the operations and their order
        are transformers', because one rounding at frequency 0.5 is 1e-4 radians at position 4096."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        wavelengths = self.rope_theta**steps
        if self.yarn is None:
            return 1.0 / wavelengths
        turns = (self.yarn.beta_fast, self.yarn.beta_slow)
        low, high = (self.pair_that_makes(turn, self.yarn.original_max_position_embeddings) for turn in turns)
        # transformers clamps to D - 1 where OLMo-core clamps to D / 2 - 1; released shapes reach neither.
        first, last = max(math.floor(low), 0), min(math.ceil(high), self.head_dim - 1)
        pairs = torch.arange(self.head_dim // 2, dtype=torch.float32, device="cpu")
        kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
        return (1.0 / (self.yarn.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept

    def pair_that_makes(self, turns: float, positions: int) -> float:
        """The index of the pair that turns so many times over so many positions (YaRN, section 3.2)."""
        return self.head_dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(bfloat16) would round the frequencies, and to_empty would leave them unset: nothing else restores them.
        super()._apply(fn, recurse)
        self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self


class OlmoAttention(nn.Module):
    def __init__(self, config: OlmoConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.head_dim, self.clip_qkv = layer_index, config.head_dim, config.clip_qkv
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.config = config  # read at each call, so that a switch of the attention reaches a finished model
        query_size, key_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        # Over all heads at once, before they are split.
        self.q_norm = NORMS[config.norm](query_size, config) if config.qk_norm else nn.Identity()
        self.k_norm = NORMS[config.norm](key_size, config) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states: Tensor, rotation: Rotation, visible: Tensor | None, cache: KVCache | None) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        query_states = self.q_norm(self.q_proj(hidden_states))  # [B, T, H*D]
        key_states = self.k_norm(self.k_proj(hidden_states))  # [B, T, K*D]
        value_states = self.v_proj(hidden_states)  # [B, T, K*D]
        if (clip := self.clip_qkv) is not None:
            query_states, key_states = query_states.clamp(-clip, clip), key_states.clamp(-clip, clip)
            value_states = value_states.clamp(-clip, clip)

        query_states = query_states.view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]
        key_states = key_states.view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        value_states = value_states.view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # [B, K, T, D]
        query_states = apply_rotary_pos_emb(query_states, *rotation)
        key_states = apply_rotary_pos_emb(key_states, *rotation)
        if cache is not None:
            key_states, value_states = cache.update(self.layer_index, key_states, value_states)
        if self.num_key_value_groups > 1:
            # Query head h reads key/value head h // groups.
            key_states = key_states.repeat_interleave(self.num_key_value_groups, dim=1)  # [B, H, S, D]
            value_states = value_states.repeat_interleave(self.num_key_value_groups, dim=1)  # [B, H, S, D]
        attend = ATTENTIONS[self.config.attn_implementation]
        attn_output = attend(query_states, key_states, value_states, visible, self.scaling)
        attn_output = attn_output.transpose(1, 2).reshape(batch, tokens, -1)  # [B, T, H*D]
        return self.o_proj(attn_output)


class OlmoMLP(nn.Module):
    def __init__(self, config: OlmoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)  # [B, T, I]
        return self.down_proj(gated)


class OlmoDecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream.

    Beware of the names: `post_attention_layernorm` stands before the MLP where norms come first, and on the
    attention's output where they come last.
    """

    def __init__(self, config: OlmoConfig, layer_index: int) -> None:
        super().__init__()
        self.norm_position = config.norm_position
        self.self_attn = OlmoAttention(config, layer_index)
        self.mlp = OlmoMLP(config)
        self.post_attention_layernorm = NORMS[config.norm](config.hidden_size, config)
        if config.norm_position == "pre":
            self.input_layernorm = NORMS[config.norm](config.hidden_size, config)
        else:
            self.post_feedforward_layernorm = NORMS[config.norm](config.hidden_size, config)

    def forward(self, hidden_states: Tensor, rotation: Rotation, visible: Tensor | None, cache: KVCache | None) -> Tensor:
        if self.norm_position == "pre":
            attn_input = self.input_layernorm(hidden_states)
            hidden_states = hidden_states + self.self_attn(attn_input, rotation, visible, cache)
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        attn_output = self.self_attn(hidden_states, rotation, visible, cache)
        hidden_states = hidden_states + self.post_attention_layernorm(attn_output)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


class OlmoModel(nn.Module):
    """Embedding, layers and final norm: everything before the head."""

    def __init__(self, config: OlmoConfig) -> None:
        super().__init__()
        self.config = config
        # As in transformers the row of pad_token_id gets no gradient through the lookup. ai2-olmo trains that row:
        # for its gradients set pad_token_id to None.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList(OlmoDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config)
        yarn = {"full_attention": config.rope_scaling, "sliding_attention": None}
        kinds = sorted(set(config.layer_types))
        self.rotary_emb = nn.ModuleDict({kind: OlmoRotaryEmbedding(config, yarn[kind]) for kind in kinds})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | None) -> Tensor:
        past = 0 if cache is None else cache.seq_length
        tokens, keys = input_ids.shape[1], past + input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape != (len(input_ids), keys):
            expected = f"[{len(input_ids)}, {keys}] (batch, {past} cached + {tokens} new tokens)"
            raise ValueError(f"attention_mask: expected shape {expected}, observed {list(attention_mask.shape)}")
        if position_ids is None:
            position_ids = torch.arange(past, keys, device=input_ids.device)[None]

        hidden_states = self.embed_tokens(input_ids)  # [B, T, E]
        dtype = at_least_float32(hidden_states.dtype)
        shared: dict[LayerType, tuple[Rotation, Tensor | None]] = {}
        for kind in dict.fromkeys(self.config.layer_types):
            window = self.config.sliding_window if kind == "sliding_attention" else None
            # sdpa has a faster kernel for the plain triangle, chosen by giving no mask.
            plain = attention_mask is None and past == 0 and (window is None or window >= keys)
            needs_mask = not plain or self.config.attn_implementation == "eager"
            visible = visible_keys(tokens, attention_mask, window, past, input_ids.device) if needs_mask else None
            shared[kind] = self.rotary_emb[kind](position_ids, dtype), visible
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(hidden_states, *shared[kind], cache)
        return self.norm(hidden_states)


class Olmo(nn.Module):
    """A causal language model of the OLMo family; weights are drawn at once, from `generator` where one is given."""

    def __init__(self, config: OlmoConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = OlmoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_post_hook(_tie_after_loading)
        self.reset_parameters(generator)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
    ) -> OlmoOutput:
        """Logits `[B, T, V]` for `input_ids` `[B, T]`, and the loss where labels are given.

        attention_mask: `[B, S]` over cached and new tokens, 1 (or True) at real ones. A query that sees no key at all,
        as left padding does, attends to nothing: zeros, no NaN.
        position_ids: `[B, T]` or `[1, T]`. By default they count on from the cache, as in transformers, and are NOT
        derived from the mask: for left-padded rows give `attention_mask.cumsum(1) - 1`.
        past_key_values: a cache to read and, in place, to lengthen; use_cache=True starts one.
        labels: `[B, T]`, input_ids themselves for language modelling, shifted here, -100 where nothing is asked. The
        loss is the mean over the labels that count; 0 where none does, for which transformers returns NaN.
        """
        if use_cache and past_key_values is None:
            past_key_values = KVCache()
        hidden_states = self.model(input_ids, attention_mask, position_ids, past_key_values)
        logits = self.lm_head(hidden_states)  # [B, T, V]
        loss = None if labels is None else next_token_loss(logits, labels)
        return OlmoOutput(logits, loss, past_key_values)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
        """The prompt and its greedy continuation, `[B, T + max_new_tokens]`; rows may be padded on the left."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        new_ids, cache = input_ids, KVCache()
        for _ in range(max_new_tokens):
            position_ids = (real.cumsum(1) - 1).clamp(min=0)[:, -new_ids.shape[1] :]
            new_ids = self(new_ids, real, position_ids, cache).logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, new_ids], dim=1)
            real = torch.cat([real, torch.ones_like(new_ids)], dim=1)
        return input_ids

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew: matrices normal and cut at 3 sigma as in the DataDecide code, norms 1, the row of
        pad_token_id 0. `Olmo` built on the meta device is made real by `to_empty(device=...)` and this."""
        within_3_sigma = math.erf(3 / math.sqrt(2))
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, OlmoRMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Embedding):
                # nn.init.trunc_normal_ looks at what it drew, which fake tensors do not have.
                uniform = torch.empty_like(module.weight, dtype=torch.float32)
                uniform.uniform_(-within_3_sigma, within_3_sigma, generator=generator)
                module.weight.copy_(uniform.erfinv() * math.sqrt(2) * self.config.initializer_range)
        if self.config.pad_token_id is not None:
            self.model.embed_tokens.weight[self.config.pad_token_id].zero_()

    def tie_weights(self) -> None:
        """Makes the head share the embedding's parameter where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Leaving the meta device replaces every Parameter by its own new one, which unties them.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self


def eager_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """Attention written out, `[B, H, T, D]`; `visible` `[1 or B, 1, T, S]` must be given."""
    assert visible is not None
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # [B, H, T, S]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    attn_weights = F.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(query.dtype)
    # A row that sees nothing would attend evenly to all keys, future ones included.
    attn_weights = attn_weights.masked_fill(~visible, 0.0)
    return torch.matmul(attn_weights, value)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """The same by torch's kernels, `[B, H, T, D]`; without `visible` every token sees itself and those before."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=visible is None, scale=scaling)


ATTENTIONS: dict[AttnImplementation, Callable[..., Tensor]] = {"eager": eager_attention, "sdpa": sdpa_attention}


def visible_keys(tokens: int, attention_mask: Tensor | None, window: int | None, past: int, device: torch.device) -> Tensor:
    """True where a query may look, `[1 or B, 1, T, S]`: not ahead, not `window` or more keys back, not at padding."""
    queries = torch.arange(past, past + tokens, device=device)[:, None]
    keys = torch.arange(past + tokens, device=device)
    visible = keys <= queries  # [T, S]
    if window is not None:
        visible = visible & (keys > queries - window)
    visible = visible[None, None]  # [1, 1, T, S]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None]  # [B, 1, T, S]
    return visible


def apply_rotary_pos_emb(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates element i of each head with element i + D/2, in the dtype of `cos`; the shape and dtype stay."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (states * cos[:, None] + rotated * sin[:, None]).to(states.dtype)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each position's logits against the next position's label, computed in float32 or more."""
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    precise = logits.flatten(0, 1).to(at_least_float32(logits.dtype))
    counted = (targets != IGNORE_INDEX).sum().clamp(min=1)
    return F.cross_entropy(precise, targets, ignore_index=IGNORE_INDEX, reduction="sum") / counted


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tie_after_loading(module: nn.Module, _incompatible_keys: object) -> None:
    # load_state_dict(assign=True) replaces the embedding and the head one after the other, which unties them.
    assert isinstance(module, Olmo)
    module.tie_weights()


def _complaints(config: OlmoConfig) -> list[str]:
    """What is wrong with a configuration, a sentence each."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    divisible = heads > 0 and config.hidden_size > 0 and config.hidden_size % heads == 0
    kinds, layers, pad = get_args(LayerType), config.num_hidden_layers, config.pad_token_id
    fitting_types = set(config.layer_types) <= set(kinds) and len(config.layer_types) == layers
    windowed = "sliding_attention" in config.layer_types
    expectations: list[tuple[str, bool, str]] = [
        ("hidden_size", divisible, f"a positive multiple of num_attention_heads {heads}"),
        ("num_key_value_heads", groups > 0 and heads % groups == 0, f"a divisor of num_attention_heads {heads}"),
        ("head_dim", not divisible or config.head_dim % 2 == 0, "an even number, because RoPE rotates pairs"),
        ("layer_types", fitting_types, f"{layers} of {' or '.join(kinds)}, one a layer"),
        ("sliding_window", not windowed or (config.sliding_window or 0) > 0, "at least 1 for sliding_attention"),
        ("pad_token_id", pad is None or 0 <= pad < config.vocab_size, f"an id below vocab_size {config.vocab_size}"),
    ]
    for name in ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        expectations.append((name, getattr(config, name) > 0, "at least 1"))
    for name, choice in (("norm", Norm), ("norm_position", NormPosition), ("attn_implementation", AttnImplementation)):
        expectations.append((name, getattr(config, name) in get_args(choice), " or ".join(get_args(choice))))
    return [f"{name}: expected {expected}, observed {getattr(config, name)!r}" for name, holds, expected in expectations if not holds]
