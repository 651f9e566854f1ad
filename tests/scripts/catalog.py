"""Ten small training scripts, and faults put into them by exchanging a few lines; each is clean as it stands.

`line` is text of the edited script that stands on the line which a right diagnosis names; "" where no line can be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent

SCRIPTS = {
    "plain_loop": "plain loop, padding, clipping, schedule",
    "hf_trainer": "transformers Trainer, accumulation",
    "ddp": "torchrun, two gloo ranks",
    "accumulation": "gradient accumulation, unequal lengths",
    "amp_scaler": "autocast and a loss scaler that skips",
    "compiled": "torch.compile",
    "workers": "iterable data set, two forked workers",
    "lora": "frozen model, low-rank additions, checkpointing",
    "evaluation": "evaluation loop, tied weights, meta build",
    "schedule": "two optimizers, warm-up and cosine, document mask",
}
ELSEWHERE = ("ddp", "hf_trainer", "workers")  # started in processes of their own; the others also run in the test's process


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One edited script and what must be said of it."""

    name: str
    script: str
    edits: tuple[tuple[str, str], ...]  # (old, new), each old exactly once in the script
    probe: str
    line: str
    words: str = ""  # must occur in the message or the cause
    severity: str = "error"
    loud: bool = False  # the script raises by itself


def source(fault: Fault) -> str:
    """The edited text; ValueError where an edit does not occur exactly once."""
    text = (FOLDER / f"{fault.script}.py").read_text()
    for old, new in fault.edits:
        if text.count(old) != 1:
            raise ValueError(f"{fault.name}: expected this once in {fault.script}.py, found {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    return text


def line_number(fault: Fault) -> int | None:
    """The line that a right diagnosis names."""
    if not fault.line:
        return None
    lines = source(fault).splitlines()
    (number,) = [n for n, text in enumerate(lines, start=1) if fault.line in text]
    return number


def _fault(
    name: str, probe: str, line: str, *edits: tuple[str, str], words: str = "", severity: str = "error", loud: bool = False
) -> Fault:
    return Fault(name=name, script=name.split("/")[0], edits=edits, probe=probe, line=line, words=words, severity=severity, loud=loud)


FAULTS: tuple[Fault, ...] = (
    # plain_loop
    _fault(
        "plain_loop/token-beyond-vocabulary", "index.in-bounds", "x = self.tokens(input_ids) + self.positions",
        ("data = [torch.randint(1, VOCAB, ", "data = [torch.randint(1, VOCAB + 3, "),
        words="`tokens.weight` has 61 rows", loud=True,
    ),
    _fault(
        "plain_loop/short-position-table", "index.in-bounds", "x = self.tokens(input_ids) + self.positions",
        ("nn.Embedding(LENGTH, WIDTH)", "nn.Embedding(LENGTH - 4, WIDTH)"),
        words="position table of 20 rows", loud=True,
    ),
    _fault(
        "plain_loop/labels-in-the-same-memory", "index.in-bounds", "x = self.tokens(input_ids) + self.positions",
        ("labels = ids.masked_fill(mask == 0, -100)", "labels = ids\n    labels[mask == 0] = -100"),
        words="-100 is the label of a masked position", loud=True,
    ),
    _fault(
        "plain_loop/other-ignore-index", "index.in-bounds", "loss = F.cross_entropy",
        ("labels[:, 1:].flatten())", "labels[:, 1:].flatten(), ignore_index=-1)"),
        words="this loss ignores another number", loud=True,
    ),
    _fault(
        "plain_loop/no-zero-grad", "loop.gradients-reset", "loss.backward()",
        ("        optimizer.zero_grad()\n", ""), words="nothing reset them",
    ),
    _fault(
        "plain_loop/head-not-in-optimizer", "loop.every-parameter-optimized", "torch.optim.AdamW(",
        ("decayed = [p for p in model.parameters() if p.ndim > 1]", "decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and 'head' not in n]"),
        words="head.weight", severity="warning",
    ),
    _fault(
        "plain_loop/optimizer-of-another-model", "loop.every-parameter-optimized", "optimizer = torch.optim.AdamW(",
        ("    scheduler = ", "    model = Decoder()\n    scheduler = "), words="parameters of no model",
    ),
    _fault(
        "plain_loop/loss-kept-with-its-graph", "loop.graph-released", "total += loss",
        ("total += loss.item()", "total += loss"), words="`total` keeps",
    ),
    _fault(
        "plain_loop/labels-shifted-twice", "loop.labels-shifted-once", "loss = F.cross_entropy",
        ('labels = batch["labels"]', 'labels = batch["labels"][:, 1:]'),
        ("logits[:, :-1].flatten(0, 1)", "logits[:, :-2].flatten(0, 1)"), words="token i + 2",
    ),
    _fault(
        "plain_loop/labels-not-shifted", "loop.labels-shifted-once", "loss = F.cross_entropy",
        ("logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()", "logits.flatten(0, 1), labels.flatten()"),
        words="not shifted", severity="warning",
    ),
    _fault(
        "plain_loop/padding-is-learned", "loop.padding-unlabelled", "loss = F.cross_entropy",
        ("labels = ids.masked_fill(mask == 0, -100)", "labels = ids.clone()"), words="token 0",
    ),
    _fault(
        "plain_loop/same-batch-every-step", "loop.fresh-batches", "batch = next(iter(loader))",
        ("shuffle=True", "shuffle=False"),
        ("    for step, batch in enumerate(loader):\n", "    for step in range(10):\n        batch = next(iter(loader))\n"),
        words="the same batch", severity="warning",
    ),
    _fault(
        "plain_loop/decayed-norms", "loop.norms-undecayed", "optimizer = torch.optim.AdamW(",
        ("decayed = [p for p in model.parameters() if p.ndim > 1]", "decayed = [p for n, p in model.named_parameters() if 'bias' not in n]"),
        ("rest = [p for p in model.parameters() if p.ndim == 1]", "rest = [p for n, p in model.named_parameters() if 'bias' in n]"),
        words="norm", severity="note",
    ),
    _fault(
        "plain_loop/reset-before-the-step", "loop.gradients-reach-the-step", "optimizer.zero_grad()",
        ("        optimizer.zero_grad()\n", ""), ("        optimizer.step()", "        optimizer.zero_grad()\n        optimizer.step()"),
        words="no weight changes",
    ),
    _fault(
        "plain_loop/clipped-after-the-step", "loop.clip-before-step", "nn.utils.clip_grad_norm_(",
        ("        nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", ""),
        ("        scheduler.step()", "        nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n        scheduler.step()"),
        words="has no effect", severity="warning",
    ),
    _fault(
        "plain_loop/rate-is-nan", "loop.learning-rate", "        optimizer.step()",
        ("LinearLR(optimizer, 0.1, 1.0, total_iters=4)", 'LambdaLR(optimizer, lambda step: step / 4 if step < 4 else float("nan"))'),
        words="is nan",
    ),
    _fault(
        "plain_loop/warm-up-in-whole-numbers", "loop.learning-rate", "        optimizer.step()",
        ("LinearLR(optimizer, 0.1, 1.0, total_iters=4)", "LambdaLR(optimizer, lambda step: step // 100)"),
        words="was 0 in each", severity="warning",
    ),
    _fault(
        "plain_loop/mask-without-expansion",
        "shape.fits",
        "visible = causal & attention_mask",
        ("attention_mask[:, None, None, :].bool()", "attention_mask.bool()"),
        words="B=4",
        loud=True,
    ),
    _fault(
        "plain_loop/heads-times-wrong-size", "shape.fits", "query, key, value = self.qkv",
        ("view(batch, length, 3, 4, 8)", "view(batch, length, 3, 4, 16)"), loud=True,
    ),
    _fault(
        "plain_loop/view-after-transpose", "shape.fits", "mixed = (scores.softmax(-1)",
        (".transpose(1, 2).reshape(batch", ".transpose(1, 2).view(batch"), words="view never copies", loud=True,
    ),
    # hf_trainer
    _fault(
        "hf_trainer/padding-is-learned", "loop.padding-unlabelled", "trainer.train()",
        ("labels = ids.masked_fill(mask == 0, -100)", "labels = ids.clone()"), words="token 0",
    ),
    _fault(
        "hf_trainer/labels-shifted-twice", "loop.labels-shifted-once", "trainer.train()",
        ("    labels = ids.masked_fill(mask == 0, -100)\n", "    labels = torch.full_like(ids, -100)\n    labels[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)\n"),
        words="already shifted by one",
    ),
    _fault(
        "hf_trainer/eos-masked-with-padding", "loop.eos-is-learned", "trainer.train()",
        ("VOCAB, EOS, PAD = 89, 2, 0", "VOCAB, EOS, PAD = 89, 2, 2"),
        ("labels = ids.masked_fill(mask == 0, -100)", "labels = ids.masked_fill(ids == PAD, -100)"),
        words="never learns to stop", severity="warning",
    ),
    _fault(
        "hf_trainer/added-tokens", "index.in-bounds", "trainer.train()",
        ("torch.cat([torch.randint(3, VOCAB, ", "torch.cat([torch.randint(3, VOCAB + 4, "),
        words="`model.embed_tokens.weight` has 89 rows", loud=True,
    ),
    # ddp
    _fault(
        "ddp/no-sampler", "loop.ranks-see-different-data", "",
        ("sampler=sampler", "shuffle=False"), words="ranks 0 and 1",
    ),
    _fault(
        "ddp/bad-token-on-one-rank", "index.in-bounds", "return self.head(self.embed(input_ids))",
        ("    sampler = ", '    if os.environ["RANK"] == "1":\n        data = [torch.full((9,), VOCAB)] * 64\n    sampler = '),
        words="token id 37", loud=True,
    ),
    _fault(
        "ddp/never-synchronised", "loop.ranks-share-one-model", "optimizer.step()",
        ("    for step, ids", "    model.require_backward_grad_sync = False\n    for step, ids"),
        words="no backward of these steps averaged", severity="warning",
    ),
    _fault(
        "ddp/never-wrapped", "loop.ranks-share-one-model", "optimizer.step()",
        ("DistributedDataParallel(Model())", "Model()"), words="exchanged neither gradients nor weights", severity="warning",
    ),
    _fault(
        "ddp/epoch-not-set", "loop.fresh-batches", "for step, ids in",
        ("enumerate(loader)", "enumerate(ids for _ in range(3) for ids in loader)"), ("(64, 9)", "(24, 9)"), ("step == 5", "step == 8"),
        words="has the same order", severity="warning",
    ),
    # accumulation
    _fault(
        "accumulation/mean-of-means", "loop.token-weighted-accumulation", "loss.backward()",
        ('reduction="sum") / tokens', 'reduction="mean") / MICRO'), words="unequal lengths", severity="warning",
    ),
    _fault(
        "accumulation/schedule-per-micro-batch", "loop.schedule-per-update", "            scheduler.step()",
        ("        optimizer.step()\n        scheduler.step()\n", "        optimizer.step()\n"),
        ("            shown += loss.item()", "            shown += loss.item()\n            scheduler.step()"),
        words="4 times", severity="warning",
    ),
    _fault(
        "accumulation/no-zero-grad", "loop.gradients-reset", "loss.backward()",
        ("        optimizer.zero_grad(set_to_none=False)\n", ""),
    ),
    _fault(
        "accumulation/added-up", "loop.accumulation-divided", "loss.backward()",
        ('reduction="sum") / tokens', 'reduction="mean")'), ("torch.randint(6, 31, (MICRO,))", "[9] * MICRO"),
        words="sum of 4", severity="note",
    ),
    # amp_scaler
    _fault(
        "amp_scaler/clipped-before-unscaling", "loop.unscale-before-clip", "nn.utils.clip_grad_norm_(",
        ("        scaler.unscale_(optimizer)\n", ""), ("2.0**127", "2.0**16"), words="still carry the loss scale",
    ),
    _fault(
        "amp_scaler/backward-in-autocast", "loop.backward-outside-autocast", "scaler.scale(loss).backward()",
        ("        scaler.scale(loss).backward()", "            scaler.scale(loss).backward()"), words="inside autocast", severity="warning",
    ),
    _fault(
        "amp_scaler/logits-overflow-float16", "numerics.finite", "logits = (model(ids)",
        ("            logits = model(ids)", "            logits = (model(ids) * 1.0e6).to(torch.float16)"),
        words="overflow",
    ),
    _fault(
        "amp_scaler/step-past-the-scaler", "loop.step-unscaled", "        optimizer.step()",
        ("        scaler.unscale_(optimizer)\n        nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n", ""), ("2.0**127", "2.0**16"),
        ("        scaler.step(optimizer)\n        scaler.update()\n", "        optimizer.step()\n"),
        words="still carry the loss scale",
    ),
    _fault(
        "amp_scaler/never-updated", "loop.scaler-in-order", "scaler.unscale_(optimizer)",
        ("        scaler.update()\n", ""), words="update() has not run", loud=True,
    ),
    # compiled
    _fault(
        "compiled/label-beyond-classes", "index.in-bounds", "loss = F.cross_entropy",
        ("labels = ids[:, 1:].clone()", "labels = ids[:, 1:] + 1"), words="label 43", loud=True,
    ),
    _fault(
        "compiled/no-zero-grad", "loop.gradients-reset", "loss.backward()",
        ("        optimizer.zero_grad()\n", ""),
    ),
    # workers
    _fault(
        "workers/not-split", "loop.fresh-batches", "for step, ids in enumerate(loader)",
        ("if info is not None and number % info.num_workers != info.id:", "if info is None:"),
        words="every batch comes 2 times", severity="warning",
    ),
    _fault(
        "workers/bad-token", "index.in-bounds", "return self.head(self.embed(input_ids))",
        ("row = torch.randint(0, VOCAB, ", "row = torch.randint(0, VOCAB + 9, "), words="token id", loud=True,
    ),
    # lora
    _fault(
        "lora/reentrant-over-frozen", "loop.checkpoint-reaches-weights", "x = checkpoint(",
        ("use_reentrant=False", "use_reentrant=True"), words="LoraLinear",
    ),
    _fault(
        "lora/one-factor-left-out", "loop.every-parameter-optimized", "optimizer = torch.optim.AdamW(",
        ("trained = [parameter for parameter in model.parameters() if parameter.requires_grad]",
         "trained = [p for n, p in model.named_parameters() if p.requires_grad and 'lora_b' not in n]"),
        words="blocks.0.lora_b", severity="warning",
    ),
    # evaluation
    _fault(
        "evaluation/no-eval", "loop.evaluates-in-eval-mode", "return F.cross_entropy(",
        ("    model.eval()\n", ""), words="dropout", severity="warning",
    ),
    _fault(
        "evaluation/no-train", "loop.trains-in-train-mode", "optimizer.step()",
        ("    model.train()\n", ""), words="dropout is off", severity="warning",
    ),
    _fault(
        "evaluation/tie-lost", "loop.ties-kept", 'model.to_empty(device="cpu")',
        ("    model.head.weight = model.embed.weight\n", ""), words="head.weight",
    ),
    _fault(
        "evaluation/losses-in-a-list", "loop.graph-released", "history.append(loss)",
        ("    for step in range(8):", "    history = []\n    for step in range(8):"),
        ("        loss.backward()", "        loss.backward()\n        history.append(loss)"), words="`history` keeps",
    ),
    # schedule
    _fault(
        "schedule/scheduler-first", "loop.optimizer-before-scheduler", "scheduler.step()",
        ("        scheduler.step()\n", ""), ("        first.step()", "        scheduler.step()\n        first.step()"),
        words="never used", severity="warning",
    ),
    _fault(
        "schedule/row-masked-throughout", "numerics.finite", "x = x + self.project(scores.softmax(-1) @ x)",
        (".tril()", ".tril(-1)"), words="rows are -inf throughout",
    ),
    _fault(
        "schedule/norm-without-eps", "numerics.finite", "return self.weight * x * torch.rsqrt(",
        ("x.pow(2).mean(-1, keepdim=True) + 1e-6", "x.pow(2).mean(-1, keepdim=True)"),
        ("        x = self.embed(input_ids)\n", "        x = self.embed(input_ids)\n        x = x * (input_ids != 7)[..., None]\n"),
        words="rsqrt of 0",
    ),
    _fault(
        "schedule/bfloat16-weights", "loop.updates-survive-rounding", "second = torch.optim.AdamW(",
        ("    model = Model()\n", "    model = Model().bfloat16()\n"), ("lr=1e-3", "lr=1e-6"), ("lr=0.02", "lr=1e-7"),
        ("1e-6)", "1e-6).to(x.dtype)"),
        words="rounded away", severity="warning",
    ),
    _fault(
        "schedule/one-optimizer-not-reset", "loop.gradients-reset", "loss.backward()",
        ("        second.zero_grad()\n", ""),
    ),
)  # fmt: skip
