"""Megatron's ways: [seq_len, batch, hidden] inside, positions and a mask [batch, 1, seq_len, seq_len] that must be given and hides
where True, labels that are shifted already, a loss for each token, scores divided by the layer and multiplied again.

Clean: every test of the corpus must pass on each `build*` function here.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self, h, n, number):
        super().__init__()
        self.n, self.number = n, number
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(h), nn.LayerNorm(h)
        self.query_key_value, self.dense = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.h_to_4h, self.to_h = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def attention(self, x, mask):
        s, b, h = x.shape
        q, k, v = (z.reshape(s, b * self.n, -1) for z in self.query_key_value(x).view(s, b, self.n, -1).chunk(3, -1))
        alpha = 1.0 / ((h // self.n) ** 0.5 * self.number)
        scores = torch.baddbmm(q.new_zeros(b * self.n, s, s), q.transpose(0, 1), k.permute(1, 2, 0), beta=0.0, alpha=alpha)
        scores = scores.view(b, self.n, s, s).float() * self.number
        probs = scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1).to(v.dtype)
        return self.dense(torch.bmm(probs.view(b * self.n, s, s), v.transpose(0, 1)).transpose(0, 1).reshape(s, b, h))

    def forward(self, x, mask):
        x = x + self.attention(self.input_layernorm(x), mask)
        return x + self.to_h(F.gelu(self.h_to_4h(self.post_attention_layernorm(x))))


class GPTModel(nn.Module):
    def __init__(self, vocab=91, h=28, n=4, layers=2, positions=64):
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(vocab, h), nn.Embedding(positions, h)
        self.layers = nn.ModuleList(Layer(h, n, i + 1) for i in range(layers))
        self.final_layernorm = nn.LayerNorm(h)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, input_ids, position_ids, attention_mask, labels=None):
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        x = x.transpose(0, 1).contiguous()
        for layer in self.layers:
            x = layer(x, attention_mask)
        logits = F.linear(self.final_layernorm(x), self.word_embeddings.weight)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.transpose(0, 1).flatten(), reduction="none")
        return loss.view(labels.size(1), labels.size(0)).transpose(0, 1).contiguous()


class Optional(GPTModel):
    """The mask and the positions may be left out."""

    def forward(self, input_ids, position_ids=None, attention_mask=None, labels=None):
        b, s = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(s, device=input_ids.device).expand(b, s)
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, s, s, dtype=torch.bool, device=input_ids.device).triu(1)
        return super().forward(input_ids, position_ids, attention_mask, labels)


def build():
    return GPTModel()


def build_optional():
    return Optional()
