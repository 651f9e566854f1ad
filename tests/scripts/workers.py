"""An iterable data set that is split among two loader processes."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

VOCAB, WIDTH = 59, 16


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        info = get_worker_info()
        for number in range(64):
            row = torch.randint(0, VOCAB, (11,), generator=generator)
            if info is not None and number % info.num_workers != info.id:
                continue
            yield row


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Stream(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    for step, ids in enumerate(loader):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
