"""A small decoder trained in a plain loop: shuffled batches, clipping, a schedule, a running loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

VOCAB, WIDTH, LENGTH, PAD = 61, 32, 24, 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(self.norm(x)).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / 8**0.5
        scores = scores.masked_fill(~visible, float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, WIDTH)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        x = self.tokens(input_ids) + self.positions(torch.arange(length))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = causal & attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, visible)
        return self.head(self.norm(x))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    data = [torch.randint(1, VOCAB, (int(n),)) for n in torch.randint(9, LENGTH + 1, (64,))]
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
    model = Decoder()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=4)
    total = 0.0
    for step, batch in enumerate(loader):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        labels = batch["labels"]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total += loss.item()
        print(f"step {step} loss {loss.item():.4f}")
        if step == 9:
            break


if __name__ == "__main__":
    main()
