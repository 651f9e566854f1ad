"""Where two runs part: planted faults are placed at their op, function and line, and neutral variations are left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from olmodebug.compare import difference
from olmodebug.relations.relation import Culprit, Part, first_break, localise, model_sizes
from olmodebug.tracing.tracer import record

HERE = Path(__file__)
BATCH, SEQ, CUT, ROW = 3, 11, 6, 1
HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 5, 20, 28, 37
LIMIT = 1e-12


def line_of(tag: str) -> int:
    """The line of this file that ends in `# <- tag`."""
    lines = HERE.read_text(encoding="utf-8").splitlines()
    return next(number for number, text in enumerate(lines, start=1) if text.endswith(f"# <- {tag}"))


def merged_mean(hidden: Tensor) -> Tensor:
    return hidden.mean((0, 1))  # <- mean-over-all


class Attention(nn.Module):
    """Attention with a fault, or a way of writing it, chosen by name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        how, (batch, seq, _) = self.how, hidden.shape
        query, key, value = (t.view(batch, seq, HEADS, HEAD_DIM).transpose(1, 2) for t in self.qkv(hidden).chunk(3, dim=-1))
        later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        if how == "fused":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        elif how == "fused-without-mask":
            mixed = F.scaled_dot_product_attention(query, key, value)  # <- fused-without-mask
        elif how == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", query, key).masked_fill(later, float("-inf"))
            mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), value)
        else:
            scores = query @ key.transpose(-2, -1) / HEAD_DIM**0.5
            if how == "additive-mask":
                scores = scores + torch.zeros(seq, seq, dtype=scores.dtype).masked_fill(later, torch.finfo(scores.dtype).min)
            elif how == "mask-in-place":
                scores.masked_fill_(later, float("-inf"))
            elif how == "off-by-one":
                scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(2), float("-inf"))
            elif how != "no-mask":
                scores = scores.masked_fill(later, float("-inf"))
            weights = scores.softmax(-2) if how == "over-queries" else scores.softmax(-1)  # <- softmax
            mixed = weights @ value
        if how == "no-transpose":
            return self.out(mixed.contiguous().view(batch, seq, HIDDEN))  # <- no-transpose
        return self.out(mixed.transpose(1, 2).reshape(batch, seq, HIDDEN))


class Mixer(nn.Module):
    """Everything else that can go wrong, or be written in another way, after attention."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        how, (batch, seq, width) = self.how, hidden.shape
        if how == "mean-over-sequence":
            return hidden - hidden.mean(1, keepdim=True)  # <- mean-over-sequence
        if how == "mean-over-all":
            centre = merged_mean(hidden)
            return hidden - centre  # <- enters
        if how == "mean-over-batch":
            return hidden - hidden.mean(0, keepdim=True)  # <- mean-over-batch
        if how == "rolled":
            return hidden.roll(-1, dims=1)  # <- rolled
        if how == "rolled-merged":
            flat = hidden.reshape(batch * seq, width)
            return flat.roll(-1, dims=0).view(batch, seq, width)  # <- rolled-merged
        if how == "written-in-place":
            copy = hidden.clone()
            copy.index_copy_(1, torch.arange(seq).flip(0), hidden)  # <- written-in-place
            return copy
        if how == "seq-first-flip":
            turned = hidden.transpose(0, 1).contiguous()
            return turned.flip(0).transpose(0, 1)  # <- seq-first-flip
        if how == "in-place-residual":
            result = self.down(F.gelu(self.up(self.norm(hidden))))
            result += hidden
            return result
        if how == "seq-first":
            return self.down(F.gelu(self.up(self.norm(hidden.transpose(0, 1).contiguous())))).transpose(0, 1)
        if how == "merged":
            flat = self.norm(hidden.reshape(batch * seq, width))
            return self.down(F.gelu(self.up(flat))).view(batch, seq, width)
        if how == "one-position-at-a-time":
            return torch.stack([self.down(F.gelu(self.up(self.norm(hidden[:, i])))) for i in range(seq)], dim=1)
        if how == "running-mean":
            counts = torch.arange(1, seq + 1, dtype=hidden.dtype)[:, None]
            return hidden.cumsum(1) / counts
        if how == "windows":  # padded and cut into windows of sizes that are nobody's
            windows = F.pad(hidden, (0, 0, 0, -seq % 8)).unflatten(1, (-1, 8))
            return (windows - windows.mean(2, keepdim=True)).flatten(1, 2)[:, :seq]
        if how == "branches":  # which ops run depends on the last token, so the two runs cannot be aligned
            if hidden[0, -1, 0] > hidden[0, -2, 0]:
                return hidden + hidden.mean(1, keepdim=True)
            return (hidden * 2.0).tanh() - hidden.amax(1, keepdim=True)
        return self.down(F.gelu(self.up(self.norm(hidden))))


class Toy(nn.Module):
    def __init__(self, attention: str = "", mixer: str = "", *, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.attention = nn.ModuleList(Attention(attention) for _ in range(layers))
        self.mixer = nn.ModuleList(Mixer(mixer) for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for attention, mixer in zip(self.attention, self.mixer, strict=True):
            hidden = hidden + attention(hidden)
            hidden = hidden + mixer(hidden)  # <- calls-mixer
        return self.head(hidden)


def toy(attention: str = "", mixer: str = "", *, layers: int = 1) -> Toy:
    torch.manual_seed(0)
    return Toy(attention, mixer, layers=layers).double().eval()


def cases(kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Part]:
    """Two batches and the part of every tensor that must agree."""
    torch.manual_seed(seed)
    left, right = torch.randint(VOCAB, (BATCH, SEQ)), torch.randint(VOCAB, (BATCH, SEQ))
    fixed = frozenset({HIDDEN, 3 * HIDDEN, INNER, VOCAB})
    if kind == "causality":
        right[:, :CUT] = left[:, :CUT]
        return left, right, Part(batch=BATCH, seq=SEQ, columns=slice(0, CUT), fixed=fixed)
    right[ROW] = left[ROW]
    return left, right, Part(batch=BATCH, seq=SEQ, rows=slice(ROW, ROW + 1), fixed=fixed)


def culprits_of(model: Toy, kind: str) -> list[Culprit]:
    left, right, part = cases(kind)

    def violated(a: Tensor, b: Tensor) -> bool:
        rows, columns = part.rows or slice(None), part.columns or slice(None)
        return difference(a[rows][:, columns], b[rows][:, columns], relative_limit=LIMIT) is not None

    with torch.no_grad():
        assert violated(model(left), model(right)), "the fault does not show"
        return localise(model, lambda: model(left), lambda: model(right), part=part, limit=LIMIT, violated=violated)


# Planted faults


@pytest.mark.parametrize(
    ("attention", "mixer", "op", "function", "tag"),
    [
        ("no-mask", "", "_softmax", "Attention.forward", "softmax"),
        ("off-by-one", "", "_softmax", "Attention.forward", "softmax"),
        ("over-queries", "", "_softmax", "Attention.forward", "softmax"),
        ("fused-without-mask", "", "_scaled_dot_product_", "Attention.forward", "fused-without-mask"),
        ("no-transpose", "", "view", "Attention.forward", "no-transpose"),
        ("", "mean-over-sequence", "mean", "Mixer.forward", "mean-over-sequence"),
        ("", "rolled", "roll", "Mixer.forward", "rolled"),
        ("", "rolled-merged", "roll", "Mixer.forward", "rolled-merged"),
        ("", "written-in-place", "index_copy_", "Mixer.forward", "written-in-place"),
        ("", "seq-first-flip", "flip", "Mixer.forward", "seq-first-flip"),
    ],
)
def test_a_causality_fault_is_placed_at_its_op_function_and_line(attention: str, mixer: str, op: str, function: str, tag: str) -> None:
    found = culprits_of(toy(attention, mixer), "causality")
    assert len(found) == 1
    where = found[0].where
    assert str(where.op).startswith(op)
    assert (where.function, where.line) == (function, line_of(tag))
    assert Path(str(where.file)).name == HERE.name
    assert where.module == ("attention.0" if attention else "mixer.0")
    assert found[0].confirmed, "putting the agreeing values back does not mend it"
    assert not found[0].module_only


@pytest.mark.parametrize(
    ("attention", "mixer", "op", "tag"),
    [
        ("", "mean-over-batch", "mean", "mean-over-batch"),
        ("", "rolled-merged", "roll", "rolled-merged"),
    ],
)
def test_a_fault_between_rows_is_placed_at_its_op_and_line(attention: str, mixer: str, op: str, tag: str) -> None:
    (found,) = culprits_of(toy(attention, mixer), "batch")
    assert (found.where.op, found.where.function, found.where.line) == (op, "Mixer.forward", line_of(tag))
    assert found.confirmed


@pytest.mark.parametrize("kind", ["causality", "batch"])
def test_a_pending_tensor_is_blamed_on_the_op_that_made_it(kind: str) -> None:
    (found,) = culprits_of(toy("", "mean-over-all"), kind)
    assert (found.where.op, found.where.function, found.where.line) == ("mean", "merged_mean", line_of("mean-over-all"))
    assert found.source is not None
    assert found.event is not None
    assert (found.event.op, found.event.where.line) == ("sub", line_of("enters")), "where it enters a tensor with positions"
    assert found.confirmed


def test_two_faults_are_both_found_in_the_order_they_run_and_confirmed_together() -> None:
    found = culprits_of(toy("no-mask", "rolled"), "causality")
    assert [(c.where.op, c.where.line) for c in found] == [("_softmax", line_of("softmax")), ("roll", line_of("rolled"))]
    assert all(c.confirmed for c in found)


def test_the_same_fault_in_every_layer_is_one_culprit() -> None:
    (found,) = culprits_of(toy("no-mask", layers=3), "causality")
    assert (found.where.module, found.where.line, found.confirmed) == ("attention.0", line_of("softmax"), True)


def test_between_padding_and_cutting_nothing_is_blamed_but_the_module() -> None:
    (found,) = culprits_of(toy("", "windows"), "causality")
    assert (found.module_only, found.where.module, found.where.op) == (True, "mixer.0", None)


def test_what_cannot_be_aligned_is_placed_at_the_smallest_module() -> None:
    model = toy("", "branches")
    for seed in range(50):  # two runs that take different branches
        left, right, part = cases("causality", seed)
        with torch.no_grad():
            runs = [record(model, lambda ids=ids: model(ids), keep=True) for ids in (left, right)]  # type: ignore[misc]
        if [e.op for e in runs[0]] != [e.op for e in runs[1]]:
            break
    else:
        raise AssertionError("no seed takes different branches")
    found = first_break(*runs, part=part, limit=LIMIT)
    assert found is not None
    assert (found.module_only, found.event, found.where.op) == (True, None, None)
    assert (found.where.module, found.where.function, found.where.line) == ("mixer.0", "Toy.forward", line_of("calls-mixer"))


# Neutral variations


NEUTRAL: list[tuple[str, str]] = [
    ("", ""),
    ("fused", ""),
    ("einsum", ""),
    ("additive-mask", ""),
    ("mask-in-place", ""),
    ("", "in-place-residual"),
    ("", "seq-first"),
    ("", "merged"),
    ("", "one-position-at-a-time"),
]


@pytest.mark.parametrize("kind", ["causality", "batch"])
@pytest.mark.parametrize(("attention", "mixer"), [*NEUTRAL, ("", "running-mean")])
def test_a_neutral_variation_gives_no_culprit(attention: str, mixer: str, kind: str) -> None:
    model = toy(attention, mixer)
    left, right, part = cases(kind)
    with torch.no_grad():
        runs = [record(model, lambda ids=ids: model(ids), keep=True) for ids in (left, right)]  # type: ignore[misc]
    found = first_break(*runs, part=part, limit=LIMIT)
    assert found is None, found.where if found else ""


def test_a_fault_between_positions_is_no_fault_between_rows_and_the_other_way_round() -> None:
    for model, kind in ((toy("no-mask"), "batch"), (toy("", "mean-over-batch"), "causality")):
        left, right, part = cases(kind)
        with torch.no_grad():
            runs = [record(model, lambda m=model, ids=ids: m(ids), keep=True) for ids in (left, right)]  # type: ignore[misc]
        assert first_break(*runs, part=part, limit=LIMIT) is None


# Parts of tensors


def part(**choices: slice) -> Part:
    return Part(batch=BATCH, seq=SEQ, fixed=frozenset({HIDDEN}), **choices)


def one_of(views: list[Tensor], expected: Tensor) -> bool:
    return any(view.numel() == expected.numel() and torch.equal(view.reshape(-1), expected.reshape(-1)) for view in views)


ORDERS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("batch first", lambda t: t),
    ("sequence first", lambda t: t.transpose(0, 1)),
    ("merged", lambda t: t.reshape(BATCH * SEQ, HIDDEN)),
    ("merged, sequence first", lambda t: t.transpose(0, 1).reshape(BATCH * SEQ, HIDDEN)),
    ("features first", lambda t: t.permute(2, 0, 1)),
]


@pytest.mark.parametrize(("name", "layout"), ORDERS)
def test_a_part_is_found_in_every_layout_of_batch_and_sequence(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    numbers = torch.arange(BATCH * SEQ * HIDDEN).view(BATCH, SEQ, HIDDEN)
    left, right = numbers.clone(), numbers.clone()
    right[:, CUT:] += 1000
    before = part(columns=slice(0, CUT))
    assert any(torch.equal(a, b) for a, b in zip(before.views(layout(left)), before.views(layout(right)), strict=True)), name
    right[0, 0, 0] += 1
    assert not any(torch.equal(a, b) for a, b in zip(before.views(layout(left)), before.views(layout(right)), strict=True)), name


def test_a_score_matrix_is_cut_in_both_sequence_dimensions() -> None:
    scores = torch.arange(BATCH * HEADS * SEQ * SEQ).view(BATCH, HEADS, SEQ, SEQ)
    (view,) = part(columns=slice(0, CUT)).views(scores)
    assert torch.equal(view, scores[:, :, :CUT, :CUT])
    (view,) = part(rows=slice(1, 2)).views(scores)
    assert torch.equal(view, scores[1:2])


def test_columns_from_the_end_are_cut_too() -> None:
    (view,) = part(columns=slice(SEQ - 4, None)).views(torch.arange(SEQ))
    assert view.tolist() == [7, 8, 9, 10]


def test_a_tensor_without_batch_or_sequence_has_no_part() -> None:
    for shape in ((HIDDEN,), (HIDDEN, 7), (), (1,), (0,)):
        assert part(columns=slice(0, CUT), rows=slice(0, 1)).views(torch.zeros(shape)) == []


def test_a_size_of_the_model_is_never_taken_for_a_merged_dimension() -> None:
    width = 2 * SEQ
    plain = Part(batch=BATCH, seq=SEQ, columns=slice(0, CUT))
    assert plain.views(torch.zeros(width)), "twice the sequence counts as merged"
    assert Part(batch=BATCH, seq=SEQ, columns=slice(0, CUT), fixed=frozenset({width})).views(torch.zeros(width)) == []


def test_the_sizes_of_a_model_are_those_of_its_parameters_and_buffers() -> None:
    model = nn.Linear(5, 7)
    model.register_buffer("table", torch.zeros(2, 3))
    assert model_sizes(model) == {2, 3, 5, 7}


@given(st.integers(2, 5), st.integers(2, 13), st.data())
def test_a_part_of_a_plain_batch_is_the_plain_slice(batch: int, seq: int, data: st.DataObject) -> None:
    if batch == seq:
        return
    row, cut = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(1, seq))
    numbers = torch.arange(batch * seq).view(batch, seq)
    chosen = Part(batch=batch, seq=seq, rows=slice(row, row + 1), columns=slice(0, cut))
    assert one_of(chosen.views(numbers), numbers[row : row + 1, :cut])


def test_a_batch_as_long_as_its_sequence_is_read_with_the_batch_first() -> None:
    square = Part(batch=4, seq=4, rows=slice(2, 3), columns=slice(0, 3))
    numbers = torch.arange(16).view(4, 4)
    (view,) = square.views(numbers)
    assert torch.equal(view, numbers[2:3, :3])
