"""transformers' GPT-NeoX against a re-implementation with split projections: it agrees, and each seeded fault is named."""

from pathlib import Path

import pytest

from olmodebug.implementations.comparison import compare
from olmodebug.report import Report
from tests.benchmarks.implementations import reference_of, subject_of
from tests.mutants.catalog import CLEAN

SPLIT = '''"""GPT-NeoX with projections of their own for q, k and v."""
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn

@dataclass
class Config:
    vocab_size: int = 71
    hidden_size: int = 48
    intermediate_size: int = 80
    num_hidden_layers: int = 2
    num_attention_heads: int = 3
    max_position_embeddings: int = 128
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"

def rotate(x, cos, sin):
    n = cos.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.rotated, self.theta = int(self.width * config.rotary_pct), config.rope_theta
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x):
        batch, seq, hidden = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.view(batch, seq, self.heads, self.width).transpose(1, 2) for t in (q, k, v))
        powers = torch.arange(0, self.rotated, 2, dtype=torch.float32) / self.rotated
        angles = torch.outer(torch.arange(seq, dtype=torch.float32), 1.0 / self.theta**powers)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = q @ k.transpose(-1, -2) * self.width**-0.5
        mask = torch.ones(seq, seq, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(x.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, seq, hidden))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc_out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return x + self.attention(self.input_layernorm(x)) + self.fc_out(F.gelu(self.fc_in(self.post_attention_layernorm(x))))

class NeoX(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or Config()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

def build():
    torch.manual_seed(0)
    return NeoX()
'''
QKV = ("q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)", "q, k, v = self.k_proj(x), self.q_proj(x), self.v_proj(x)")
PARTIAL = ("int(self.width * config.rotary_pct)", "int(self.width * config.rotary_pct) * 2")
ROPE_FLOAT32 = (
    ("cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)", "cos, sin = angles.cos(), angles.sin()"),
    ("q, k = rotate(q, cos, sin), rotate(k, cos, sin)", "q, k = rotate(q, cos, sin).to(x.dtype), rotate(k, cos, sin).to(x.dtype)"),
)
FUSED = (
    ('for name in ("q_proj", "k_proj", "v_proj", "o_proj"):', 'self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)\n        for name in ("o_proj",):'),
    ("q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)", "q, k, v = self.query_key_value(x).chunk(3, dim=-1)"),
)  # fmt: skip


def against_transformers(folder: Path, *edits: tuple[str, str]) -> Report:
    text = SPLIT
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "split.py").write_text(SPLIT)
    (folder / "edited.py").write_text(text)
    reference = reference_of("transformers:GPTNeoXForCausalLM", subject_of(folder / "split.py", "build"))
    return compare(subject_of(folder / "edited.py", "build"), reference)


def test_split_projections_agree_with_gpt_neox(tmp_path: Path) -> None:
    report = against_transformers(tmp_path)
    assert report.findings == ()
    assert report.sections["implementations"]["gradients"]["differing"] == 0


@pytest.mark.parametrize(
    ("edits", "cause", "function"),
    [
        ((QKV,), "qkv order", "Attention.forward"),
        pytest.param(FUSED, "fused projection order", "Attention.forward", marks=pytest.mark.slow),
        ((PARTIAL,), "partial rotary", "rotate"),
        (ROPE_FLOAT32, "cast order", "rotate"),
    ],
)
def test_a_seeded_fault_is_named(edits: tuple[tuple[str, str], ...], cause: str, function: str, tmp_path: Path) -> None:
    report = against_transformers(tmp_path, *edits)
    finding = report.findings[0]
    assert finding.evidence["cause"] == cause
    assert finding.where.function == function


def test_a_norm_that_multiplies_its_weight_before_the_cast_is_named(tmp_path: Path) -> None:
    text = (CLEAN / "hf_style.py").read_text()
    old = "return self.weight * hidden_states.to(input_dtype)"
    assert text.count(old) == 1
    (tmp_path / "early.py").write_text(text.replace(old, "return (self.weight * hidden_states).to(input_dtype)"))
    report = compare(subject_of(tmp_path / "early.py", "build"), subject_of(CLEAN / "hf_style.py", "build"))
    (finding,) = report.findings
    assert finding.evidence["cause"] == "cast order"
    assert "the cast back to bfloat16 comes after it" in str(finding.cause)
    assert (finding.where.function, finding.severity) == ("MyRMSNorm.forward", "note")
