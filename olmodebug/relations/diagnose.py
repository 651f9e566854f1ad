"""Why the culprit is wrong: hypotheses tested on the tensors that were captured, and the repair that each suggests.

A hypothesis that its own test does not confirm is not told. What was tested and is not the reason is listed.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..compare import difference
from ..records import Event
from ..report import Scalar
from ..tracing.tracer import Kept, Recording
from .edits import call_of, insert_before_method, mask_operand, mask_scores, set_dimension, set_keyword
from .patterns import MASKED, Diagnosis, attention_pattern, padding_seen, pattern_told, without_keys, without_sink
from .relation import Culprit, Part
from .repair import Edit, expressions

REDUCTIONS = {
    "mean": "mean",
    "sum": "sum",
    "var": "variance",
    "std": "standard deviation",
    "var_mean": "variance",
    "amax": "maximum",
    "max": "maximum",
    "linalg_vector_norm": "norm",
    "norm": "norm",
    "native_layer_norm": "layer norm",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit": "batch norm",
    "logsumexp": "logsumexp",
    "prod": "product",
}
LOOK_BACK = 16  # ops between a mask and its softmax
SAME_VALUES = (
    "view", "_unsafe_view", "reshape", "permute", "transpose", "expand", "clone", "_to_copy", "unsqueeze", "squeeze", "mul", "div", "add",
)  # fmt: skip
MOVED_ONLY = 1e-9  # relative distance of numbers that are the same in another order, in float64
OTHER_ROWS = "the other rows"
# The fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer in eval mode.
NATIVE_ATTENTION = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
FUSED_ATTENTION = ("_scaled_dot_product_", "_efficient_attention", "_flash_attention", "scaled_dot_product_attention")

# Another way to read a tensor: what was done in words, how to mend it, the way, and what to insert before the reshape.
Layout = tuple[str, str, Callable[[Tensor], Tensor], str]


def is_fused_attention(op: str) -> bool:
    """Whether an op is one of torch's fused attention kernels."""
    return op.startswith(FUSED_ATTENTION)


def diagnose(culprit: Culprit, part: Part, *, hidden: str, recording: Recording | None = None) -> Diagnosis:
    """Why the culprit lets `hidden` (such as `later tokens` or `padded tokens`) through."""
    if culprit.event is None or culprit.left is None or culprit.right is None:
        return Diagnosis()
    blamed = culprit.source or culprit.event
    if blamed.op in REDUCTIONS and (culprit.source is not None or culprit.event.op in REDUCTIONS):
        return _reduction(blamed, part, hidden)
    op = culprit.event.op
    if op == "cat":
        return _beside_a_sink(culprit, part, hidden)
    if op in ("_softmax", "softmax", "_safe_softmax"):
        return _softmax(culprit, part, hidden)
    if is_fused_attention(op):
        return _fused(culprit, part, hidden)
    if op in NATIVE_ATTENTION:
        return _native(culprit, part, hidden)
    if op in ("view", "_unsafe_view", "reshape", "clone", "_reshape_alias"):
        return _layout(culprit, part, hidden)
    if op in ("bmm", "mm", "matmul"):
        return _weighted(culprit, part, hidden)
    if op == "index_put_":
        return _misplaced(culprit, part)
    if op in ("add", "add_", "sub", "where", "masked_fill", "mul"):
        return _broadcast(culprit, part)
    if part.columns is not None and not part.columns.start:
        if blamed.op == "convolution" and op == "slice" and (told := _late_window(culprit)) is not None:
            return told
        if op == "constant_pad_nd" and (told := _shifted_back(culprit, part)) is not None:
            return told
    dims = culprit.left.arguments.get("dims") or ()
    along_batch = hidden == OTHER_ROWS and any(culprit.left.inputs[0].shape[dim] == part.batch for dim in dims)
    simple = {
        "roll": ("torch.roll moves along the batch: a row gets what belongs to another", "roll along no dimension that holds rows")
        if along_batch
        else ("torch.roll wraps around: it brings the end of the sequence to its start", "shift with padding instead of rolling"),
        "flip": ("it reverses a dimension that holds the rows of the batch", "do not flip along the batch")
        if along_batch
        else ("it reverses a dimension that holds the sequence", "do not flip along the sequence"),
        "convolution": (
            f"the convolution reads {hidden}"
            + (
                ": they are not zeroed before it"
                if part.columns is not None and part.columns.start
                else ": its window is not confined to the past"
            ),
            "set padded positions to zero before the convolution"
            if part.columns is not None and part.columns.start
            else "pad kernel_size - 1 on the left only, and cut the right end off",
        ),
        "cumsum": (
            "the running sum goes over a dimension that holds more than one sequence position or row",
            "sum along the sequence only",
        ),
        "sort": (f"it sorts along a dimension that holds {hidden}", "sort within one position only"),
        "topk": (f"it picks the largest along a dimension that holds {hidden}", "choose within one position only"),
    }
    if op in simple:
        cause, fix = simple[op]
        return Diagnosis(cause=cause, fix=fix)
    return Diagnosis()


def _late_window(culprit: Culprit) -> Diagnosis | None:
    """A convolution that is padded on both sides, and whose output is not cut to what the past alone gives."""
    if culprit.source is None or culprit.run is None or culprit.left is None:
        return None
    made, cut = culprit.run.kept[culprit.source.index].arguments, culprit.left.arguments
    if cut.get("dim") != 2 or made["weight"].ndim != 3:
        return None
    width, padding = (made["weight"].shape[-1] - 1) * made["dilation"][0], made["padding"][0]
    start, length = cut.get("start") or 0, culprit.left.inputs[0].shape[2]
    start += length if start < 0 else 0
    reach = width - padding + start
    if reach < 1:
        return None
    return Diagnosis(
        cause=f"the convolution pads {padding} on both sides, and its output is read from {start} on: every position sees the next {reach}",
        fix=f"read it from {padding - width}" if padding > width else f"pad {width} on the left, and read the output from 0 on",
    )


def _shifted_back(culprit: Culprit, part: Part) -> Diagnosis | None:
    """A padding that takes from the start of the sequence and adds at its end."""
    assert culprit.left is not None
    pad, shape = culprit.left.arguments.get("pad") or (), culprit.left.inputs[0].shape
    for k, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), start=1):
        if shape[-k] == part.seq and before < 0 < after:
            return Diagnosis(
                cause=f"the padding takes {-before} from the start and adds {after} at the end: position t holds what stands at t + {-before}",
                fix="pad at the start, and cut the end off: the first number is positive",
            )
    return None


def _softmax(culprit: Culprit, part: Part, hidden: str) -> Diagnosis:
    assert culprit.left is not None
    dim = int(culprit.left.arguments["dim"]) % max(1, culprit.left.inputs[0].ndim)
    scores, weights = (without_sink(t, part) for t in (culprit.left.arguments["self"], culprit.left.outputs[0]))
    tree = expressions(culprit.spot)
    call = call_of(tree, culprit, ("softmax",))
    if weights.ndim >= 2 and dim != weights.ndim - 1 and weights.shape[-1] != part.seq:
        return Diagnosis(
            cause=f"softmax runs over dimension {dim} of {tuple(weights.shape)}, which holds tokens: what one of them gets depends on the others",
            fix="normalise what belongs to one token: dim=-1",
        )
    if weights.ndim >= 2 and dim == weights.ndim - 2:
        edits = set_dimension(tree, call) if tree and call else ()
        return replace(_wrong_axis(dim, weights.ndim), edits=edits)
    if dim < weights.ndim - 1:
        return _wrong_axis(dim, weights.ndim)
    pattern = attention_pattern(weights, part)
    if pattern is None:
        return Diagnosis()
    if (told := without_keys(weights, scores, part)) is not None:
        return told
    if hidden == "padded tokens":
        return padding_seen(pattern, scores, part, "the scores")
    diagnosis = pattern_told(pattern, hidden)
    undone = _undone_mask(culprit, part)
    if diagnosis.cause and undone is not None:
        return undone
    if diagnosis.cause and diagnosis.cause.startswith("no causal mask") and tree and call:
        diagnosis.edits = mask_scores(tree, call)
        diagnosis.fix = "mask the later keys before the softmax: scores.masked_fill(ones(T, T).triu(1), finfo.min)"
    return diagnosis


def _wrong_axis(dim: int, ndim: int) -> Diagnosis:
    """A softmax over another dimension of the scores `[batch, heads, queries, keys]` than the keys."""
    told = "queries (dim=-2), so the weights of one query depend on all the others"
    if dim < ndim - 2:
        told = (
            "batch (dim=0)" if dim == 0 else f"heads (dim={dim})"
        ) + ", and a key that is hidden in all of them gets weight all the same"
    return Diagnosis(cause=f"softmax runs over the {told}", fix="normalise over the keys: dim=-1")


def _beside_a_sink(culprit: Culprit, part: Part, hidden: str) -> Diagnosis:
    """Scores `[..., T, T]` that get a sink as one more column: no size of the model, so the runs part here and not in the softmax."""
    assert culprit.event is not None
    made = culprit.event.outputs[0]
    if culprit.run is None or made.shape[-2:] != (part.seq, part.seq + 1):
        return Diagnosis()
    for event, kept, spot in list(zip(culprit.run.events, culprit.run.kept, culprit.run.spots, strict=True))[culprit.event.index + 1 :]:
        if event.op in ("_softmax", "_safe_softmax") and event.inputs[0].shape == made.shape:
            return _softmax(replace(culprit, event=event, left=kept, spot=spot), part, hidden)
    return Diagnosis()


def _weighted(culprit: Culprit, part: Part, hidden: str) -> Diagnosis:
    """Attention weights that do not depend on what is later, and give weight to it all the same: masked scores that were
    filled with a number which softmax turns into weight."""
    assert culprit.left is not None and culprit.event is not None
    if not culprit.left.inputs:
        return Diagnosis()
    weights = culprit.left.inputs[0]
    pattern = attention_pattern(weights, part)
    if pattern is None or culprit.run is None:
        return Diagnosis()
    told = pattern_told(pattern, hidden)
    later = torch.ones(part.seq, part.seq, dtype=torch.bool).triu(1)
    for event, kept in zip(
        reversed(culprit.run.events[: culprit.event.index]), reversed(culprit.run.kept[: culprit.event.index]), strict=True
    ):
        if event.op not in ("_softmax", "softmax", "_safe_softmax"):
            continue
        scores, dim = without_sink(kept.arguments["self"], part), int(kept.arguments["dim"]) % kept.inputs[0].ndim
        if scores.shape[-2:] != (part.seq, part.seq):
            return Diagnosis()
        if dim < scores.ndim - 1:
            return _wrong_axis(dim, scores.ndim)
        if (alike := without_keys(weights, scores, part)) is not None:
            return alike
        if not told.cause or hidden == "padded tokens":
            return Diagnosis()
        if (undone := _undone_mask(culprit, part)) is not None:
            return undone
        scores, weights = scores.reshape(-1, part.seq, part.seq).double(), weights.reshape(-1, part.seq, part.seq)
        filled = scores[:, later].unique()
        if filled.numel() != 1:
            return Diagnosis()
        return Diagnosis(
            cause=f"the scores of later keys are all set to {float(filled[0]):g} before the softmax, which gives them weight: up to "
            f"{float(weights[:, later].max()):.2g} here",
            fix="fill masked scores with float('-inf') or torch.finfo(scores.dtype).min",
            evidence=told.evidence,
        )
    return Diagnosis()


def _undone_mask(culprit: Culprit, part: Part) -> Diagnosis | None:
    """Scores that are masked, and then made finite again by an op between the mask and the softmax (a tanh, a clamp)."""
    run, end = culprit.run, culprit.event
    if run is None or end is None:
        return None
    if end.op not in ("_softmax", "softmax", "_safe_softmax"):  # the product behind it
        softmaxes = [e for e in run.events[: end.index] if e.op in ("_softmax", "softmax", "_safe_softmax")]
        if not softmaxes:
            return None
        end = softmaxes[-1]
    masked = run.kept[end.index].inputs[0]
    size = masked.numel()
    wanted = {info.storage for info in end.inputs[:1]}
    later = torch.ones(part.seq, part.seq, dtype=torch.bool).triu(1)
    undoing, masking = None, None  # the op after the mask, and the first op whose output is masked
    for index in range(end.index - 1, max(-1, end.index - LOOK_BACK), -1):
        event, kept = run.events[index], run.kept[index]
        if not wanted & {info.storage for info in event.outputs} or not kept.outputs or kept.outputs[0].numel() != size:
            continue
        scores = kept.outputs[0]
        hidden = scores.shape[-2:] == (part.seq, part.seq) and bool((scores.reshape(-1, part.seq, part.seq)[:, later] < MASKED).all())
        if hidden:
            masking = event
        elif masking is not None:
            break
        elif event.op not in SAME_VALUES:
            undoing = event
        wanted = wanted | {info.storage for info, t in zip(event.inputs, kept.inputs, strict=False) if t.numel() == size}
    if masking is None or undoing is None:
        return None
    return Diagnosis(
        cause=f"the scores are masked in line {masking.where.line} ({masking.op}), and {undoing.op} in line {undoing.where.line} makes "
        "the masked ones finite again, so that later keys keep weight",
        fix=f"mask after {undoing.op}, right before the softmax",
        evidence={"masked scores after it": float(masked.double().min())},
    )


def _fused(culprit: Culprit, part: Part, hidden: str) -> Diagnosis:
    assert culprit.left is not None and culprit.event is not None
    arguments = culprit.left.arguments
    mask = next((arguments[name] for name in ("attn_mask", "attn_bias") if isinstance(arguments.get(name), Tensor)), None)
    causal = bool(arguments.get("is_causal", False))
    tree = expressions(culprit.spot)
    call = call_of(tree, culprit, ("scaled_dot_product_attention",))
    if mask is None and not causal:
        if hidden == OTHER_ROWS:
            return _along_the_batch(culprit, part)
        if hidden == "padded tokens":
            return Diagnosis(
                cause="scaled_dot_product_attention gets no attn_mask, so padded keys take part",
                fix="pass the padding mask, combined with the causal one, as attn_mask",
            )
        return Diagnosis(
            cause="no causal mask: scaled_dot_product_attention is called without is_causal=True and without attn_mask",
            fix="pass is_causal=True",
            edits=set_keyword(tree, call, "is_causal", "True") if tree and call else (),
        )
    if mask is None:
        if hidden == "padded tokens":
            return Diagnosis(
                cause="scaled_dot_product_attention gets is_causal=True but no attn_mask, so padded keys take part",
                fix="combine padding and causality in one attn_mask, and drop is_causal",
            )
        return Diagnosis()
    visible = mask if mask.dtype == torch.bool else mask > -1e30
    visible = visible[..., : part.seq]  # a cache has room for more
    if visible.shape[-1] != part.seq or visible.shape[-2] not in (part.seq, 1):
        return Diagnosis()
    visible = visible.expand(*visible.shape[:-2], part.seq, part.seq) if visible.shape[-2] == 1 else visible
    pattern = visible.reshape(-1, part.seq, part.seq).any(0)
    if (
        mask.dtype != torch.bool
        and (told := without_keys(visible | ~visible.any(-1, keepdim=True), mask[..., : part.seq], part)) is not None
    ):
        return told
    if hidden == "padded tokens":
        return padding_seen(pattern, mask, part, "attn_mask")
    return pattern_told(pattern, hidden)


def _along_the_batch(culprit: Culprit, part: Part) -> Diagnosis:
    """Attention whose sequence is the batch: nothing else brings the rows of a batch together in it, and no mask is to blame."""
    assert culprit.left is not None
    query = culprit.left.arguments.get("query")
    if not isinstance(query, Tensor) or query.ndim < 3 or query.shape[-2] != part.batch or part.batch == part.seq:
        return Diagnosis()
    return Diagnosis(
        cause=f"attention runs along the batch: its sequence has {part.batch} entries, the number of rows, and there are {part.seq} tokens",
        fix="batch_first=True, for nn.MultiheadAttention and nn.TransformerEncoderLayer; elsewhere transpose before it",
    )


def _native(culprit: Culprit, part: Part, hidden: str) -> Diagnosis:
    """What torch.nn's attention was told in its fast path; its masks are True where they hide."""
    assert culprit.left is not None
    mask, kind = culprit.left.arguments.get("mask"), culprit.left.arguments.get("mask_type")
    if hidden == OTHER_ROWS:
        return _along_the_batch(culprit, part)
    if not isinstance(mask, Tensor) or kind == 1:
        padding = hidden == "padded tokens"
        if padding and kind == 1:
            return Diagnosis()
        name = "key_padding_mask" if padding else "attn_mask (mask, in a TransformerEncoder)"
        return Diagnosis(
            cause=f"torch.nn's attention is called without {name}" + ("" if padding else ", so that there is no causal mask"),
            fix=f"pass {name}" + ("" if padding else ": nn.Transformer.generate_square_subsequent_mask(seq_len)"),
        )
    if mask.shape[-2:] != (part.seq, part.seq):
        return Diagnosis()
    visible = ~mask if mask.dtype == torch.bool else mask > -1e30
    pattern = visible.reshape(-1, part.seq, part.seq).any(0)
    return padding_seen(pattern, mask, part, "key_padding_mask") if hidden == "padded tokens" else pattern_told(pattern, hidden)


def _reduction(event: Event, part: Part, hidden: str) -> Diagnosis:
    what = REDUCTIONS[event.op]
    shape = event.inputs[0].shape if event.inputs else ()
    over = "the batch" if part.rows is not None else "the sequence"
    return Diagnosis(
        cause=f"the {what} over {over} lets every position depend on {hidden}",
        fix=f"take the {what} over the last dimension (dim=-1) only",
        evidence={"shape that is reduced": str(tuple(shape))},
    )


def _layout(culprit: Culprit, part: Part, hidden: str) -> Diagnosis:
    """A reshape that reads several positions as one: does a transpose before it, or after it, put that right?"""
    assert culprit.left is not None and culprit.right is not None and culprit.event is not None
    before, after = culprit.left.inputs[0], culprit.right.inputs[0]
    shape = tuple(culprit.left.outputs[0].shape)
    tree = expressions(culprit.spot)
    for cause, fix, layout, insert in _layouts(before, shape, part.seq):
        try:
            pairs = zip(part.views(layout(before)), part.views(layout(after)), strict=True)
            holds = any(difference(a, b, relative_limit=MOVED_ONLY) is None for a, b in pairs)
        except RuntimeError:
            continue
        if holds:
            call = call_of(tree, culprit, ("reshape", "view", "contiguous", "flatten"))
            edits = insert_before_method(tree, call, insert) if tree and call and insert else ()
            evidence: dict[str, Scalar] = {"read as": f"{tuple(before.shape)} -> {tuple(shape)}"}
            return Diagnosis(cause=cause, fix=fix, edits=edits, evidence=evidence)
    return Diagnosis()


def _layouts(before: Tensor, shape: tuple[int, ...], seq: int) -> list[Layout]:
    """Ways to read a tensor as this shape that its sizes allow."""
    trials: list[Layout] = []
    if before.ndim == 4:
        trials.append(
            (
                "heads are merged without a transpose: (batch, heads, seq, head_dim) is read as (batch, seq, heads * head_dim)",
                "transpose(1, 2) before the reshape",
                lambda t: t.transpose(1, 2).reshape(shape),
                ".transpose(1, 2)",
            )
        )
    if len(shape) == 4:
        swapped = (shape[0], shape[2], shape[1], shape[3])
        trials.append(
            (
                "heads are split without a transpose: (batch, seq, heads * head_dim) is read as (batch, heads, seq, head_dim)",
                "view as (batch, seq, heads, head_dim), then transpose(1, 2)",
                lambda t: t.reshape(swapped).transpose(1, 2),
                "",
            )
        )
    if before.ndim == 3 and len(shape) == 3 and before.shape[1] % seq == 0 and shape[1] == seq < before.shape[1]:
        trials.append(
            (
                f"heads are joined along the sequence, {tuple(before.shape)}, and the reshape to {shape} reads several positions as one",
                "join the heads along the last dimension: torch.cat(heads, dim=-1)",
                lambda t: t.unflatten(1, (-1, seq)).transpose(1, 2).reshape(shape),
                "",
            )
        )
    if before.ndim > 2 and len(shape) > 1 and before.shape[0] != before.shape[1] and seq in (*before.shape[:2], *shape[:2]):
        trials.append(
            (
                f"the reshape, which moves no element, reads {tuple(before.shape)} as {shape}: the sequence is one of its first two "
                "dimensions, and they are in the wrong order for that",
                "transpose(0, 1) before the reshape",
                lambda t: t.transpose(0, 1).reshape(shape),
                ".transpose(0, 1)",
            )
        )
    place = shape.index(seq) if shape.count(seq) == 1 else 0
    if len(shape) > 4 and place > 1 and before.shape[:2] == (shape[0], seq):
        rest = [size for dim, size in enumerate(shape) if dim not in (0, place)]
        order = (0, *range(2, place + 1), 1, *range(place + 1, len(shape)))
        trials.append(
            (
                f"the heads are split by a reshape, which moves no element, without a permute: the sequence, dimension 1 of {tuple(before.shape)}, is read as dimension {place} of {shape}",
                f"reshape to {(shape[0], seq, *rest)}, then permute{order}",
                lambda t: t.reshape(shape[0], seq, *rest).movedim(1, place),
                "",
            )
        )
    return trials


def _misplaced(culprit: Culprit, part: Part) -> Diagnosis:
    """Tokens that are written into a cache at other slots than their positions, which is what a causal mask counts."""
    assert culprit.left is not None
    slots = [i for i in culprit.left.arguments["indices"] if isinstance(i, Tensor) and i.dtype == torch.int64 and i.numel() == part.seq]
    moved = [(place, int(slot)) for place, slot in enumerate(slots[0].flatten()) if place != slot] if len(slots) == 1 else []
    if part.columns is None or not moved:
        return Diagnosis()
    return Diagnosis(
        cause=f"the token at position {moved[0][0]} is written into slot {moved[0][1]} of the cache: whoever sees the slots up to its own "
        "position sees other tokens",
        fix="write each token into the slot of its position: cache[:, :, input_pos]",
    )


def _broadcast(culprit: Culprit, part: Part) -> Diagnosis:
    """A two-dimensional mask that broadcasts over the wrong dimensions of the scores."""
    assert culprit.left is not None and culprit.event is not None
    tensors = culprit.left.inputs
    if len(tensors) < 2:
        return Diagnosis()
    if (one := _one_position(culprit, part)) is not None:
        return one
    wide = max(tensors, key=lambda t: t.ndim)
    narrow = next((t for t in tensors if t.ndim < wide.ndim and t.shape[:1] == (part.batch,)), None)
    if narrow is None or wide.ndim != 4:
        return Diagnosis()
    if narrow.ndim == 2 and narrow.shape[1] == part.seq:
        tree = expressions(culprit.spot)
        spread = (
            "mask[:, None, None, :] turned into 0 where real and finfo.min where padded"
            if culprit.event.op.startswith("add")
            else "mask[:, None, None, :]"
        )
        return Diagnosis(
            cause=(
                f"a mask [batch, seq_len] = {tuple(narrow.shape)} meets scores {tuple(wide.shape)}: its rows line up with "
                "the queries, not with the batch; nothing fails because batch equals seq_len here"
            ),
            fix=f"use {spread}",
            edits=mask_operand(tree, culprit) if tree and culprit.event.op.startswith("add") else (),
            evidence={"mask": str(tuple(narrow.shape)), "scores": str(tuple(wide.shape))},
        )
    if narrow.ndim == 3 and part.batch == wide.shape[1]:
        return Diagnosis(
            cause=(f"{tuple(narrow.shape)} with the batch first broadcasts against {tuple(wide.shape)}: its batch lines up with the heads"),
            fix="unsqueeze(1) the table after indexing it with position_ids",
            evidence={"table": str(tuple(narrow.shape)), "states": str(tuple(wide.shape))},
        )
    return Diagnosis()


def _one_position(culprit: Culprit, part: Part) -> Diagnosis | None:
    """One position of the hidden states, `x[:, -1:]`, that is spread over all of them."""
    run, event = culprit.run, culprit.event
    if run is None or event is None or culprit.left is None or culprit.right is None or part.columns is None:
        return None
    if part.columns.indices(part.seq)[0] != 0:
        return None
    wide = max(culprit.left.inputs, key=lambda t: t.numel())
    if wide.ndim < 2 or wide.shape[1] != part.seq:
        return None
    for info, mine, theirs in zip(event.inputs, culprit.left.inputs, culprit.right.inputs, strict=False):
        if mine.ndim != wide.ndim or mine.shape[1] != 1 or difference(mine, theirs) is None:
            continue
        for before, kept in zip(run.events[: event.index], run.kept[: event.index], strict=True):
            source = kept.inputs[0] if kept.inputs else None
            if before.op not in ("slice", "select") or info.storage not in {out.storage for out in before.outputs} or source is None:
                continue
            later = [p for p in range(part.columns.indices(part.seq)[1], part.seq) if _holds(source, mine, p, part.seq)]
            if later:
                return Diagnosis(
                    cause=f"position {later[0]} of {tuple(source.shape)}, a later one for all but itself, is used at every position",
                    fix="use only what stands at the position itself, or before it",
                )
    return None


def _holds(source: Tensor, one: Tensor, position: int, seq: int) -> bool:
    """Whether one position of `[batch, seq_len, ...]` is this tensor."""
    return source.ndim == one.ndim and source.shape[1] == seq and torch.equal(source[:, position : position + 1], one)


def mask_added_as_number(recording: Recording) -> tuple[int, Kept] | None:
    """The first op that adds a tensor of just zeros and ones to attention scores `[batch, heads, T, S]`; its index and
    tensors. A 0/1 mask that is added leaves e times the weight where it should leave none."""
    for index, event in enumerate(recording.events):
        if event.op not in ("add", "add_") or len(event.inputs) < 2 or len(event.outputs[0].shape) != 4:
            continue
        kept = recording.kept[index]
        scores, other = kept.inputs[0], kept.inputs[1]
        values = other.double().unique()
        if other.numel() > 1 and set(values.tolist()) == {0.0, 1.0} and scores.double().unique().numel() > 2:
            return index, kept
    return None


def mask_operand_edits(culprit: Culprit) -> tuple[Edit, ...]:
    """The edit that turns an added 0/1 mask into an additive one of shape [batch, 1, 1, seq_len]."""
    tree = expressions(culprit.spot)
    return mask_operand(tree, culprit) if tree else ()
