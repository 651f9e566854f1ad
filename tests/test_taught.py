"""What models by other people taught: legal designs that were loud, and faults that were quiet or told with another's cause."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import olmodebug
from olmodebug.examine import Result, run_probe
from olmodebug.first_run import from_model
from olmodebug.probe import shipped_probes
from olmodebug.subject import Subject
from olmodebug.tiny import build_tiny
from tests.mutants.catalog import MUTANTS
from tests.scoreboard import judge

PROBES = {probe.name: probe for probe in shipped_probes()}


def ask(probe: str, model: nn.Module, config: object = None) -> Result:
    return run_probe(PROBES[probe], from_model(model, config=config))


class Mixed(nn.Module):
    """An embedding, something between rows or positions that the test names, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed, self.gate, self.head = nn.Embedding(31, 12), nn.Linear(12, 5), nn.Linear(12, 31)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.kind == "faint mean":  # far below what float32 shows
            x = x + 1e-7 * x.float().mean(1, keepdim=True).type_as(x)
        elif self.kind == "faint rows":
            x = x + 1e-7 * x.float().mean(0, keepdim=True).type_as(x)
        elif self.kind == "float32":
            x = x.float().square().type_as(x)
        elif self.kind == "roll":
            x = x + torch.roll(x, 1, dims=0)
        elif self.kind == "experts":
            x = x * self.gate(x).flatten(0, 1).softmax(0).amax(-1).view(*input_ids.shape, 1)
        return self.head(x)


def test_a_leak_that_a_cast_to_float32_hides_is_seen_with_every_cast_kept_in_float64() -> None:
    (later,) = ask("causality.no-future", Mixed("faint mean")).findings
    assert later.cause == "the mean over the sequence lets every position depend on later tokens"
    (rows,) = ask("batch.rows-independent", Mixed("faint rows")).findings
    assert rows.cause == "the mean over the batch lets every position depend on the other rows"
    assert ask("causality.no-future", Mixed("float32")).outcome.status == "passed"
    assert ask("batch.rows-independent", Mixed("float32")).outcome.status == "passed"


@pytest.mark.parametrize(("kind", "words"), [("roll", "moves along the batch"), ("experts", "holds tokens")])
def test_what_is_done_along_the_batch_is_not_told_as_of_the_sequence(kind: str, words: str) -> None:
    (finding, *_) = ask("batch.rows-independent", Mixed(kind)).findings
    assert words in str(finding.cause)


class Inverted(nn.Module):
    """One attention whose scores are filled with a finite number where the mask hides: the last query then sees all alike."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hides, self.embed, self.head = hides, nn.Embedding(31, 12), nn.Linear(12, 31)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = x @ x.transpose(1, 2)
        scores = scores.masked_fill(~later, -1e9) if self.hides == "past" else scores
        if self.hides == "itself too":
            scores = scores.masked_fill(torch.ones_like(later).triu(), torch.finfo(scores.dtype).min)
        if self.hides == "later, over heads":
            scores = torch.stack((scores, 2 * scores), 1).masked_fill(later, torch.finfo(scores.dtype).min)
            return self.head((scores.softmax(1) @ x[:, None]).sum(1))
        if self.hides == "nothing, beside a sink":
            return self.head(torch.cat((scores, torch.zeros_like(scores[..., :1])), -1).softmax(-1)[..., :-1] @ x)
        return self.head(scores.softmax(-1) @ x)


@pytest.mark.parametrize(
    ("hides", "words"),
    [
        ("past", "mask is inverted"),
        ("nothing", "no causal mask reaches"),
        ("nothing, beside a sink", "no causal mask reaches"),
        ("later, over heads", "softmax runs over the heads (dim=1)"),
        ("itself too", "the mask hides every query's own key"),
    ],
)
def test_an_inverted_mask_is_told_as_such_though_its_last_query_sees_all(hides: str, words: str) -> None:
    (finding, *_) = ask("causality.no-future", Inverted(hides)).findings
    assert words in str(finding.cause)


class Wide(nn.Module):
    """A table of decays counted from the middle, kept for the longest sequence so far: the same function in other bits."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wrong, self.embed, self.head = wrong, nn.Embedding(31, 12), nn.Linear(12, 31)
        self.kept: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        x, n = self.embed(input_ids), input_ids.shape[1]
        if self.kept is None or len(self.kept) < n:
            self.kept = 1.01 ** (torch.arange(n, device=x.device) - n // 2).to(x.dtype)
        scale = self.kept[:n, None].to(x)
        scores = (x * scale) @ (x / (1 if self.wrong else scale)).transpose(1, 2)
        later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        return self.head(scores.masked_fill(later, float("-inf")).softmax(-1) @ x)


@pytest.mark.parametrize(("wrong", "status"), [(False, "passed"), (True, "failed")])
def test_a_table_made_for_a_longer_sequence_may_differ_by_rounding_and_by_no_more(wrong: bool, status: str) -> None:
    assert ask("state.calls-do-not-interfere", Wide(wrong)).outcome.status == status


class Remembers(nn.Module):
    """What one layer makes goes on to the next segment, another layer's result nowhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.write, self.head = kind, nn.Embedding(31, 12), nn.Linear(12, 12), nn.Linear(12, 31)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        memory = self.write(x)
        return (self.head(x), memory) if self.kind == "memory" else self.head(x + memory.detach() if self.kind == "cut" else x)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("memory", None),
        ("dropped", "nothing uses what forward computes with it"),
        ("cut", "detach cuts the path from there to the logits: without it write.weight gets a gradient"),
    ],
)
def test_what_gets_no_gradient_is_told_by_where_its_result_goes(kind: str, cause: str | None) -> None:
    found = ask("gradients.reach-every-parameter", Remembers(kind)).findings
    assert [str(f.cause).partition(" (")[0] for f in found] == ([cause] if cause else [])


class Trained(nn.Module):
    """Labels come aligned, and -1 is what does not count, in a loss over more than two dimensions."""

    def __init__(self, ignored: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ignored, self.embed, self.head = ignored, nn.Embedding(31, 12), nn.Linear(12, 31)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.head(self.embed(x))
        if labels is None:
            return (logits,)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=self.ignored), logits


def test_a_loss_with_an_ignored_label_of_its_own_is_asked_with_that_one() -> None:
    assert ask("loss.ignores-minus-100", Trained(-1)).outcome.status == "passed"
    assert ask("loss.ignores-minus-100", Trained(-7)).outcome.status == "not-applicable"


class Normed(nn.Module):
    """Blocks with attention and feed-forward, each with a norm that the first alone, or every one, puts into the stream."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)
        self.blocks = nn.ModuleList(NormedBlock(first=everywhere or i == 0) for i in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class NormedBlock(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm_in, self.norm_attn, self.norm_mlp = (nn.LayerNorm(12) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.norm_in(x)
        y = self.norm_attn(x)
        q, k, v = self.q_proj(y), self.k_proj(y), self.v_proj(y)
        x = x + self.o_proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0])
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


@pytest.mark.parametrize(("everywhere", "findings"), [(False, 0), (True, 1)])
def test_a_norm_of_the_embeddings_may_stand_in_a_block_that_all_share_the_class_of(everywhere: bool, findings: int) -> None:
    assert len(ask("norm.residual-stream-kept", Normed(everywhere)).findings) == findings


class Asked(nn.Module):
    """Logits only where they are asked for, as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)

    def forward(self, idx: Tensor, targets: Tensor | None = None, get_logits: bool = False) -> dict[str, Tensor | None]:
        logits = self.head(self.embed(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return {"logits": logits if get_logits else None, "loss": loss}


def test_a_switch_for_the_logits_is_turned_on() -> None:
    subject: Subject = from_model(Asked(), config=SimpleNamespace(vocab_size=31))
    assert subject.convention.flags == ("get_logits",)
    assert run_probe(PROBES["loss.next-token-cross-entropy"], subject).outcome.status == "passed"


class LoadsItself(Asked):
    """Its load_state_dict returns nothing."""

    def forward(self, idx: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.embed(idx))

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().load_state_dict(state_dict, *args, **kwargs)


def test_a_load_state_dict_of_the_models_own_may_return_nothing() -> None:
    subject = from_model(LoadsItself())
    subject.remake = lambda seed: LoadsItself()
    assert run_probe(PROBES["lifecycle.safetensors-round-trip"], subject).outcome.status == "passed"


class Shifted(nn.Module):
    """A short filter or a shift along the sequence that looks the wrong way by one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.head = kind, nn.Embedding(31, 12), nn.Linear(12, 31)
        self.filter = nn.Conv1d(12, 12, 4, padding=3, groups=12)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, n = self.embed(input_ids), input_ids.shape[1]
        if self.kind.startswith("filter"):
            start = 1 if self.kind == "filter late" else 0
            x = x + self.filter(x.transpose(1, 2))[..., start : start + n].transpose(1, 2)
        else:
            x = x + F.pad(x, (0, 0, -1, 1) if self.kind == "shift back" else (0, 0, 1, -1))
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("filter", ""), ("shift", ""), ("filter late", "every position sees the next 1"), ("shift back", "holds what stands at t + 1")],
)
def test_a_filter_or_a_shift_that_looks_ahead_is_told_by_how_far(kind: str, words: str) -> None:
    causes = [str(f.cause) for f in ask("causality.no-future", Shifted(kind)).findings]
    assert [words in cause for cause in causes] == ([True] if words else [])


def test_three_faults_that_notebooks_pass_on_are_told_apart_each_at_its_line() -> None:
    file = Path(__file__).parent / "mutants" / "notebook.py"
    report = olmodebug.check(f"{file}:Decoder", select_probes="eval-repeats or no-future or made-where-the-inputs-are")
    lines = file.read_text(encoding="utf-8").splitlines()
    told = {f.probe: (lines[(f.where.line or 1) - 1].strip(), f.cause or "") for f in report.of("error")}
    assert {probe: line for probe, (line, _) in told.items()} == {
        "determinism.eval-repeats": "return F.scaled_dot_product_attention(q, k, self.v(x), dropout_p=0.1, is_causal=True)",
        "causality.no-future": "rms = torch.linalg.norm(x, dim=(1, 2), keepdim=True) / x[0].numel() ** 0.5",
        "device.made-where-the-inputs-are": 'q, k = (torch.einsum("btd,tde->bte", y, turn) for y in (self.q(x), self.k(x)))',
    }
    words = ("dropout is not switched off", "the norm over the sequence", "a plain attribute")
    assert all(word in cause for word, (_, cause) in zip(words, told.values(), strict=True)), told


def test_a_class_of_transformers_that_drops_its_rotation_is_told_though_positions_move_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    model, config = build_tiny("LlamaForCausalLM")
    assert ask("position.honoured", model, config).outcome.status == "passed"
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **kwargs: (q, k))
    (finding,) = ask("position.honoured", model, config).findings
    assert (finding.severity, finding.where.function) == ("error", "LlamaRotaryEmbedding.forward")
    assert "the rotation is not applied" in (finding.cause or "")


@pytest.mark.parametrize(("name", "topic"), [("hf/activation-left-out", "mlp"), ("hf/attention-softcap-missing", "attention")])
def test_what_a_config_declares_and_forward_leaves_out_is_told(name: str, topic: str) -> None:
    row = judge(next(mutant for mutant in MUTANTS if mutant.name == name), f"{topic}.")
    assert (row["detected"], row["placed"], row["explained"], row["broke"]) == (True, True, True, [])
