"""Classes of transformers written again under names of their own: the weights find each other, clean variants agree, faults have their cause."""

import re
from pathlib import Path

import pytest

from olmodebug.implementations.comparison import compare
from olmodebug.report import Finding, Report
from tests.benchmarks.implementations import subject_of

FILES = Path(__file__).parent / "mutants" / "rewritten"
Edit = tuple[str, str]


def report(folder: Path, name: str, *edits: Edit) -> Report:
    """A file with its edits against the class of transformers in its sizes."""
    text = (FILES / f"{name}.py").read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(text)
    return compare(subject_of(path, "build"), subject_of(FILES / f"{name}.py", "reference"))


def case(file: str, cause: str, words: str, function: str, *edits: Edit, slow: bool = True) -> object:
    return pytest.param(file, cause, words, function, edits, id=f"{file} {cause} {words}", marks=pytest.mark.slow if slow else ())


ATTENTION, FEED = "x = x + self.post_attn(self.attn(self.pre_attn(x)))", "return x + self.post_ffn(self.ffn(self.pre_ffn(x)))"
NORMED, ROTATED = "        q, k = self.qn(q), self.kn(k)\n", "        q, k = rotate(q, ang), rotate(k, ang)\n"
TURNED = "        return torch.cat([r1 * c - r2 * s, r2 * c + r1 * s, rest], -1)"
HALVES = "        r1, r2 = r[..., : self.n // 2], r[..., self.n // 2 :]\n"
PAIRS = "        r1, r2 = r[..., ::2], r[..., 1::2]\n"


@pytest.mark.parametrize(
    ("file", "cause", "words", "function", "edits"),
    [
        case("gemma3", "norm", "^the norm multiplies by the weight where the reference's multiplies by 1 . weight;", "Norm.forward", ("y * (1 + self.scale)", "y * self.scale")),
        case("gemma3", "RoPE theta", "of layer 0 are turned with theta 1e.06 where the reference takes 10000", "rotate", ("LOCAL if self.local else GLOBAL", "GLOBAL if self.local else LOCAL"), slow=False),
        case("gemma3", "norm placement", r"x . pre.f.post.x..., f the attention, and then", "Layer.forward", (ATTENTION, ATTENTION.replace("post", "this").replace("pre", "post").replace("this", "pre"))),
        case("gemma3", "parallel residual", "both of the same x, where the reference's is x . post", "Layer.forward", (ATTENTION, "y = x; " + ATTENTION), (FEED, FEED.replace("pre_ffn(x)", "pre_ffn(y)")), slow=False),
        case("gemma3", "norm missing", "post_ffn.scale is left out", "Layer.forward", (FEED, "return x + self.ffn(self.pre_ffn(x))")),
        case("gemma3", "QK-norm order", "RoPE before norm", "Norm.forward", (NORMED, ""), (ROTATED, ROTATED + NORMED)),
        case("olmoe", "chosen experts", "the 3 entries with the smallest scores", "MoE.forward", ("topk(top_k, dim=-1)", "topk(top_k, dim=-1, largest=False)"), slow=False),
        case("expert_choice", "chosen experts", "entries with the smallest scores", "Experts.forward", ("// 4), dim=1)", "// 4), dim=1, largest=False)"), slow=False),
        case("phi3", "partial rotary", "the last 6 of the 12 numbers of a head where the reference turns the first 6", "Rotary.forward", ("r, rest = x[..., : self.n], x[..., self.n :]", "rest, r = x[..., : -self.n], x[..., -self.n :]")),
        case("phi3", "RoPE style", "rotates interleaved pairs", "Rotary.forward", (HALVES, PAIRS), (TURNED, TURNED.replace("[r1 * c - r2 * s, r2 * c + r1 * s, rest]", "[torch.stack([r1 * c - r2 * s, r2 * c + r1 * s], -1).flatten(-2), rest]")), slow=False),
        case("phi3", "RoPE direction", "q and k are turned the other way", "Rotary.forward", (TURNED, TURNED.replace("- r2", "+ r2").replace("+ r1", "- r1"))),
        case("phi3", "GQA order", "rows of q reordered", "Attention.forward", ("q = q.view(b, t, a.kv_heads, g, self.hd)", "q = q.view(b, t, g, a.kv_heads, self.hd).transpose(2, 3)")),
        case("phi3", "RoPE not wanted", "^v is turned by the angles of RoPE in layer 0 where the reference leaves it as projected", "Rotary.forward", ("v = self.value(x).view(b, t, a.kv_heads, self.hd)", "v = self.rot(self.value(x).view(b, t, a.kv_heads, self.hd))")),
    ],
)  # fmt: skip
def test_a_fault_has_its_own_cause(file: str, cause: str, words: str, function: str, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    finding: Finding = next(f for f in report(tmp_path, file, *edits).findings if f.probe == "parity.outputs")
    assert finding.evidence.get("cause") == cause
    assert re.search(words, finding.cause or "")
    assert finding.where.function == function


@pytest.mark.parametrize(
    ("file", "edits"),
    [
        pytest.param("gemma3", (), id="gemma3"),
        pytest.param("phi3", (), id="phi3"),
        pytest.param("olmoe", (), id="olmoe"),
        pytest.param("gemma3", ((ROTATED, ROTATED.replace("rotate(q,", "rotate(q / math.sqrt(QSCALE),")), (" / math.sqrt(QSCALE)\n", "\n")), id="scale on q", marks=pytest.mark.slow),
        pytest.param("olmoe", (("self.w1 =", "self.gate ="), ("self.w1(", "self.gate("), ("self.w3", "self.up"), ("self.w2", "self.down")), id="a gate among experts", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_class_written_again_agrees(file: str, edits: tuple[Edit, ...], tmp_path: Path) -> None:
    found = report(tmp_path, file, *edits)
    assert [f for f in found.findings if f.severity != "note"] == []
    assert found.exit_code == 0


def test_norms_whose_names_say_nothing_are_matched_by_their_use_and_the_report_says_so(tmp_path: Path) -> None:
    section = report(tmp_path, "olmoe").sections["implementations"]
    mapped = {pair["subject"]: pair["reference"] for pair in section["mapping"]}
    assert mapped["blocks.2.n1.g"] == "model.layers.2.input_layernorm.weight"
    assert mapped["out.weight"] == "lm_head.weight"
    assert section["settled_by_value"][-1] == "blocks.0.n1.g, blocks.0.n2.g, blocks.1.n1.g and 3 more: the order in which a run uses them"


def test_norms_of_parts_side_by_side_are_matched_whichever_is_used_first(tmp_path: Path) -> None:
    found = report(tmp_path, "side_by_side")
    assert found.findings == ()
    (said,) = found.sections["implementations"]["settled_by_value"]
    assert said.endswith("the order in which a run uses them, the last first")
