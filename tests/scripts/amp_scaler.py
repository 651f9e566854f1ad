"""Mixed precision with a loss scaler that starts too high, so that its first steps overflow and are skipped."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH = 47, 32


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Linear(WIDTH, 64),
            nn.Linear(64, WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.down(F.silu(self.up(x))))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    for step in range(8):
        ids = torch.randint(0, VOCAB, (4, 17))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f} scale {scaler.get_scale():g}")


if __name__ == "__main__":
    main()
