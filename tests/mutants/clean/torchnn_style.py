"""Decoders put together from torch.nn's own attention, its masks True where they hide: blocks of nn.MultiheadAttention whose
loss flattens the logits (`build`), and an nn.TransformerEncoder with a causal mask (`build_encoder`)."""

import math

import torch
from torch import nn


class PositionalEncoding(nn.Module):
    def __init__(self, width, dropout=0.1, max_len=128):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(max_len).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        pe = torch.zeros(1, max_len, width)
        pe[0, :, 0::2] = torch.sin(position * rate)
        pe[0, :, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", pe)

    def forward(self, x):
        return self.dropout(x + self.pe[:, : x.size(1)])


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x, mask):
        h = self.ln1(x)
        a, _ = self.attn(h, h, h, attn_mask=mask, need_weights=False)
        x = x + a
        return x + self.mlp(self.ln2(x))


class BlocksLM(nn.Module):
    def __init__(self, vocab_size=199, width=48, heads=4, layers=2, dropout=0.1):
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(vocab_size, width)
        self.pos = PositionalEncoding(width, dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, idx, targets=None):
        length = idx.size(1)
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool, device=idx.device), diagonal=1)
        x = self.pos(self.embed(idx) * math.sqrt(self.width))
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        logits = logits.view(-1, logits.size(-1))
        return logits, nn.functional.cross_entropy(logits, targets.view(-1))


class EncoderLM(nn.Module):
    def __init__(self, vocab_size=199, width=48, heads=4, layers=2, dropout=0.1):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocab_size, width)
        self.pos_encoder = PositionalEncoding(width, dropout)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, src, src_key_padding_mask=None):
        mask = nn.Transformer.generate_square_subsequent_mask(src.size(1), device=src.device)
        if src_key_padding_mask is not None:
            src_key_padding_mask = torch.zeros(src.shape, device=src.device).masked_fill(src_key_padding_mask, float("-inf"))
        x = self.pos_encoder(self.embedding(src) * math.sqrt(self.width))
        x = self.encoder(x, mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=True)
        return self.decoder(x)


def build():
    torch.manual_seed(0)
    return BlocksLM()


def build_encoder():
    torch.manual_seed(0)
    return EncoderLM()
