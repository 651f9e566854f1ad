"""A training script whose third batch is longer than the model's table of positions, as it happens with real data."""

import torch
from short_rope_table import build_two_dimensional_index

torch.manual_seed(0)
model = build_two_dimensional_index()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for seq_len in (24, 48, 80):
    input_ids = torch.randint(0, 90, (2, seq_len))
    loss = model(input_ids, position_ids=torch.arange(seq_len), labels=input_ids)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{seq_len} tokens: loss {loss.item():.3f}")
