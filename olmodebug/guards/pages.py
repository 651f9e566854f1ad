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
    "loop.every-parameter-optimized": """
        Every parameter that gets a gradient is held by an optimizer.

        What must hold: parameters with a gradient are in the parameter groups of an optimizer that is alive.

        Why it matters: what no optimizer holds never changes; the loss still falls, a little less.

        A fault it catches: an optimizer that was built before the model was wrapped or emptied, so that it holds parameters of no model.
        """,
    "loop.gradients-reset": """
        Gradients of a step do not contain those of the step before.

        What must hold: between optimizer.step() and the second step after it, gradients are set to None or zero.

        Why it matters: gradients pile up, steps grow, and training diverges or needs a smaller learning rate.

        A fault it catches: optimizer.zero_grad() that was lost in a refactoring.
        """,
    "loop.gradients-reach-the-step": """
        The gradients that a backward wrote are there when the optimizer steps.

        What must hold: between a backward and the step that is to apply its gradients, nothing resets them; a step is of parameters
        that have gradients; and where gradients are computed again and again, some optimizer steps.

        Why it matters: a step without gradients changes nothing and says nothing; the loss stays where initialisation put it.

        A fault it catches: zero_grad() between backward and step, or before every micro-batch of an accumulation; step() before
        backward, or without one; an optimizer that holds the parameters of the model before the checkpoint was loaded.
        """,
    "loop.clip-before-step": """
        Clipping comes before the step that it is to limit.

        What must hold: what clip_grad_norm_ or clip_grad_value_ changes has not been applied yet. Measuring the norm after the
        step, with a limit of inf, is legal.

        Why it matters: gradients that have been applied are thrown away next; the limit has no effect.

        A fault it catches: optimizer.step() and clip_grad_norm_ the wrong way round.
        """,
    "loop.step-unscaled": """
        No optimizer applies gradients that still carry the loss scale.

        What must hold: after scaler.scale(loss).backward(), every optimizer steps through the scaler, or its gradients are
        divided by the scale first.

        Why it matters: SGD takes steps 65536 times too large; Adam hides it, but for eps, decay and the first moments.

        A fault it catches: a second optimizer that steps by itself beside scaler.step(first).
        """,
    "loop.scaler-in-order": """
        A gradient scaler is called in its order: scale, unscale_, step, update.

        What must hold: one unscale_ and one step for each optimizer, then one update.

        Why it matters: torch refuses anything else, in words about its own bookkeeping.

        A fault it catches: scaler.update() that is missing, so that the second step is refused.
        """,
    "loop.backward-runs": """
        The graph that a backward needs is there, and its values are those of the forward.

        What must hold: every backward has a graph of its own, and nothing writes to weights or activations in between.

        Why it matters: torch names the op that noticed, not the line that carried a state over or changed a weight.

        A fault it catches: a hidden state that goes from one step into the next without detach().
        """,
    "loop.learning-rate": """
        The learning rate is a number, and is not 0 in every step.

        What must hold: no rate is nan or inf; a schedule leaves 0 within the first eight steps.

        Why it matters: one step at nan makes every weight nan; at 0, nothing is learned and no error is raised.

        A fault it catches: a warm-up in whole numbers, step // warmup.
        """,
    "loop.weights-filled": """
        After to_empty, every weight is initialised or loaded before it is used.

        What must hold: at the first backward no weight holds what lay in its memory.

        Why it matters: to_empty gives memory as it is found. Some of it looks like small numbers, some is huge or nan, and the
        next run differs.

        A fault it catches: a reset_parameters() that resets the embeddings and forgets the layers.
        """,
    "loop.accumulation-divided": """
        A step over several micro-batches applies their mean.

        What must hold: the mean loss of each of n micro-batches is divided by n, before backward or in the gradients. A sum may be
        meant, so this is a note.

        Why it matters: the gradient grows with n: so do clipping, eps and the steps of SGD.

        A fault it catches: loss.backward() in the loop where loss / n was meant.
        """,
    "loop.ranks-share-one-model": """
        Ranks of data-parallel training keep one model.

        What must hold: replicas have equal weights after every step: the gradients, or the weights, are exchanged.

        Why it matters: each rank trains a model of its own on its share of the data, and one of them is saved.

        A fault it catches: no_sync() around every backward; a model that was never wrapped.
        """,
    "loop.updates-survive-rounding": """
        An update is large enough to change the weights in their dtype.

        What must hold: in the steps that were looked at, most bfloat16 or float16 weights with a gradient change.

        Why it matters: a change below half a unit in the last place is rounded away: the loss stalls without an error.

        A fault it catches: AdamW with a learning rate of 1e-5 on bfloat16 weights.
        """,
    "loop.ties-kept": """
        Weights that were tied stay one parameter.

        What must hold: parameters shared before to_empty are shared at the first step; config.tie_word_embeddings is true only of tied embeddings.

        Why it matters: the two train apart, and a saved checkpoint keeps one of them.

        A fault it catches: to_empty() without tying again.
        """,
    "loop.norms-undecayed": """
        Where weight decay is split by groups, norm weights are in the group without, and embedding tables are all in one kind of group.

        What must hold: no weight called norm stands in a group with decay beside a group without, and no embedding table beside another
        that is without. One group for all is legal and silent; so is decay on every table, or on one that is tied to the output head.

        Why it matters: norm scales drift towards 0.

        A fault it catches: a filter on 'bias' instead of on the number of dimensions.
        """,
    "loop.trains-in-train-mode": """
        A model with dropout that began in train mode goes on training in it.

        What must hold: after an evaluation, model.train() is called before the next step. A model that never was in train mode is silent.

        Why it matters: dropout stays off from the first evaluation on.

        A fault it catches: an evaluate() that ends without model.train().
        """,
    "loop.unscale-before-clip": """
        Gradients are clipped at their true size.

        What must hold: scaler.unscale_(optimizer) stands between backward and clipping.

        Why it matters: scaled gradients are 65536 times too large: all are clipped, and the true limit is 65536 times smaller.

        A fault it catches: clip_grad_norm_ before scaler.step() without unscale_.
        """,
    "loop.scaler-recovers": """
        The loss scaler finds a scale at which gradients are finite.

        What must hold: fewer than 24 steps in a row are skipped.

        Why it matters: a skipped step changes no weight.

        A fault it catches: a loss that is nan: no scale makes it finite.
        """,
    "loop.optimizer-before-scheduler": """
        The schedule advances after the optimizer.

        What must hold: scheduler.step() follows optimizer.step() of the same step.

        Why it matters: the first learning rate of the schedule is never used.

        A fault it catches: scheduler.step() straight after backward.
        """,
    "loop.schedule-per-update": """
        The schedule advances once for each update.

        What must hold: one scheduler step for each optimizer step; schedules by epoch are silent.

        Why it matters: with accumulation over 4 micro-batches the learning rate decays 4 times too fast.

        A fault it catches: scheduler.step() inside the loop over micro-batches.
        """,
    "loop.backward-outside-autocast": """
        Backward runs outside autocast.

        What must hold: autocast is off when backward is called.

        Why it matters: torch advises against it: backward ops run in the dtypes of their forward ops anyway.

        A fault it catches: loss.backward() indented into the autocast block.
        """,
    "loop.checkpoint-reaches-weights": """
        Checkpointed blocks get gradients.

        What must hold: with use_reentrant=True at least one input of the block requires a gradient.

        Why it matters: otherwise the block's weights get none, with a warning as the only sign.

        A fault it catches: frozen embeddings under reentrant checkpointing.
        """,
    "loop.graph-released": """
        The graph of a step ends with its backward.

        What must hold: the graphs of five steps in a row are not all alive.

        Why it matters: memory grows by one graph every step, until it is out.

        A fault it catches: total += loss instead of loss.item().
        """,
    "loop.labels-shifted-once": """
        Position i learns token i + 1.

        What must hold: labels agree with the ids shifted by one. Heads that predict further ahead beside the next token are silent.

        Why it matters: a model trained on token i + 2 has a plausible loss and writes nonsense.

        A fault it catches: labels shifted by the collator and again inside the model.
        """,
    "loop.padding-unlabelled": """
        Padding is no label.

        What must hold: where attention_mask is 0 the label is the ignored one; the first padded position of a row may be a label (an eos).

        Why it matters: the model learns to write padding, and its loss looks better than it is.

        A fault it catches: labels = input_ids.clone() in a collator.
        """,
    "loop.eos-is-learned": """
        The end of a text is a label.

        What must hold: attended eos tokens behind a labelled token are labels too.

        Why it matters: a model that never learns eos never stops.

        A fault it catches: labels masked where id == pad_token_id, with pad_token_id = eos_token_id.
        """,
    "loop.fresh-batches": """
        Each step sees a batch of its own.

        What must hold: the data loader is not started anew for every step, and workers do not each read the whole stream. A loop on one fixed batch is silent.

        Why it matters: the model trains on one batch, or on every batch twice.

        A fault it catches: next(iter(loader)) inside the loop.
        """,
    "loop.token-weighted-accumulation": """
        Every label of a window weighs the same.

        What must hold: means of micro-batches are weighted by their numbers of labels, or those are equal.

        Why it matters: labels of short micro-batches count several times as much as others.

        A fault it catches: loss / accumulation_steps with unequal lengths.
        """,
    "loop.evaluates-in-eval-mode": """
        An evaluation runs without dropout.

        What must hold: no dropout draws random numbers in a forward under no_grad whose loss is computed. Checkpointing is silent.

        Why it matters: the validation loss is noisy and too high.

        A fault it catches: a missing model.eval().
        """,
    "loop.ranks-see-different-data": """
        Data-parallel ranks see different batches.

        What must hold: the first batches of two DistributedDataParallel ranks are not all equal.

        Why it matters: equal gradients are averaged: the second rank does nothing.

        A fault it catches: a DataLoader without DistributedSampler.
        """,
    "shape.fits": """
        Operands of an op fit.

        What must hold: no op of torch raises because of sizes, dtypes or devices.

        Why it matters: torch names neither operand; here both are named by the model's own dimensions, with the lines that made them.

        A fault it catches: a padding mask [batch, seq] added to scores [batch, heads, seq, seq].
        """,
    "memory.fits": """
        Every allocation finds a block.

        What must hold: no allocation fails.

        Why it matters: what was live at the failure, by category and line, says what to make smaller.

        A fault it catches: three float32 copies of the logits of a large vocabulary.
        """,
    "process.survives": """
        No process of the script dies of a signal of its own, or of an error of torch that no other rule explains.

        What must hold: a segmentation fault, abort or bus error does not happen in Python code that uses torch, and torch refuses
        nothing.

        Why it matters: a signal leaves no traceback; the innermost line of the script at the death is in the report.

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
