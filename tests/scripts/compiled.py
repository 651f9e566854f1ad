"""A compiled model: the guards see what runs outside the compiled region, and change nothing inside it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH = 43, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.embed(input_ids))))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(4):
        ids = torch.randint(0, VOCAB, (4, 12))
        labels = ids[:, 1:].clone()
        loss = F.cross_entropy(compiled(ids)[:, :-1].flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
