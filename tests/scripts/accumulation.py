"""Gradient accumulation over four micro-batches of unequal lengths, weighted by their tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, MICRO = 53, 24, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        before = x.cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(x + F.gelu(self.mix(before)))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(5):
        window = [torch.randint(0, VOCAB, (2, int(n))) for n in torch.randint(6, 31, (MICRO,))]
        tokens = sum(ids[:, 1:].numel() for ids in window)
        shown = 0.0
        for ids in window:
            logits = model(ids)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            shown += loss.item()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=False)
        print(f"step {step} loss {shown:.4f}")


if __name__ == "__main__":
    main()
