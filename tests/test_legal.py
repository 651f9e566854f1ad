"""Legal designs that a probe once took for a bug, each asked the one probe that was loud."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import olmodebug
from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.load import SubjectCodeError
from olmodebug.probe import Probe, not_applicable, shipped_probes
from olmodebug.records import Where
from olmodebug.report import Finding, Report, SourceLine, root_groups
from olmodebug.subject import Subject

CLEAN = Path(__file__).parent / "mutants" / "clean"
PROBES = {probe.name: probe for probe in shipped_probes()}


def asked(build: str, probes: str) -> Report:
    file, _, name = build.partition(":")
    return olmodebug.check(f"{CLEAN / file}.py:{name}", select_probes=probes)


@pytest.mark.parametrize(
    ("build", "probes"),
    [
        ("ahead_style:build", "next-token-cross-entropy or reach-every-parameter"),  # the loss of further heads, and their weights
        ("registers_style:build", "loss or state.leaves-things-alone"),  # smoothing, z-loss, ids by keyword only
        ("fast_style:build", "cache.matches-full-forward or device.made"),  # a cache made in float32, in a copy in float64
        ("recurrent_style:build", "residual-stream-kept"),  # the residual is added outside of the listed modules
        ("gates_style:build", "reach-every-parameter"),  # gates of zero, and a table of positions in three dimensions
        ("wordlm_style:build", "batch or no-future"),  # ids [seq_len, batch]
        ("wordlm_style:build_rnn", "batch or no-future"),
        ("wordlm_style:build_stateful", "batch or no-future or gradients"),  # a state that the caller hands over
        ("wordlm_style:build_stateful_rows", "batch or no-future or gradients"),
        ("megatron_style:build", "batch or no-future or loss"),  # a whole mask that must be given, and a loss for each token
        ("megatron_style:build_optional", "batch or padding.mask-is-accepted"),
        ("rwkv_style:build", "rows-and-branches-alive or residual-stream-kept"),  # zero on both sides, a norm in the first block
        ("scores_style:build", "scaled-by-head-size"),  # the scale stands far before the product
        ("scores_style:build_normed", "scaled-by-head-size"),
        ("scores_style:build_mup", "scaled-by-head-size"),
        ("scores_style:build_chunked", "batch or no-future or prefix-alone"),  # whole chunks only
        ("closure_style:build", "eval-repeats or reach-every-parameter or save-and-load"),  # a lambda that holds modules
        ("wrapped_style:build", "meta-build or gradients or no-future"),  # forward(*args, **kwargs), a row for no token
        ("wrapped_style:build_from_batch", "loss or no-future"),
        ("wrapped_style:build_autocast", "no-hidden-downcast"),
        ("wrapped_style:build_bfloat16", "meta-build"),
        ("library_style:build", "device or lifecycle or init or no-future"),  # a to() and an _apply of its own
        ("library_style:build_table", "deepcopy-equal or float16 or loss"),  # weights of zeros
        ("library_style:build_hub", "safetensors"),
        ("unusual_style:build_log", "takes-effect"),
        ("unusual_style:build_supervised", "takes-effect"),
        ("unusual_style:build_tanh", "takes-effect"),
        ("unusual_style:build_residual_norm", "takes-effect"),
        ("unusual_style:build_scaling", "takes-effect"),
        ("unusual_style:build_running", "takes-effect"),
        ("unusual_style:build_kept_share", "zero-rate-draws-nothing"),
        ("unusual_style:build_row_for_no_token", "experts-add-up"),
        ("unusual_style:build_columns", "experts-add-up"),
        *(
            (f"unusual_style:build_{name}", "gradients")
            for name in ("shrunk", "interpolated", "hooked", "hooked_block", "last_round", "sparse")
        ),
        ("unusual_style:build_padded_vocabulary", "generate"),
        ("unusual_style:build_begins", "generate"),
    ],
)
def test_a_legal_design_draws_neither_error_nor_warning(build: str, probes: str) -> None:
    report = asked(build, probes)
    assert [(f.probe, f.message) for f in (*report.of("error"), *report.of("warning"))] == []
    assert report.exit_code in (0, 5)  # 5: the one question that was once loud does not apply


def test_a_function_that_a_deep_copy_leaves_behind_is_told_once_and_with_its_condition() -> None:
    (finding,) = asked("closure_style:build", "deepcopy-equal").findings
    assert (finding.severity, finding.where.function) == ("warning", "Block.__init__.<lambda>")
    assert finding.message.endswith("h.0.feed is a function that holds m")


class Rotary(nn.Module):
    """One layer of rotary attention in bfloat16 beside tables in float32, that casts to bfloat16 in its code: it has no
    float64. `mixed`: angles for halves, pairs of neighbours."""

    def __init__(self, mixed: bool = False, dtype: torch.dtype = torch.bfloat16, base: float = 1e4) -> None:
        super().__init__()
        self.mixed, self.dtype = mixed, dtype
        self.config = {"vocab_size": 41, "context_length": 64}
        self.embed, self.head = nn.Embedding(41, 16, dtype=dtype), nn.Linear(16, 41, bias=False, dtype=dtype)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False, dtype=dtype) for _ in range(3))
        angles = torch.arange(64.0)[:, None] * base ** -(torch.arange(0, 16, 2) / 16)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        halves = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) if self.mixed else torch.cat((-x[..., 8:], x[..., :8]), -1)
        return (x * self.cos[: x.shape[1]] + halves * self.sin[: x.shape[1]]).to(self.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        scores = self.turn(self.q(x)) @ self.turn(self.k(x)).mT / 4
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.head((x + weights @ self.v(x)).to(self.dtype))


def test_tables_beside_weights_in_bfloat16_are_not_rounded_by_copies_in_the_models_own_dtype() -> None:
    report = olmodebug.check(f"{__file__}:Rotary", select_probes="deepcopy-equal or save-and-load or no-future")
    assert [(f.probe, f.message) for f in report.of("error")] == []
    assert {o.status for o in report.outcomes} == {"passed"}


@pytest.mark.parametrize(("mixed", "status"), [(False, "passed"), (True, "failed")])
def test_rotations_rounded_to_bfloat16_are_told_from_rotations_of_the_wrong_pairs(mixed: bool, status: str) -> None:
    torch.manual_seed(0)
    assert run_probe(PROBES["rope.depends-on-distance"], from_model(Rotary(mixed))).outcome.status == status


@pytest.mark.parametrize(("declared", "status"), [({"rope_local_base": 1e4}, "passed"), ({}, "failed")])
def test_the_base_of_local_layers_is_declared_in_a_plain_dict_too(declared: dict[str, float], status: str) -> None:
    subject = from_model(Rotary(dtype=torch.float32), config={"vocab_size": 41, "rope_theta": 1e6, **declared})
    assert run_probe(PROBES["rope.frequencies-as-configured"], subject).outcome.status == status


class Start(nn.Module):
    """Positions from start_pos on. It keeps no keys from one call to the next, or has room for four rows of them."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(41, 12), nn.Embedding(40, 12), nn.Linear(12, 41)
        self.sums = torch.zeros(4, 40, 12) if keeps else None
        self.config = {"vocab_size": 41, "max_gen_batch_size": 4, "n_heads": 3, "block_size": 40}

    def forward(self, idx: Tensor, start_pos: int = 0) -> Tensor:
        rows, length = idx.shape
        x = self.embed(idx) + self.place(torch.arange(start_pos, start_pos + length, device=idx.device))
        if self.sums is not None:
            self.sums = self.sums.to(x).detach()
            self.sums[:rows, start_pos : start_pos + length] = x
            x = self.sums[:rows, : start_pos + length].cumsum(1)[:, start_pos:]
        return self.head(x)


@pytest.mark.parametrize(("keeps", "status"), [(False, "not-applicable"), (True, "passed")])
def test_a_start_without_a_cache_is_no_cache_and_rows_stay_within_those_of_a_cache(keeps: bool, status: str) -> None:
    torch.manual_seed(0)
    report = olmodebug.check(Start(keeps), select_probes="cache.matches or no-future or batch")
    assert report.of("error") == ()
    assert {o.probe: o.status for o in report.outcomes}["cache.matches-full-forward"] == status


class MadeFirst(Start):
    """It keeps keys only for those who say where the tokens start, once setup_caches has made room."""

    def __init__(self) -> None:
        super().__init__(keeps=False)

    def setup_caches(self, max_batch_size: int, max_seq_len: int) -> None:
        self.sums = torch.zeros(max_batch_size, max_seq_len, 12)

    def forward(self, idx: Tensor, start_pos: int | None = None) -> Tensor:  # type: ignore[override]
        if start_pos is not None:
            assert self.sums is not None
            return super().forward(idx, start_pos)
        x = self.embed(idx) + self.place(torch.arange(idx.shape[1], device=idx.device))
        return self.head(x.cumsum(1))


class MadeFirstAlways(MadeFirst):
    def forward(self, idx: Tensor, start_pos: int) -> Tensor:  # type: ignore[override]
        return super().forward(idx, start_pos)


@pytest.mark.parametrize("kind", [MadeFirst, MadeFirstAlways])
def test_a_start_is_given_to_a_model_that_wants_one_and_its_cache_is_made_before(kind: type[MadeFirst]) -> None:
    torch.manual_seed(0)
    report = olmodebug.check(kind(), select_probes="cache.matches or no-future or batch")
    assert report.of("error") == ()
    assert {o.probe: o.status for o in report.outcomes}["cache.matches-full-forward"] == "passed"


class OnRequest(nn.Module):
    """Logits for those who ask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(41, 12), nn.Linear(12, 41)

    def forward(self, idx: Tensor, targets: Tensor | None = None, get_logits: bool = False) -> dict[str, Tensor | None]:
        logits = self.head(self.embed(idx))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return {"logits": logits if get_logits else None, "loss": loss}


def test_a_switch_that_hands_out_the_logits_is_thrown() -> None:
    subject = from_model(OnRequest())
    assert subject.info().convention.startswith("forward(idx, targets, get_logits=True)")
    assert run_probe(PROBES["loss.next-token-cross-entropy"], subject).outcome.status == "passed"


def test_what_a_model_raises_under_an_instrument_is_a_finding_and_no_fault_of_a_probe() -> None:
    def probe_of(subject: Subject) -> Iterator[Finding]:
        subject.model(torch.tensor([[99]]))
        yield from ()

    result = run_probe(Probe(name="vocab.asks-too-much", function=probe_of), from_model(OnRequest()))
    assert (result.outcome.status, result.findings[0].where.function) == ("failed", "OnRequest.forward")


def test_what_does_not_apply_in_the_models_own_dtype_is_no_finding_of_the_copy_in_float64() -> None:
    def probe_of(subject: Subject) -> Iterator[Finding]:
        if subject.twin().dtype == torch.float64:
            raise SubjectCodeError("run") from RuntimeError("expected scalar type Double but found Float")
        not_applicable("forward takes no attention_mask")
        yield

    result = run_probe(Probe(name="cache.asks-first", function=probe_of), from_model(Small("smooth")))
    assert (result.outcome.status, result.outcome.reason, result.findings) == ("not-applicable", "forward takes no attention_mask", ())


def test_tables_of_a_model_in_bfloat16_are_told_as_what_they_are() -> None:
    report = asked("wrapped_style:build_bfloat16", "rope")
    assert report.of("error") == ()
    assert [f.cause for f in report.of("warning") if f.probe == "rope.depends-on-distance"] == [
        "the model is in bfloat16, and its buffer cos with it: cosines and sines carry 8 bits"
    ]


def test_a_head_of_zeros_hides_no_gradient_and_what_is_dead_for_good_is_still_told() -> None:
    (finding,) = asked("modded_style:build", "reach-every-parameter").findings
    # the first layer mixes its values with themselves
    assert finding.message == "transformer.h.0.attn.lamb gets a gradient of exactly zero"


class Small(nn.Module):
    """The loss is what the test says it is."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.kind = nn.Embedding(31, 12), nn.Linear(12, 31), loss

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.head(self.embed(input_ids))
        if labels is None:
            return (logits,)
        scores, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        plain = F.cross_entropy(scores, target)
        smooth = F.cross_entropy(scores, target, label_smoothing=0.2)
        losses = {
            "smooth": smooth,
            "z": plain + 1e-2 * scores.logsumexp(-1).pow(2).mean(),
            "less": 0.9 * plain,  # no smoothing: the rest is missing
            "twice": F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten()) + 0.1,  # a term beside a wrong shift
            "halved": smooth / 2,
        }
        return losses[self.kind], logits


@pytest.mark.parametrize(
    ("kind", "status"), [("smooth", "passed"), ("z", "passed"), ("less", "failed"), ("twice", "failed"), ("halved", "failed")]
)
def test_terms_beside_the_cross_entropy_are_a_choice_and_another_cross_entropy_is_not(kind: str, status: str) -> None:
    result = run_probe(PROBES["loss.next-token-cross-entropy"], from_model(Small(kind)))
    assert result.outcome.status == status


def test_a_loss_that_knows_no_label_of_minus_100_can_be_trained_and_measured() -> None:
    from olmodebug.footprint.training_step import StepPlan, loss_of
    from olmodebug.spec import Job, resolve

    subject = resolve(Job(spec=f"{CLEAN / 'modded_style.py'}:build"))  # ignore_index=-1, and the loss alone comes back
    ids = torch.tensor(subject.token_ids(2, 9))
    loss = loss_of(subject, StepPlan(), ids)
    expected = F.cross_entropy(subject.model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
    assert loss.requires_grad
    assert torch.allclose(loss, expected)


class FewPositions(nn.Module):
    """A table of 40 positions, and no config that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions, self.head = nn.Embedding(31, 8), nn.Embedding(40, 8), nn.Linear(8, 31)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1])))


def test_a_sample_asks_no_model_for_more_positions_than_it_has() -> None:
    from olmodebug.training.child import SAMPLE_TOKENS, _sample

    encoder = SimpleNamespace(rows=31, decode=lambda ids: " ".join(map(str, ids)))
    dataset = SimpleNamespace(validation=[SimpleNamespace(ids=list(range(30)))], encoder=encoder)
    sample = _sample(from_model(FewPositions()), dataset)
    assert sample is not None
    assert len(sample["text"].split()) == SAMPLE_TOKENS


def test_weights_of_further_heads_are_reached_by_the_models_own_loss_alone() -> None:
    from olmodebug.spec import Job, resolve

    subject = resolve(Job(spec=f"{CLEAN / 'ahead_style.py'}:build"))
    names = ["mtp_proj.weight", "embed.weight"]
    assert subject.reached_by_own_loss(subject.first_case(), names) == set(names)
    assert from_model(Small("z")).reached_by_own_loss(subject.first_case(), []) == set()


class FloatsOnly(nn.Module):
    """Index-assigns into float32 memory of its own when it is called in train mode: a copy in float64 cannot, it can."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        self.embed, self.head, self.broken = nn.Embedding(29, 8), nn.Linear(8, 29), broken

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        if input_ids.shape[1] > 7:
            memory = torch.zeros(hidden.shape, dtype=torch.float32)
            memory[:, torch.arange(hidden.shape[1])] = hidden[..., : 7 if self.broken else None]
            hidden = memory
        return self.head(hidden)


@pytest.mark.parametrize(("broken", "status"), [(False, "passed"), (True, "failed")])
def test_what_only_a_copy_in_float64_cannot_do_is_no_fault_of_the_model(broken: bool, status: str) -> None:
    result = run_probe(PROBES["causality.no-future"], from_model(FloatsOnly(broken=broken)))
    assert result.outcome.status == status
    if not broken:
        assert "not in its own dtype" in str(result.outcome.reason)


class Parts(nn.Module):
    """One layer gives several things, of which `kind` says what is read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed, self.fused = nn.Embedding(20, 12), nn.Linear(12, 24)
        self.head = nn.Linear(12, {"filled": 30, "ahead": 40}.get(kind, 20))

    def forward(self, input_ids: Tensor) -> Tensor:
        gate, value = self.fused(self.embed(input_ids)).chunk(2, -1)
        hidden = F.silu(gate) * (gate if self.kind == "unread" else value)
        return self.head(hidden)[..., :20]  # rows that fill a tile, or a head for the token after the next


@pytest.mark.parametrize(("kind", "found"), [("read", 0), ("filled", 0), ("ahead", 0), ("unread", 1)])
def test_a_part_of_a_layer_that_nothing_reads_is_told_and_rows_beyond_the_vocabulary_are_not(kind: str, found: int) -> None:
    result = run_probe(PROBES["gradients.reach-every-parameter"], from_model(Parts(kind)))
    assert [finding.message for finding in result.findings] == ["fused.weight[12:24] gets a gradient of exactly zero"] * found


class Offset(nn.Module):
    """Two rows of the table are never a position, as in RoBERTa."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=100, vocab_size=31)
        self.embed, self.positions, self.head = nn.Embedding(31, 8), nn.Embedding(100, 8), nn.Linear(8, 31)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) + self.positions(torch.arange(2, input_ids.shape[1] + 2)))


def test_a_sequence_longer_than_the_model_takes_is_no_matter_of_finite_logits() -> None:
    assert run_probe(PROBES["logits.finite"], from_model(Offset())).outcome.status == "passed"


def test_what_two_cases_show_at_one_line_is_told_once() -> None:
    first, other = (Finding(probe="", severity="error", message=text) for text in ("one fault", "another fault"))
    twice = replace(PROBES["logits.finite"], function=lambda subject: iter([first, other, first]))
    result = run_probe(twice, from_model(Small("smooth")))
    assert [finding.message for finding in result.findings] == ["one fault", "another fault"]


def written(source: str, line: int, probe: str) -> Finding:
    where = Where(function="GPT.__init__", file="m.py", line=line)
    return Finding(probe=probe, severity="warning", message=probe, where=where, source=(SourceLine(number=line, text=source, marked=True),))


def test_two_findings_that_name_a_whole_function_are_two() -> None:
    init = [written("    def __init__(self, config):", 80, probe) for probe in ("lifecycle.tie-survives", "structure.layers-are-distinct")]
    assert root_groups(init) == [[0], [1]]
    line = [written("        self.h = [Block(config)]", 84, probe) for probe in ("lifecycle.save-and-load", "structure.registered")]
    assert root_groups(line) == [[0, 1]]


class Listed(nn.Module):
    """Layers in a plain list, and a condition on names of layers that only other configurations have."""

    def __init__(self, registered: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(41, 12), nn.Linear(12, 41)
        layers = [nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.1)) for _ in range(2)]
        self.layers = nn.ModuleList(layers) if registered else layers
        self.embed.weight = nn.Parameter(self.embed.weight.detach() * 0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("head.weight"):
                nn.init.normal_(parameter, std=0.02)
            if name.endswith("router.weight"):
                nn.init.zeros_(parameter)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_dropout_in_modules_that_eval_does_not_reach_is_told_as_that() -> None:
    torch.manual_seed(0)
    (finding,) = run_probe(PROBES["determinism.eval-repeats"], from_model(Listed())).findings
    assert finding.cause == "the modules in layers are not registered, so model.eval() does not reach them: their dropout goes on"


def test_a_condition_for_other_configurations_is_no_slip_and_a_lost_tie_is_placed_where_it_is_made() -> None:
    report = olmodebug.check(f"{__file__}:Listed", config={"registered": True}, select_probes="init.as-configured or tie-survives")
    assert [(f.probe, f.where.line) for f in report.findings] == [("lifecycle.tie-survives", TIED_AT)]


TIED_AT = next(
    n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.strip() == "self.head.weight = self.embed.weight"
)


class OneForAll(nn.Module):
    """Three layers, of which the first is called each time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(41, 12), nn.Linear(12, 41)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in self.layers:
            x = x + self.layers[0](x)
        return self.head(x)


def test_a_module_that_is_never_called_is_told_where_it_should_have_been() -> None:
    torch.manual_seed(0)
    (finding,) = run_probe(PROBES["gradients.reach-every-parameter"], from_model(OneForAll())).findings
    assert (finding.where.function, finding.cause) == ("OneForAll.forward", "layers.1 is never called: no op of forward computes with it")


class TwoPaths(nn.Module):
    """Fused attention where nothing is padded, written out where something is; rows of a table by the place of a chunk.

    `broken`: "mask", the path for padding is not causal; "table", every chunk reads the table from its first row on.
    """

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken = broken
        self.embed, self.head = nn.Embedding(41, 12), nn.Linear(12, 41)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.register_buffer("scale", 1 + torch.arange(40.0)[:, None] * 0.05, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, use_cache: bool = False) -> Any:
        x = self.embed(input_ids)
        start = past_key_values[0].shape[1] if past_key_values is not None else 0
        first = 0 if self.broken == "table" else start
        q, k, v = (self.qkv(x) * self.scale[first : first + x.shape[1]]).chunk(3, -1)
        if past_key_values is not None:
            k, v = torch.cat((past_key_values[0], k), 1), torch.cat((past_key_values[1], v), 1)
        if start == 0 and (attention_mask is None or bool(attention_mask.all())):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.mT / 12**0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(start + 1)
            if self.broken != "mask":
                scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
            if attention_mask is not None:
                scores = scores.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(scores.dtype).min)
            mixed = scores.softmax(-1) @ v
        return {"logits": self.head(x + self.out(mixed)), "past_key_values": (k, v) if use_cache else None}


def told_of(broken: str, probe: str) -> list[tuple[str | None, str | None]]:
    torch.manual_seed(0)
    return [(f.where.function, f.cause) for f in run_probe(PROBES[probe], from_model(TwoPaths(broken))).findings]


def test_causality_holds_on_the_path_for_padding_too() -> None:
    assert told_of("", "causality.no-future") == []
    ((function, cause),) = told_of("mask", "causality.no-future")
    assert function == "TwoPaths.forward" and cause is not None and "no causal mask" in cause


def test_a_table_read_from_its_first_row_in_each_chunk_is_told_and_the_copy_stays_as_it_was() -> None:
    assert told_of("", "cache.matches-full-forward") == []
    ((function, cause),) = told_of("table", "cache.matches-full-forward")
    assert function == "TwoPaths.forward" and cause is not None and cause.startswith("positions restart at 0 in each chunk")
    torch.manual_seed(0)
    subject = from_model(TwoPaths("table"))
    run_probe(PROBES["cache.matches-full-forward"], subject)
    assert torch.equal(subject.twin().model.scale, subject.model.scale.double())


class KVCache:
    """What the caller of Handed makes."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None


class Handed(nn.Module):
    """A cache that is handed in; one key of what it holds is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(41, 12), nn.Linear(12, 41)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed(input_ids)
        keys = values = x
        if cache is not None and cache.keys is not None and cache.values is not None:
            keys, values = torch.cat((cache.keys[:, 1:], x), 1), torch.cat((cache.values, x), 1)
        if cache is not None:
            cache.keys, cache.values = keys, values
        later = torch.ones(x.shape[1], keys.shape[1], dtype=torch.bool, device=x.device).triu(1 + keys.shape[1] - x.shape[1])
        return self.head(x + (x @ keys.mT).masked_fill(later, float("-inf")).softmax(-1) @ values)


def test_a_handed_cache_whose_sizes_do_not_fit_is_a_broken_one_and_not_none() -> None:
    torch.manual_seed(0)
    subject = from_model(Handed())
    assert subject.convention.hands_cache
    assert run_probe(PROBES["cache.matches-full-forward"], subject).outcome.status == "failed"


class HandedToTwo(Handed):
    """The method that makes the caches of its two layers makes one for both, or one that each call of forward can use."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared

    def make_cache(self) -> list[KVCache]:
        return [KVCache()] * 2 if self.shared else [KVCache(), KVCache()]

    def forward(self, input_ids: Tensor, cache: list[KVCache] | None = None) -> Tensor:  # type: ignore[override]
        x, n = self.embed(input_ids), input_ids.shape[1]
        past = 0 if cache is None or cache[0].keys is None else cache[0].keys.shape[1]
        hidden = torch.ones(n, past + n, dtype=torch.bool, device=x.device).triu(1 + past)
        for layer in range(2):
            keys = x
            if cache is not None:
                kept = cache[layer].keys
                keys = cache[layer].keys = x if kept is None else torch.cat((kept, x), 1)
            x = x + (x @ keys.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ keys
        return self.head(x)


@pytest.mark.parametrize(("shared", "status"), [(True, "failed"), (False, "passed")])
def test_a_cache_of_the_models_own_making_that_its_first_call_cannot_use_is_told(shared: bool, status: str) -> None:
    torch.manual_seed(0)
    assert run_probe(PROBES["cache.matches-full-forward"], from_model(HandedToTwo(shared))).outcome.status == status
