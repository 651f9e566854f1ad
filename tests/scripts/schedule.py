"""Two optimizers, a warm-up, a cosine, RMS norms and an attention over documents."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH = 41, 24


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.project = nn.Embedding(VOCAB, WIDTH), RMSNorm(), nn.Linear(WIDTH, WIDTH)
        self.final_norm, self.head = RMSNorm(), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, documents: Tensor) -> Tensor:
        x = self.embed(input_ids)
        length = input_ids.shape[1]
        same = documents[:, :, None] == documents[:, None, :]
        visible = same & torch.ones(length, length, dtype=torch.bool).tril()
        keys = self.norm(x)
        scores = (keys @ keys.transpose(1, 2)).masked_fill(~visible, float("-inf"))
        x = x + self.project(scores.softmax(-1) @ x)
        return self.head(self.final_norm(x))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "project" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "project" in name)]
    first = torch.optim.SGD(matrices, lr=0.02, momentum=0.95)
    second = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(second, 0.1, 1.0, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(second, T_max=10)
    scheduler = torch.optim.lr_scheduler.SequentialLR(second, [warmup, cosine], milestones=[3])
    for step in range(8):
        ids = torch.randint(0, VOCAB, (3, 16))
        documents = (torch.arange(16)[None] >= torch.randint(4, 12, (3, 1))).long()
        loss = F.cross_entropy(model(ids, documents)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        first.step()
        second.step()
        scheduler.step()
        first.zero_grad()
        second.zero_grad()
        print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
