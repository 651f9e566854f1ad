"""Named causes where an implementation parts from transformers' Llama: each fault has the cause that undoes it, and no other."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from olmodebug.implementations.comparison import compare
from olmodebug.report import Finding
from tests.benchmarks.implementations import reference_of, subject_of
from tests.mutants.catalog import CLEAN

LLAMA = CLEAN / "llama_style.py"
EMBEDDED = "        h = self.tok_embeddings(tokens)\n"
FIRST_SUM = "        h = x + self.attention(normed, freqs_cos, freqs_sin, mask)\n"
SECOND_SUM = "        out = h + self.feed_forward(normed)\n"
NORMED = "    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)\n"
WEIGHTED = "    return y.type_as(x) * weight\n"
FINAL_NORM = "        h = rms_norm(h, self.norm, self.params.norm_eps)\n"
EVERY_LAYER = "        for layer in self.layers:\n"
TURNED = "        xq, xk = apply_rotary_emb(xq, xk, freqs_cos, freqs_sin)\n"
TABLES = "    return torch.cos(freqs), torch.sin(freqs)\n"
MLP = "F.silu(self.w1(x)) * self.w3(x)"

Edit = tuple[str, str]


def edited(folder: Path, *edits: Edit) -> Path:
    text = LLAMA.read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "edited.py"
    path.write_text(text)
    return path


def told(subject: Path, reference: Path | None = None) -> Finding:
    """The finding on the outputs, against transformers' Llama or against another file."""
    one = subject_of(subject, "build")
    other = subject_of(reference, "build") if reference else reference_of("transformers:LlamaForCausalLM", subject_of(LLAMA, "build"))
    return next(f for f in compare(one, other).findings if f.probe == "parity.outputs")


def case(name: str, cause: str | None, words: str, function: str, *edits: Edit, slow: bool = False) -> object:
    return pytest.param(cause, words, function, edits, id=name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(
    ("cause", "words", "function", "edits"),
    [
        case("embedding scaled", "constant factor", "7.48331 times", "Transformer.run_layers", (EMBEDDED, EMBEDDED.rstrip() + " * math.sqrt(self.params.dim)\n")),
        case("both branches scaled", "constant factor", r"0.22 times the reference's, in every element, and another 0.22 times at line \d+; divided by them", "TransformerBlock.forward", (FIRST_SUM, FIRST_SUM.replace("x + ", "x + 0.22 * ")), (SECOND_SUM, SECOND_SUM.replace("h + ", "h + 0.22 * "))),
        case("norm by the sum", "norm", "divides by the root of the sum of squares where the reference's divides by the root of the mean square", "rms_norm", (NORMED, NORMED.replace("mean", "sum"))),
        case("final norm by the sum", "norm", "the root of the sum of squares", "Transformer.run_layers", (FINAL_NORM, "        h = h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + self.params.norm_eps) * self.norm\n"), slow=True),
        case("norm with 1 + weight", "norm", "multiplies by 1 . weight where the reference's multiplies by the weight", "rms_norm", (WEIGHTED, WEIGHTED.replace("* weight", "* (1 + weight)"))),
        case("layer norm for RMS norm", "norm", "the mean taken off first", "rms_norm", (NORMED, "    y = F.layer_norm(y, y.shape[-1:], None, None, eps)\n"), slow=True),
        case("norm of unit length", "norm", "the root of the sum of squares|the length of the vector", "rms_norm", (NORMED, "    y = F.normalize(y, dim=-1)\n"), slow=True),
        case("eps behind the root", "norm", "eps added behind the root", "rms_norm", (NORMED, "    y = y / (y.pow(2).mean(-1, keepdim=True).sqrt() + eps)\n"), slow=True),
        case("norm without its weight", "unused weights", "are used for no logit", "Attention.forward", (WEIGHTED, "    return y.type_as(x)\n")),
        case("layer skipped", "unused weights", "layers.2.attention_norm, layers.2.ffn_norm", "rms_norm", (EVERY_LAYER, "        for layer in self.layers[:-1]:\n")),
        case("layer twice, another never", "layer order", "0 0 2 where the reference runs 0 1 2", "Transformer.run_layers", (EVERY_LAYER, "        for layer in (self.layers[0], self.layers[0], self.layers[2]):\n")),
        case("layers from the last", "layer order", "2 1 0 where", "Transformer.run_layers", (EVERY_LAYER, "        for layer in reversed(self.layers):\n"), slow=True),
        case("layers run twice", None, "", "rms_norm", (EVERY_LAYER, "        for layer in [*self.layers, *self.layers]:\n"), slow=True),
        case("a norm too many", "norm too many", "the subject has a norm here", "rms_norm", (EMBEDDED, EMBEDDED + FINAL_NORM)),
        case("a layer without RoPE", "RoPE missing", "q and k are not turned by the angles of RoPE in layer 1", "attention", (TURNED, "        if self.rope:\n    " + TURNED), ("        self.attention = Attention(args)\n", "        self.attention = Attention(args)\n        self.attention.rope = layer_id != 1\n")),
        case("cosines and sines scaled", "RoPE factor", "are 1.2 times the reference's", "Transformer.forward", (TABLES, "    return 1.2 * torch.cos(freqs), 1.2 * torch.sin(freqs)\n")),
        case("a window in one layer", "window", "the last 5 keys", "attention", ("            h = layer(h, freqs_cos, freqs_sin, mask)\n", "            h = layer(h, freqs_cos, freqs_sin, mask.clone().masked_fill_(torch.ones_like(mask).tril(-5) > 0, -torch.inf) if layer.layer_id else mask)\n"), slow=True),
        case("gate and up added", None, "", "FeedForward.forward", (MLP, MLP.replace("*", "+")), slow=True),
    ],
)  # fmt: skip
def test_a_fault_has_its_own_cause(cause: str | None, words: str, function: str, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    finding = told(edited(tmp_path, *edits))
    assert finding.evidence.get("cause") == cause
    assert re.search(words, finding.cause or "")
    assert finding.where.function == function


def test_what_the_reference_scales_and_the_subject_does_not_is_told_the_other_way_round(tmp_path: Path) -> None:
    scaled = edited(tmp_path, (EMBEDDED, EMBEDDED.rstrip() + " * math.sqrt(self.params.dim)\n"))
    finding = told(LLAMA, scaled)
    assert finding.evidence["cause"] == "constant factor"
    assert finding.evidence["factor"] == pytest.approx(1 / math.sqrt(56))


def test_a_scale_that_is_left_out_is_missing_in_the_function_that_makes_the_scores(tmp_path: Path) -> None:
    finding = told(edited(tmp_path, (" / math.sqrt(head_dim)\n", "\n")), LLAMA)
    assert (finding.evidence["cause"], finding.where.function) == ("scale", "attention")


NORMED_EMBEDDING = (EMBEDDED, EMBEDDED + "        h = F.rms_norm(h, h.shape[-1:])\n")
CLIPPED = ("xk = xk.view", "xk = xk.clamp(-1.5, 1.5).view")
IN_PARALLEL = ("rms_norm(h, self.ffn_norm, self.norm_eps)", "rms_norm(x, self.ffn_norm, self.norm_eps)")


@pytest.mark.parametrize(
    ("edit", "cause", "words"),
    [
        pytest.param(NORMED_EMBEDDING, "norm missing", "the reference has a norm here", id="norm"),
        pytest.param(CLIPPED, "clamp missing", r"the reference clamps to \[-1.5, 1.5\]", id="clamp", marks=pytest.mark.slow),
        pytest.param(IN_PARALLEL, "parallel residual", "where the reference's is x . attention", id="parallel", marks=pytest.mark.slow),
    ],
)
def test_what_the_reference_does_and_the_subject_leaves_out(edit: Edit, cause: str, words: str, tmp_path: Path) -> None:
    finding = told(LLAMA, edited(tmp_path, edit))
    assert finding.evidence["cause"] == cause
    assert re.search(words, finding.cause or "")


def test_a_clamp_that_is_written_otherwise_is_no_finding(tmp_path: Path) -> None:
    clamped = edited(tmp_path, ("xk = xk.view", "xk = xk.clamp(-8.0, 8.0).view"))
    (tmp_path / "other").mkdir()
    other = edited(
        tmp_path / "other", ("xk = xk.view", "xk = torch.minimum(torch.maximum(xk, xk.new_tensor(-8.0)), xk.new_tensor(8.0)).view")
    )
    assert compare(subject_of(clamped, "build"), subject_of(other, "build")).findings == ()


def test_a_layer_that_the_reference_leaves_without_rope(tmp_path: Path) -> None:
    bare = edited(
        tmp_path,
        (TURNED, "        if self.rope:\n    " + TURNED),
        (
            "        self.attention = Attention(args)\n",
            "        self.attention = Attention(args)\n        self.attention.rope = layer_id != 1\n",
        ),
    )
    assert "turned by the angles of RoPE in layer 1 where the reference leaves them" in (told(LLAMA, bare).cause or "")


def test_an_eps_that_these_values_do_not_show_has_a_script_of_the_two_sums(tmp_path: Path) -> None:
    subject = subject_of(edited(tmp_path, ("norm_eps: float = 1e-5", "norm_eps: float = 1.01e-5")), "build")
    other = reference_of("transformers:LlamaForCausalLM", subject_of(LLAMA, "build"))
    finding = next(f for f in compare(subject, other, scripts=tmp_path / "scripts").findings if f.probe == "parity.arguments")
    done = subprocess.run([sys.executable, "-I", str(finding.evidence["script"])], capture_output=True, text=True, check=True, cwd=tmp_path)
    _, inputs, gap = done.stdout.splitlines()
    assert inputs == "inputs that are equal: 1 of 1"
    assert float(gap.split()[2]) == pytest.approx(1e-7, rel=0.2)  # 1 % of 1e-5


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        pytest.param(
            (), "are the softmax of the router's logits, as it is, the reference's are .* divided by their sum", id="weights that do not add up to one"
        ),
        pytest.param(
            (("norm_topk_prob: bool = False", "norm_topk_prob: bool = True"), ("F.softmax(self.gate(x), dim=-1)", "torch.sigmoid(self.gate(x))")),
            "are the sigmoid of the router's logits.* the reference's are the softmax",
            id="sigmoid for softmax",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_another_rule_for_the_weights_of_the_experts(edits: tuple[Edit, ...], words: str, tmp_path: Path) -> None:
    subject = subject_of(edited(tmp_path, *edits), "build_moe")
    subject.config.norm_topk_prob = True  # what the reference is built with
    report = compare(subject, reference_of("transformers:MixtralForCausalLM", subject))
    finding = next(f for f in report.findings if f.probe == "parity.outputs")
    assert (finding.evidence["cause"], finding.where.function) == ("routing", "MoE.forward")
    assert re.search(words, finding.cause or "")
