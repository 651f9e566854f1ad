"""A small Llama fine-tuned by the transformers Trainer on padded sentences that end in eos."""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCAB, EOS, PAD = 89, 2, 0


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    data = [torch.cat([torch.randint(3, VOCAB, (int(n),)), torch.tensor([EOS])]) for n in torch.randint(9, 20, (48,))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=5, learning_rate=1e-3, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_steps=1, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        trainer.train()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
