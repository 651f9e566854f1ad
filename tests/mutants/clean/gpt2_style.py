# GPT-2 the old way: Conv1D weights, learned positions, a triangular buffer, layer_past
import math

import torch
import torch.nn as nn


class Config:
    def __init__(self, **kw):
        self.vocab_size = 199
        self.n_positions = 64
        self.n_embd = 40
        self.n_layer = 3
        self.n_head = 5
        self.layer_norm_epsilon = 1e-5
        self.initializer_range = 0.02
        self.resid_pdrop = 0.1
        self.embd_pdrop = 0.1
        self.attn_pdrop = 0.1
        self.tie_word_embeddings = True
        self.activation_function = "gelu_new"
        for k, v in kw.items():
            setattr(self, k, v)


class Conv1D(nn.Module):
    """y = x W + b with W of [in, out]"""

    def __init__(self, nx, nf):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x):
        size = x.size()[:-1] + (self.weight.size(1),)
        x = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return x.view(size)


class LayerNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.g = nn.Parameter(torch.ones(n))
        self.b = nn.Parameter(torch.zeros(n))
        self.e = eps

    def forward(self, x):
        u = x.mean(-1, keepdim=True)
        s = (x - u).pow(2).mean(-1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.e)
        return self.g * x + self.b


def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def split_heads(x, n_head):
    new = x.size()[:-1] + (n_head, x.size(-1) // n_head)
    return x.view(new).permute(0, 2, 1, 3)


def merge_heads(x):
    x = x.permute(0, 2, 1, 3).contiguous()
    return x.view(x.size(0), x.size(1), -1)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        n = cfg.n_positions
        self.register_buffer("bias", torch.tril(torch.ones(n, n, dtype=torch.bool)).view(1, 1, n, n))
        self.n_head = cfg.n_head
        self.n_embd = cfg.n_embd
        self.c_attn = Conv1D(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = Conv1D(cfg.n_embd, cfg.n_embd)
        self.attn_dropout = nn.Dropout(cfg.attn_pdrop)
        self.resid_dropout = nn.Dropout(cfg.resid_pdrop)

    def _attn(self, q, k, v, key_mask):
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        keep = self.bias[:, :, ns - nd : ns, :ns]
        w = torch.where(keep, w, torch.finfo(w.dtype).min)
        if key_mask is not None:
            w = w.masked_fill(key_mask == 0, torch.finfo(w.dtype).min)
        w = self.attn_dropout(torch.softmax(w, dim=-1))
        return torch.matmul(w, v)

    def forward(self, x, layer_past=None, key_mask=None):
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q = split_heads(q, self.n_head)
        k = split_heads(k, self.n_head)
        v = split_heads(v, self.n_head)
        if layer_past is not None:
            pk, pv = layer_past
            k = torch.cat((pk, k), dim=-2)
            v = torch.cat((pv, v), dim=-2)
        present = torch.stack((k, v))
        a = merge_heads(self._attn(q, k, v, key_mask))
        return self.resid_dropout(self.c_proj(a)), present


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = Conv1D(cfg.n_embd, 4 * cfg.n_embd)
        self.c_proj = Conv1D(4 * cfg.n_embd, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(gelu_new(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.attn = Attention(cfg)
        self.ln_2 = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.mlp = MLP(cfg)

    def forward(self, x, layer_past, key_mask):
        a, present = self.attn(self.ln_1(x), layer_past, key_mask)
        x = x + a
        x = x + self.mlp(self.ln_2(x))
        return x, present


class GPT2(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.n_positions, cfg.n_embd)
        self.drop = nn.Dropout(cfg.embd_pdrop)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = LayerNorm(cfg.n_embd, cfg.layer_norm_epsilon)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=cfg.initializer_range)
        nn.init.normal_(self.wpe.weight, std=cfg.initializer_range)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=cfg.initializer_range / math.sqrt(2 * cfg.n_layer))

    def forward(self, input_ids, attention_mask=None, position_ids=None, past=None, labels=None):
        b, t = input_ids.size()
        if past is None:
            past = [None] * len(self.h)
            past_length = 0
        else:
            past_length = past[0][0].size(-2)
        if past_length + t > self.config.n_positions:
            raise ValueError(f"{past_length + t} tokens, but only {self.config.n_positions} positions")
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past_length, past_length + t, device=input_ids.device).unsqueeze(0)
            else:
                position_ids = attention_mask.long().cumsum(-1) - 1
                position_ids = position_ids.masked_fill(attention_mask == 0, 0)[:, past_length:]
        key_mask = None
        if attention_mask is not None:
            key_mask = attention_mask[:, None, None, :]
        x = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        presents = []
        for block, layer_past in zip(self.h, past, strict=False):
            x, present = block(x, layer_past, key_mask)
            presents.append(present)
        logits = self.lm_head(self.ln_f(x))
        if labels is not None:
            loss_fct = nn.CrossEntropyLoss(ignore_index=-100)
            loss = loss_fct(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))
            return loss, logits, presents
        return logits, presents


def build():
    torch.manual_seed(3)
    return GPT2(Config())
