"""Two implementations: right pairs pass in logits, loss and every gradient, and what differs is placed and explained."""

import re
from pathlib import Path

import pytest

from olmodebug.errors import SubjectError
from olmodebug.implementations.aligned import align
from olmodebug.implementations.comparison import compare
from olmodebug.implementations.mapping import heads_of
from olmodebug.implementations.wiring import weights_read
from olmodebug.spec import Job, resolve
from tests.benchmarks.implementations import PRESETS, judged, reference_of, subject_of
from tests.mutants.catalog import CLEAN
from tests.mutants.implementation_faults import FAULTS, FUSED_MLP, Fault

SHARP = frozenset(
    """
    hf/interleaved-rope hf/rope-theta-ignored hf/kv-tiled hf/window-off-by-one hf/qk-norm-after-rope hf/scale-by-hidden-size
    hf/final-norm-missing hf/gate-and-up-swapped hf/final-softcap-missing hf/final-norm-eps hf/head-from-embedding
    hf/variance-detached nanogpt/qkv-order nanogpt/qkv-by-head nanogpt/tied-by-data llama/residual-overwritten-by-norm
    llama/post-norm nanogpt/parallel-residual llama/embedding-normed llama/qkv-clipped-far-out llama/experts-reversed llama/three-experts
    """.split()
)


@pytest.mark.parametrize(("preset", "other"), PRESETS)
def test_the_reference_model_equals_the_class_of_transformers_in_logits_loss_and_gradients(preset: str, other: str) -> None:
    subject = resolve(Job(spec=preset))
    report = compare(subject, reference_of(other, subject))
    assert report.verdict == "pass"
    # OLMo turns q and k in float32, Llama in their own dtype: the same model in float64, and not in bfloat16.
    noted = [(f.severity, f.evidence["cause"], f.where.function) for f in report.findings]
    assert noted == ([("note", "cast order", "apply_rotary_pos_emb")] if preset == "datadecide-tiny" else [])
    section = report.sections["implementations"]
    assert section["gradients"]["differing"] == 0
    assert section["gradients"]["compared"] == len(dict(subject.model.named_parameters()))
    assert section["logits"]["largest_difference"] <= 1e-6 * section["logits"]["largest_magnitude"]


@pytest.mark.parametrize(
    "fault", [pytest.param(f, id=f.mutant.name, marks=() if f.mutant.name in SHARP else pytest.mark.slow) for f in FAULTS]
)
def test_a_fault_is_found_placed_and_explained(fault: Fault, tmp_path: Path) -> None:
    for row in judged(fault, tmp_path):
        assert row.detected
        assert row.placed, row.place
        assert row.explained, row.cause


def test_interleaved_pairs_of_metas_keys_are_settled_by_value() -> None:
    subject = subject_of(CLEAN / "llama_style.py", "build")
    aligned = align(subject, reference_of("transformers:LlamaForCausalLM", subject))
    assert aligned.agree
    assert aligned.by_value == ("the rows of q and k of the subject stand in interleaved pairs",)


def test_fused_gate_and_up_pass_against_two_projections(tmp_path: Path) -> None:
    text = (CLEAN / "hf_style.py").read_text()
    for old, new in FUSED_MLP:
        text = text.replace(old, new)
    path = tmp_path / "fused.py"
    path.write_text(text)
    assert compare(subject_of(path, "build"), subject_of(CLEAN / "hf_style.py", "build")).findings == ()


def test_a_loss_taken_in_float32_is_no_fault_of_a_model_that_is_exact_otherwise() -> None:
    reference = subject_of(CLEAN / "nanogpt_style.py", "build")
    assert compare(reference_of("transformers:GPT2LMHeadModel", reference), reference).findings == ()


def test_a_stated_mapping_replaces_what_names_say() -> None:
    path = CLEAN / "hf_style.py"
    crossed = {
        f"model.layers.{i}.mlp.{a}_proj.weight": f"model.layers.{i}.mlp.{b}_proj.weight"
        for i in range(3)
        for a, b in (("gate", "up"), ("up", "gate"))
    }
    report = compare(subject_of(path, "build"), subject_of(path, "build"), stated=crossed)
    assert report.verdict == "fail"


def test_neither_subject_is_touched() -> None:
    subject = subject_of(CLEAN / "nanogpt_style.py", "build")
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    compare(subject, subject)
    assert all(p.equal(before[name]) and p.grad is None for name, p in subject.model.named_parameters())


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("olmo2-tiny", "olmo1-tiny", "no counterpart in olmo1-tiny for model.layers.0.self_attn.q_norm.weight"),
        ("olmo1-tiny", "olmo1-4M", "no counterpart in olmo1-tiny for model.layers.2.self_attn.q_proj.weight"),
    ],
)
def test_models_that_do_not_fit_get_one_sentence(one: str, other: str, words: str) -> None:
    with pytest.raises(SubjectError, match=words):
        compare(resolve(Job(spec=one)), resolve(Job(spec=other)))


def test_another_vocabulary_gets_one_sentence() -> None:
    with pytest.raises(SubjectError, match=r"the sizes differ: model.embed_tokens.weight of olmo2-tiny is \[67, 40\]"):
        compare(resolve(Job(spec="olmo2-tiny")), resolve(Job(spec="olmo2-tiny", config={"vocab_size": 60, "pad_token_id": 1})))


def _edited(tmp_path: Path, *edits: tuple[str, str]) -> Path:
    text = (CLEAN / "llama_style.py").read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "edited.py"
    path.write_text(text)
    return path


def test_a_subject_that_states_no_heads_takes_those_of_the_reference(tmp_path: Path) -> None:
    base = subject_of(CLEAN / "llama_style.py", "build")
    hidden = (("self.config = params", "pass"), ("self.params", "self.sizes"), ("self.n_heads", "self.h"), ("self.n_kv_heads", "self.g"))
    subject = subject_of(_edited(tmp_path, *hidden), "build")
    assert heads_of(subject) == (None, None)
    report = compare(subject, reference_of("transformers:LlamaForCausalLM", base))
    assert report.findings == ()


DISTANT = (
    "scores = scores + mask",
    "scores = scores + mask + torch.randn(seqlen, seqlen, generator=torch.Generator().manual_seed(1)).type_as(scores)",
)


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(("return y.type_as(x) * weight", "return (y * weight.float()).type_as(x)"), id="cast before it is used"),
        pytest.param(("normed = rms_norm(h, self.ffn_norm, self.norm_eps)", "normed = h"), id="left out behind another fault"),
    ],
)
def test_a_norm_is_no_cause_of_what_parts_before_it(beside: tuple[str, str], tmp_path: Path) -> None:
    base = subject_of(CLEAN / "llama_style.py", "build")
    report = compare(subject_of(_edited(tmp_path, DISTANT, beside), "build"), reference_of("transformers:LlamaForCausalLM", base))
    (finding,) = (f for f in report.findings if f.probe == "parity.outputs")
    assert (finding.where.function, finding.cause) == ("attention", None)


@pytest.mark.parametrize("names", ["fc1 fc2 fc3", "fc2 fc1 fc3", "linear_v linear linear_out"])
def test_the_matrices_of_a_gated_feed_forward_are_told_by_shape_and_value(names: str, tmp_path: Path) -> None:
    base = subject_of(CLEAN / "llama_style.py", "build")
    text = (CLEAN / "llama_style.py").read_text()
    for old, new in zip(("w1", "w3", "w2"), names.split(), strict=True):
        text = re.sub(rf"\b{old}\b", new, text)
    path = tmp_path / "renamed.py"
    path.write_text(text)
    assert compare(subject_of(path, "build"), reference_of("transformers:LlamaForCausalLM", base)).findings == ()


@pytest.mark.parametrize(
    "matrices",
    [
        pytest.param((), id="a list of experts"),
        pytest.param(
            (
                (
                    "self.experts = nn.ModuleList([FeedForward(args.dim, args.hidden_dim) for _ in range(args.n_experts)])",
                    "d, h, n = args.dim, args.hidden_dim, args.n_experts\n"
                    "        self.fc1, self.fc2, self.fc3 = (\n"
                    "            nn.ModuleList([nn.Linear(*size, bias=False) for _ in range(n)]) for size in ((d, h), (d, h), (h, d))\n"
                    "        )",
                ),
                (
                    "for i, expert in enumerate(self.experts):",
                    "for i in range(len(self.fc1)):\n"
                    "            expert = lambda x: self.fc3[i](F.silu(self.fc1[i](x)) * self.fc2[i](x))  # noqa: B023, E731",
                ),
            ),
            id="a list for each matrix",
        ),
        pytest.param(
            (
                (
                    "self.experts = nn.ModuleList([FeedForward(args.dim, args.hidden_dim) for _ in range(args.n_experts)])",
                    "d, h, n = args.dim, args.hidden_dim, args.n_experts\n"
                    "        self.gate_up_proj = nn.Parameter(torch.randn(n, d, 2 * h) / 8)\n"
                    "        self.down_proj = nn.Parameter(torch.randn(n, h, d) / 8)",
                ),
                (
                    "for i, expert in enumerate(self.experts):",
                    "for i in range(len(self.down_proj)):\n"
                    "            pair = lambda x: x @ self.gate_up_proj[i]  # noqa: B023, E731\n"
                    "            expert = lambda x: (F.silu(pair(x)[..., ::2]) * pair(x)[..., 1::2]) @ self.down_proj[i]  # noqa: B023, E731",
                ),
            ),
            id="stacked, turned and interleaved",
        ),
    ],
)
def test_experts_are_mapped_however_they_are_stored(matrices: tuple[tuple[str, str], ...], tmp_path: Path) -> None:
    path = _edited(tmp_path, ("norm_topk_prob: bool = False", "norm_topk_prob: bool = True"), *matrices)
    subject = subject_of(path, "build_moe")
    report = compare(subject, reference_of("transformers:MixtralForCausalLM", subject))
    assert report.findings == ()
    assert report.sections["implementations"]["gradients"]["compared"] >= 50


@pytest.mark.parametrize(
    ("edit", "function", "cause"),
    [
        (("return xq_out, xk_out", "return xq_out, xk"), "attention", "k is not turned by the angles of RoPE"),
        (
            (
                "xk_out_r = xk_r * cos - xk_i * sin\n    xk_out_i = xk_r * sin + xk_i * cos",
                "xk_out_r = xk_r * cos + xk_i * sin\n    xk_out_i = xk_i * cos - xk_r * sin",
            ),
            "apply_rotary_emb",
            "k is turned the other way",
        ),
        (
            ("normed = rms_norm(h, self.ffn_norm, self.norm_eps)", "normed = h"),
            "TransformerBlock.forward",
            "layers.0.ffn_norm is used for no logit",
        ),
    ],
    ids=["k not turned", "k turned the other way", "norm left out"],
)
def test_what_the_reference_does_and_the_subject_does_not(edit: tuple[str, str], function: str, cause: str, tmp_path: Path) -> None:
    base = subject_of(CLEAN / "llama_style.py", "build")
    report = compare(subject_of(_edited(tmp_path, edit), "build"), reference_of("transformers:LlamaForCausalLM", base))
    (finding,) = report.findings
    assert finding.where.function == function
    assert cause in (finding.cause or "")


def test_a_forward_without_gradients_is_compared_in_its_logits_alone(tmp_path: Path) -> None:
    base = subject_of(CLEAN / "llama_style.py", "build")
    path = _edited(tmp_path, ("    def forward(self, tokens):", "    @torch.inference_mode()\n    def forward(self, tokens):"))
    report = compare(subject_of(path, "build"), reference_of("transformers:LlamaForCausalLM", base))
    assert report.findings == ()
    reasons = {outcome.probe: outcome.reason for outcome in report.outcomes if outcome.status == "skipped"}
    assert "inference_mode" in (reasons["parity.gradients"] or "")


def test_a_fused_projection_in_metas_manner_is_divided(tmp_path: Path) -> None:
    base = subject_of(CLEAN / "llama_style.py", "build")
    fused = (
        ("self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)", "kv = args.n_kv_heads * self.head_dim"),
        ("self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)", "self.sizes = (args.dim, kv, kv)"),
        (
            "self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)",
            "self.wqkv = nn.Linear(args.dim, args.dim + 2 * kv, bias=False)",
        ),
        ("xq, xk, xv = self.wq(x), self.wk(x), self.wv(x)", "xq, xk, xv = self.wqkv(x).split(self.sizes, dim=-1)"),
    )
    report = compare(subject_of(_edited(tmp_path, *fused), "build"), reference_of("transformers:LlamaForCausalLM", base))
    assert report.findings == ()


def test_single_numbers_among_the_weights_are_weights_too() -> None:
    subject = subject_of(CLEAN / "modded_style.py", "build")
    assert any(p.ndim == 0 for p in subject.model.parameters())
    assert compare(subject, subject).findings == ()


def test_a_weight_that_is_cast_or_viewed_is_read_where_the_tokens_meet_it(tmp_path: Path) -> None:
    path = _edited(tmp_path, ("return y.type_as(x) * weight", "return (y * weight.float().view(1, 1, -1)).type_as(x)"))
    subject = subject_of(path, "build")
    aligned = align(subject, subject)
    graph = aligned.graphs()[0]
    read = [slot for index, slot in weights_read(graph, aligned.left.layout) if graph.event(index).op == "mul"]
    assert read == [f"{layer}.{norm}.weight" for layer in range(3) for norm in ("norm1", "norm2")] + ["norm.weight"]
