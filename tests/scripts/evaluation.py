"""Training with an evaluation every second step; a model with dropout and tied embeddings, built on the meta device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH = 71, 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dropout = nn.Embedding(VOCAB, WIDTH), nn.Dropout(0.1)
        self.up, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def reset(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.dropout(F.relu(self.up(self.embed(input_ids)))))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    model.eval()
    loss = loss_of(model, torch.randint(0, VOCAB, (4, 15)))
    model.train()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    model.head.weight = model.embed.weight
    model.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(8):
        loss = loss_of(model, torch.randint(0, VOCAB, (4, 15)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f}")
        if step % 2:
            print(f"validation {evaluate(model):.4f}")


if __name__ == "__main__":
    main()
