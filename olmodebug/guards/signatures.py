"""The texts that torch and CUDA print when something breaks, what each means, and its usual causes.

Causes stand in the order of how often they are met; `hints` are words of the log that speak for one of them. The assertion
texts are those of ATen's CUDA kernels and of their CPU counterparts.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A usual cause, how to tell it from the others, and words of a log that speak for it."""

    text: str
    tell: str
    hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A text in a log, as a regular expression with named groups, and what it means.

    `root` signatures explain the symptoms (`device-side assert triggered`) that follow them, which are not told again.
    """

    name: str
    pattern: str
    meaning: str
    causes: tuple[Cause, ...] = ()
    guard: str = "index"
    command: str = ""
    root: bool = True


POSITIONS = Cause(
    text="a position beyond the position or rotary table: the sequence is longer than the model's maximum",
    tell="print the sequence length and the table's rows; the length that fails is the table's rows plus one",
    hints=("cos", "sin", "rope", "rotary", "position", "wpe", "freqs"),
)
TOKENS = Cause(
    text="a token id beyond the embedding table: tokens were added without resize_token_embeddings, or another model's tokenizer",
    tell="compare input_ids.max() with model.get_input_embeddings().num_embeddings",
    hints=("embed", "wte", "input_ids", "tok_emb"),
)
MASKED_IDS = Cause(
    text="-100 or another negative number among the token ids: labels and input_ids are the same memory",
    tell="input_ids.min() is negative; clone() before masking the labels",
    hints=("-100", "labels"),
)
LABELS = Cause(
    text="a label outside 0 .. classes-1 that is not ignore_index: padding with the pad id, or labels of another vocabulary",
    tell="compare labels[labels != -100].min() and .max() with logits.shape[-1]",
    hints=("cross_entropy", "nll_loss", "labels", "loss"),
)

SIGNATURES: tuple[Signature, ...] = (
    Signature(
        name="index-kernel",
        pattern=r"IndexKernel(?:Utils)?\.cu.*?Assertion `+[^`]*index out of bounds|index (?P<value>-?\d+) is out of bounds for dimension (?P<dim>\d+) with size (?P<size>\d+)",
        meaning="tensor indexing x[idx] with an index outside the table: index_elementwise_kernel",
        causes=(POSITIONS, Cause(text="gathering one position a row (x[arange, last]) where the last position was computed as -1 or T", tell="print the index tensor's min and max", hints=("arange", "lengths", "sequence_lengths"))),
    ),
    Signature(
        name="embedding",
        pattern=r"Indexing\.cu.*?(?:indexSelect\w*|embedding\w*).*?Assertion `+srcIndex < srcSelectDimSize|vectorized gather kernel index out of bounds|IndexError: index out of range in self",
        meaning="an embedding lookup or index_select outside its table: indexSelectLargeIndex / vectorized_gather_kernel",
        causes=(TOKENS, POSITIONS, MASKED_IDS),
    ),
    Signature(
        name="cross-entropy-target",
        pattern=r"(?:Loss|NLLLoss\w*|ClassNLL\w*)\.cu.*?Assertion `+t >= 0 && t < n_classes|cur_target >= 0 && cur_target < n_classes|IndexError: Target (?P<value>-?\d+) is out of bounds",
        meaning="cross-entropy got a label that is no class: nll_loss_forward_reduce_cuda_kernel",
        causes=(
            LABELS,
            Cause(text="the loss ignores another number than the labels use", tell="labels hold -100 and ignore_index is not -100", hints=("ignore_index",)),
            Cause(text="the head is narrower than the vocabulary", tell="logits.shape[-1] < tokenizer length", hints=("lm_head", "vocab")),
        ),
    ),
    Signature(
        name="gather-scatter",
        pattern=r"ScatterGatherKernel\.cu.*?Assertion|(?:gather|scatter)\w*\(\): ?index.*out of bounds|index (?P<value>-?\d+) is out of bounds for dimension \d+ with size (?P<size>\d+)",
        meaning="gather or scatter with an index outside its dimension: _scatter_gather_elementwise_kernel",
        causes=(
            Cause(text="log-probabilities gathered at labels that still hold -100", tell="labels.min() is negative; clamp(min=0) and mask the result", hints=("labels", "logprobs", "log_softmax", "gather")),
            Cause(text="one_hot with too few classes", tell="num_classes <= index.max()", hints=("one_hot",)),
            Cause(text="expert numbers or token ids beyond the dimension", tell="index.max() against the dimension's size", hints=("topk", "expert", "router")),
        ),
    ),
    Signature(
        name="multinomial",
        pattern=r"probability tensor contains either `?inf`?, `?nan`? or element < 0|MultinomialKernel\.cu.*?Assertion",
        meaning="sampling got probabilities with inf, nan or a negative number",
        guard="index,nan",
        causes=(
            Cause(text="the logits are already nan or inf (float16 overflow, a row that is masked throughout)", tell="torch.isfinite(logits).all() before the softmax", hints=("generate", "float16", "half")),
            Cause(text="temperature 0, or top_p / top_k that removes every token", tell="print the temperature; the softmax of a row of -inf is nan", hints=("temperature", "top_p", "top_k")),
        ),
    ),
    Signature(
        name="illegal-access",
        pattern=r"CUDA error: an illegal memory access was encountered|CUDA_ERROR_ILLEGAL_ADDRESS",
        meaning="a kernel read or wrote memory that is not its own; the line shown is where it was noticed, not where it happened",
        causes=(
            Cause(text="an index that a custom or compiled kernel does not check", tell="it goes away with torch.compile off and eager attention", hints=("triton", "flash", "inductor", "compile")),
            Cause(text="a tensor with more than 2**31 elements in a kernel with 32-bit offsets", tell="print numel() of the logits", hints=("logits",)),
            Cause(text="memory that another stream or a freed tensor used", tell="compute-sanitizer, or CUDA_LAUNCH_BLOCKING=1, moves the line", hints=("stream", "record_stream")),
        ),
    ),
    Signature(
        name="device-assert",
        pattern=r"CUDA error: device-side assert triggered",
        meaning="a kernel's assertion failed; the line shown is where it was noticed. The assertion itself stands earlier in the log",
        causes=(TOKENS, POSITIONS, LABELS),
        root=False,
    ),
    Signature(
        name="cublas",
        pattern=r"CUBLAS_STATUS_(?:EXECUTION_FAILED|NOT_INITIALIZED|ALLOC_FAILED|INTERNAL_ERROR)|cuDNN error: CUDNN_STATUS_\w+",
        meaning="a library call failed on a context that was broken before, or for want of memory",
        causes=(
            Cause(text="an earlier device-side assert (an index out of range) broke the context", tell="the same batch on the CPU raises IndexError", hints=("assert",)),
            Cause(text="no memory was left for the library's workspace", tell="NOT_INITIALIZED or ALLOC_FAILED with nearly all memory in use", hints=("ALLOC_FAILED", "NOT_INITIALIZED")),
        ),
        root=False,
    ),
    Signature(
        name="cuda-memory",
        pattern=r"CUDA out of memory\. Tried to allocate (?P<asked>[\d.]+ [KMGT]iB)(?:.*?total capacity of (?P<total>[\d.]+ [KMGT]iB))?(?:.*?of which (?P<free>[\d.]+ [KMGT]iB) is free)?(?:.*?(?P<allocated>[\d.]+ [KMGT]iB) is allocated by PyTorch)?(?:.*?(?P<stranded>[\d.]+ [KMGT]iB) is reserved by PyTorch but unallocated)?",
        meaning="the device had no block of the size that was asked for",
        guard="oom",
        causes=(
            Cause(text="the logits: batch x sequence x vocabulary in float32, about three times at the loss", tell="the failing line is cross_entropy, log_softmax or .float()", hints=("cross_entropy", "log_softmax", "logits", ".float()")),
            Cause(text="the optimizer's state, made lazily in the first step: two more copies of the weights for Adam", tell="the failing line is optimizer.step(), in the first step", hints=("optimizer", "step", "adam", "foreach")),
            Cause(text="activations kept for backward", tell="it fails in forward and fits with a smaller batch; activation checkpointing frees them", hints=("forward",)),
            Cause(text="graphs of earlier steps kept alive by a sum of losses", tell="memory grows from step to step; use loss.item()", hints=("total_loss", "losses")),
        ),
    ),
    Signature(
        name="cpu-memory",
        pattern=r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory): you tried to allocate (?P<asked>\d+) bytes|DataLoader worker \(pid[^)]*\) is killed by signal: Killed",
        meaning="the machine, or the limit of this process, had no memory left",
        guard="oom",
        causes=(
            Cause(text="a tensor of the wrong shape: a broadcast that makes [N, N] of two [N]", tell="divide the bytes by the element size: it is the product of two lengths that should not meet", hints=("broadcast",)),
            Cause(text="data-loader workers each hold a copy of the data set", tell="memory grows with num_workers", hints=("DataLoader", "worker")),
        ),
    ),
    Signature(
        name="shapes",
        pattern=r"The size of tensor a \((?P<a>\d+)\) must match the size of tensor b \((?P<b>\d+)\) at non-singleton dimension (?P<dim>\d+)",
        meaning="two tensors that are added, multiplied or masked do not broadcast",
        guard="shape",
        causes=(
            Cause(text="a padding mask [batch, seq] met scores [batch, heads, seq, seq]", tell="one of the two sizes is the batch, the other the sequence: use mask[:, None, None, :]", hints=("mask", "scores", "attn")),
            Cause(text="grouped-query keys that were not repeated for the query heads", tell="the sizes are num_attention_heads and num_key_value_heads", hints=("repeat_kv", "key_states", "kv")),
            Cause(text="a position table shorter than the sequence: slicing does not raise", tell="one size is the table's rows, the other the sequence", hints=("cos", "sin", "pos", "bias[")),
            Cause(text="a cache of another length than the mask", tell="it fails at the second forward of a generation only", hints=("past", "cache")),
        ),
    ),
    Signature(
        name="matmul",
        pattern=r"mat1 and mat2 shapes cannot be multiplied \((?P<a>\d+x\d+) and (?P<b>\d+x\d+)\)|Expected size for first two dimensions of batch2 tensor",
        meaning="a matrix product whose inner sizes differ",
        guard="shape",
        causes=(
            Cause(text="the layer was built for another width", tell="the second number of the first shape is not the layer's in_features", hints=("linear", "Linear", "proj")),
            Cause(text="heads were merged or split in another order than the weights expect", tell="the width is num_heads x head_dim with another head_dim", hints=("view", "reshape", "transpose", "heads")),
        ),
    ),
    Signature(
        name="view",
        pattern=r"shape '\[(?P<shape>[^\]]*)\]' is invalid for input of size (?P<size>\d+)",
        meaning="a view or reshape to another number of elements",
        guard="shape",
        causes=(
            Cause(text="a head count, batch or length that is written into the view is not the tensor's", tell="divide the size by the sizes that are right: what is left is the wrong one", hints=("heads", "view", "reshape")),
        ),
    ),
    Signature(
        name="strides",
        pattern=r"view size is not compatible with input tensor's size and stride",
        meaning="a view of a tensor that does not lie in memory in the order of its dimensions; reshape copies where it must",
        guard="shape",
        causes=(
            Cause(text="a view straight after a transpose or permute", tell="a transpose, permute or .T stands before it: use reshape, or contiguous() first", hints=("transpose", "permute", ".T")),
            Cause(text="a view of a slice: columns cut out of a batch, as targets = batch[:, 1:]", tell="the tensor was cut along its last dimension: use reshape, or contiguous() on the slice", hints=("target", "label", "[:, ")),
        ),
    ),
    Signature(
        name="dtypes",
        pattern=r"expected (?:m1 and m2|scalar type|mat1 and mat2) .*?(?:but (?:got|found)|dtype).*|mat1 and mat2 must have the same dtype[^\n]*",
        meaning="two operands of one product have different dtypes",
        guard="shape",
        causes=(
            Cause(text="one module was left in float32, or a float32 buffer or mask promoted its input", tell="the dtypes of the failing layer's weight and of its input", hints=("norm", "mask", "float()")),
            Cause(text="the call is outside autocast", tell="torch.is_autocast_enabled() at the failing line", hints=("autocast",)),
        ),
    ),
    Signature(
        name="devices",
        pattern=r"Expected all tensors to be on the same device",
        meaning="operands live on different devices",
        guard="shape",
        causes=(
            Cause(text="a tensor made in forward without device=, or a plain attribute that .to() does not move", tell="register it as a buffer, or pass device=x.device", hints=("arange", "ones", "mask", "tril")),
            Cause(text="the batch was not moved", tell="print the device of every entry of the batch", hints=("batch", "input_ids")),
        ),
    ),
    Signature(
        name="in-place",
        pattern=r"one of the variables needed for gradient computation has been modified by an inplace operation[^\n]*",
        meaning="a tensor that backward needs was overwritten after it was saved",
        guard="nan",
        command="torch.autograd.set_detect_anomaly(True) names the op that saved it",
        causes=(
            Cause(text="+=, masked_fill_ or an assignment to a slice on an activation", tell="write it without the underscore", hints=("+=", "_(")),
            Cause(text="the weights were changed between forward and backward", tell="optimizer.step() stands before a backward of the same forward", hints=("step", "optimizer")),
        ),
    ),
    Signature(
        name="second-backward",
        pattern=r"Trying to backward through the graph a second time",
        meaning="a graph was used after its backward had freed it",
        guard="loop",
        causes=(
            Cause(text="a tensor of the step before is part of this step's loss", tell="a hidden state, cache or running loss without detach()", hints=("total", "hidden", "state", "cache")),
            Cause(text="two losses share a graph and are backpropagated one after the other", tell="add them first, or retain_graph=True on the first", hints=("retain_graph",)),
        ),
    ),
    Signature(
        name="no-gradient",
        pattern=r"element 0 of tensors does not require grad and does not have a grad_fn|None of the inputs have requires_grad=True",
        meaning="the loss is not connected to any parameter",
        guard="loop",
        causes=(
            Cause(text="forward ran under no_grad or inference_mode, or its output was detached", tell="loss.requires_grad is False", hints=("no_grad", "detach", "item()", "inference_mode")),
            Cause(text="everything is frozen, or reentrant checkpointing wraps a model whose embeddings are frozen", tell="use_reentrant=False, or model.enable_input_require_grads()", hints=("checkpoint", "lora", "peft", "requires_grad")),
        ),
    ),
    Signature(
        name="unused-parameters",
        pattern=r"Expected to have finished reduction in the prior iteration before starting a new one",
        meaning="DistributedDataParallel waited for gradients that never came",
        guard="loop",
        causes=(
            Cause(text="parameters took no part in the loss in this step", tell="TORCH_DISTRIBUTED_DEBUG=DETAIL names them; find_unused_parameters=True allows it", hints=("parameter",)),
        ),
    ),
    Signature(
        name="collective-timeout",
        pattern=r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (?:recv|send) operation|NCCL WARN Timeout|Some NCCL operations have failed or timed out|Application timeout caused pair closure|wait timeout after \d+ms, keys",
        meaning="a rank waited for the others in a collective, and they did not come",
        guard="loop",
        causes=(
            Cause(text="one rank died or raised first", tell="the first traceback of any rank, not the last", hints=("Traceback",)),
            Cause(text="ranks ran a different number of steps: uneven data", tell="print len(loader) on every rank", hints=("loader", "epoch")),
            Cause(text="a collective under `if rank == 0`", tell="barrier, save or evaluation on one rank only", hints=("rank == 0", "barrier", "save")),
        ),
    ),
    Signature(
        name="peer-lost",
        pattern=r"Connection closed by peer|NCCL (?:remote process|communicator was) (?:exited|aborted)[^\n]*|ncclRemoteError[^\n]*",
        meaning="another rank ended, and this one found out in a collective",
        guard="loop",
        root=False,
        causes=(
            Cause(text="the other rank raised or died first", tell="the first traceback or signal of any rank, not this one's", hints=("Traceback", "Signal", "exitcode")),
        ),
    ),
    Signature(
        name="shared-tensors",
        pattern=r"Some tensors share memory, this will lead to duplicate memory on disk[^\n]*|The weights trying to be saved contained shared tensors[^\n]*",
        meaning="safetensors stores no tensor under two names, and two weights of this model are one",
        guard="",
        command="olmodebug check SUBJECT -k lifecycle",
        causes=(
            Cause(text="the head is tied to the embedding, and the class does not say so", tell="the names in the message are lm_head and embed_tokens; name them in _tied_weights_keys, or use safetensors.torch.save_model", hints=("lm_head", "embed", "wte")),
            Cause(text="a module stands in two places, or weights are views of one buffer", tell="the names in the message are of layers", hints=("layers", "blocks")),
        ),
    ),
    Signature(
        name="worker-bus-error",
        pattern=r"DataLoader worker \(pid[^)]*\) is killed by signal: Bus error[^\n]*|unable to (?:open|allocate|mmap) shared memory[^\n]*|insufficient shared memory \(shm\)[^\n]*",
        meaning="a data-loader worker could not put its batch into shared memory",
        guard="",
        command="df -h /dev/shm",
        causes=(
            Cause(text="/dev/shm is full: 64 MB by default in a container", tell="df -h /dev/shm; start the container with --shm-size, or num_workers=0", hints=("docker", "shm", "container")),
            Cause(text="too many open files: each tensor of a batch is a descriptor", tell="ulimit -n; torch.multiprocessing.set_sharing_strategy('file_system')", hints=("Too many open files", "descriptor")),
        ),
    ),
    Signature(
        name="worker-gone",
        pattern=r"DataLoader worker \(pid\(?s?\)? ?[\d, ]+\) exited unexpectedly[^\n]*",
        meaning="a data-loader worker died without a word",
        guard="",
        causes=(
            Cause(text="the machine ran out of memory: each worker holds a copy of what the dataset touches", tell="dmesg speaks of oom-kill; fewer workers, or a memory-mapped dataset", hints=("Killed", "oom")),
            Cause(text="the worker's own code crashed", tell="num_workers=0 shows the traceback", hints=("exited unexpectedly",)),
        ),
    ),
    Signature(
        name="compile-failed",
        pattern=r"torch\._dynamo\.exc\.BackendCompilerFailed[^\n]*|torch\._inductor\.exc\.\w+[^\n]*|backend='inductor' raised[^\n]*",
        meaning="torch.compile's backend failed on a graph; the model itself may be right",
        guard="",
        command="TORCH_COMPILE_DISABLE=1 in the environment runs the same code uncompiled",
        causes=(
            Cause(text="no C++ compiler, or no triton, where the backend needs one", tell="the message names g++, cl or triton", hints=("g++", "compiler", "triton", "InvalidCxxCompiler")),
            Cause(text="an op with fake tensors that its own rule refuses: the same shape or dtype error comes without compile", tell="it fails uncompiled, too", hints=("FakeTensor", "fake", "shape")),
        ),
    ),
    Signature(
        name="flash-dtype",
        pattern=r"FlashAttention only support(?:s)? fp16 and bf16 data type|Flash Attention (?:2\.0 )?only supports torch\.float16 and torch\.bfloat16[^\n]*",
        meaning="the flash-attention kernel got float32 queries, keys or values",
        guard="shape",
        causes=(
            Cause(text="the model was loaded in float32", tell="next(model.parameters()).dtype; give dtype=torch.bfloat16 to from_pretrained", hints=("from_pretrained", "float32")),
            Cause(text="a norm or rotary embedding returns float32, and its output is not cast back", tell="the dtypes of query and value differ just before the kernel", hints=("norm", "rotary", "q_norm")),
        ),
    ),
    Signature(
        name="tokenizers-fork",
        pattern=r"The current process just got forked, after parallelism has already been used[^\n]*",
        meaning="a notice of tokenizers, no error: it turns its threads off in data-loader workers to be safe",
        guard="",
        command="TOKENIZERS_PARALLELISM=false in the environment silences it",
        causes=(
            Cause(text="the tokenizer was used before the loader forked its workers", tell="it is printed once a worker; nothing is lost but speed", hints=("forked",)),
        ),
    ),
    Signature(
        name="state-dict",
        pattern=r"Error\(s\) in loading state_dict for (?P<kind>\w+)",
        meaning="a checkpoint does not fit the model",
        command="olmodebug check SUBJECT -k state",
        guard="",
        causes=(
            Cause(text="a prefix: module. (DDP), _orig_mod. (torch.compile), model. (another wrapper)", tell="every key differs by the same prefix", hints=("module.", "_orig_mod.")),
            Cause(text="another configuration", tell="size mismatch lines: the two shapes tell which setting", hints=("size mismatch",)),
            Cause(text="tied weights are stored once", tell="only lm_head.weight is missing", hints=("lm_head.weight",)),
        ),
    ),
    Signature(
        name="nan-loss",
        pattern=r"(?i)\bloss[\"']?\s*[:=]?\s*(?:is\s*)?(?:nan|inf)\b|Function '(?P<node>\w+)' returned nan values|found NaN|Input contains NaN",
        meaning="the loss, or a gradient, became nan or inf",
        guard="nan",
        causes=(
            Cause(text="float16 overflow: a value beyond 65504", tell="it goes away in bfloat16 or float32", hints=("float16", "fp16", "half")),
            Cause(text="a row that is masked throughout: the softmax of -inf only is nan", tell="it comes with certain padding only", hints=("mask", "softmax", "-inf")),
            Cause(text="a batch without a single label: the mean over nothing is 0/0", tell="(labels != -100).sum() is 0", hints=("labels", "ignore_index", "cross_entropy")),
            Cause(text="a learning rate that is too high, without clipping", tell="the gradient norm grows for some steps first", hints=("lr", "grad_norm")),
        ),
    ),
    Signature(
        name="segmentation-fault",
        pattern=r"Fatal Python error: (?P<what>Segmentation fault|Aborted|Bus error|Illegal instruction)|Segmentation fault \(core dumped\)|exitcode\s*: -11",
        meaning="native code crashed the process",
        guard="index,shape",
        causes=(
            Cause(text="shared memory ran out in data-loader workers (Bus error)", tell="df /dev/shm; num_workers=0 helps", hints=("Bus error", "DataLoader")),
            Cause(text="an extension built for another torch", tell="reinstall flash-attn, apex or the like for this torch", hints=("flash", "apex", "undefined symbol")),
        ),
    ),
)  # fmt: skip
