"""The word language models of PyTorch's examples: ids [seq_len, batch], log-probabilities out, one mask kept for the last length.

Clean: every test of the corpus must pass on each `build*` function here.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class TransformerModel(nn.Module):
    def __init__(self, ntoken=53, ninp=20, nhead=2, nhid=24, nlayers=2, dropout=0.2, max_len=200):
        super().__init__()
        position, div_term = torch.arange(max_len)[:, None], torch.exp(torch.arange(0, ninp, 2) * (-math.log(10000.0) / ninp))
        self.register_buffer("pe", torch.stack((torch.sin(position * div_term), torch.cos(position * div_term)), -1).flatten(1)[:, None])
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout), nlayers, enable_nested_tensor=False)
        self.input_emb, self.decoder = nn.Embedding(ntoken, ninp), nn.Linear(ninp, ntoken)
        self.drop, self.ninp, self.src_mask = nn.Dropout(dropout), ninp, None
        nn.init.uniform_(self.input_emb.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, src, has_mask=True):
        if has_mask and (self.src_mask is None or self.src_mask.size(0) != len(src)):
            self.src_mask = torch.log(torch.tril(torch.ones(len(src), len(src)))).to(src.device)
        x = self.drop(self.input_emb(src) * math.sqrt(self.ninp) + self.pe[: len(src)])
        return F.log_softmax(self.decoder(self.encoder(x, mask=self.src_mask if has_mask else None)), dim=-1)


class RNNModel(nn.Module):
    def __init__(self, ntoken=53, ninp=20, nhid=24, nlayers=2, dropout=0.2):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(dropout), nn.Embedding(ntoken, ninp)
        self.rnn, self.decoder = nn.LSTM(ninp, nhid, nlayers, dropout=dropout), nn.Linear(nhid, ntoken)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, input, hidden=None):
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        return F.log_softmax(self.decoder(self.drop(output)), dim=-1), hidden


class StatefulModel(nn.Module):
    """The state is the caller's, made by `init_hidden`, and the logits are flat."""

    def __init__(self, ntoken=53, ninp=20, nhid=24, nlayers=2, batch_first=False):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(ntoken, ninp), nn.Linear(nhid, ntoken)
        self.rnn, self.sizes = nn.GRU(ninp, nhid, nlayers, batch_first=batch_first), (nlayers, nhid)

    def init_hidden(self, bsz):
        return next(self.parameters()).new_zeros(self.sizes[0], bsz, self.sizes[1])

    def forward(self, input, hidden):
        output, hidden = self.rnn(self.encoder(input), hidden)
        return self.decoder(output).flatten(0, 1), hidden


def build():
    return TransformerModel()


def build_rnn():
    return RNNModel()


def build_stateful():
    return StatefulModel()


def build_stateful_rows():
    return StatefulModel(batch_first=True)
