"""The long pages of what the guards report: what must hold, why it matters, a fault it catches."""

import inspect

PAGES: dict[str, str] = {
    "index.in-bounds": """
        Every index lies in the table it reads.

        What must hold: token ids are below the embedding's rows, positions below the position table's, labels below the
        number of classes; the same for gather, scatter, index_select, take and x[idx].

        Why it matters: on CUDA a bad index is `device-side assert triggered`, reported at a later line, and every call after it
        fails too. Here it is found before the kernel is launched, with value, position, table and line.

        A fault it catches: a sequence of 65 tokens and a rotary table of 64 rows.
        """,
    "index.no-negative-wrap": """
        No index of a mixed batch counts from the end of a table by accident.

        What must hold: x[idx] gets indices of at least 0. Negative ones count from the end without a word, where an embedding
        or a gather would raise.

        Why it matters: the rows read are real rows, so nothing fails and the result is plausible.

        A fault it catches: log_probs[arange, labels] with -100 among the labels, which reads token vocab - 100.
        """,
    "index.probabilities": """
        What is sampled from is a row of finite numbers of at least 0.

        What must hold: multinomial gets no nan, inf or negative number.

        Why it matters: on CUDA that is a device-side assert; the cause lies in the logits, often many ops before.

        A fault it catches: float16 logits that overflowed to inf before the softmax.
        """,
    "numerics.finite": """
        No nan or inf reaches a loss, a gradient that is applied, or a weight.

        What must hold: what is differentiated and what the optimizer applies is finite. Infinities of an attention mask, values
        that are masked away, and overflows that a loss scaler skips are legal and are not reported.

        Why it matters: one nan spreads to every weight in one step. The place is the op where it is born from finite inputs,
        forward or backward, not the line where it was noticed.

        A fault it catches: a row that is masked throughout, whose softmax is nan.
        """,
    "numerics.float16-headroom": """
        Activations in float16 stay well below its largest number, 65504.

        What must hold: the largest magnitude of a forward op in float16 is less than half of 65504.

        Why it matters: training lets activations grow; an overflow is inf, and soon nan.

        A fault it catches: a residual stream that reaches 40000 before the last norm.
        """,
    "process.survives": """
        No process of the script dies of a signal of its own.

        What must hold: a segmentation fault, abort or bus error does not happen in Python code that uses torch.

        Why it matters: there is no traceback; the innermost line of the script at the death is in the report.

        A fault it catches: an extension that was built for another version of torch.
        """,
}


def guard_pages() -> list[tuple[str, str, str]]:
    """(name, first line, whole page) of everything that the guards report."""
    pages = []
    for name, text in PAGES.items():
        page = inspect.cleandoc(text)
        pages.append((name, page.partition("\n")[0], page))
    return sorted(pages)
