"""Two gloo ranks under torchrun, each with its own share of the data."""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

VOCAB, WIDTH = 37, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    data = list(torch.randint(0, VOCAB, (64, 9)))
    sampler = DistributedSampler(data, shuffle=True, seed=0)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, ids in enumerate(loader):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if os.environ["RANK"] == "0":
            print(f"step {step} loss {loss.item():.4f}")
        if step == 5:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
