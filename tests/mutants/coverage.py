"""Which rows of the corpus of real bugs have no broken model here, each with the reason.

A row belongs into the catalogue when one process can show it on a model alone: with no reference, no checkpoint, no data
and no training loop of the user's.
"""

from __future__ import annotations

ROWS = (
    *(f"R{i:02}" for i in range(1, 21)),
    *(f"M{i:02}" for i in range(1, 15)),
    *(f"A{i:02}" for i in range(1, 17)),
    *(f"N{i:02}" for i in range(1, 10)),
    *(f"P{i:02}" for i in range(1, 4)),
    *(f"E{i:02}" for i in range(1, 8)),
    *(f"L{i:02}" for i in range(1, 17)),
    *(f"T{i:02}" for i in range(1, 19)),
    "K01",
    "K02",
    "K03",
    "K10",
    *(f"I{i:02}" for i in range(1, 7)),
    *(f"S{i:02}" for i in range(1, 6)),
    *(f"D{i:02}" for i in range(1, 8)),
)

_ANOTHER_MODEL = "another valid model: only a checkpoint or a reference can tell (olmodebug parity)"
_ROUNDING = "a difference of rounding: float32 agrees, and a note would be noise"
_LOOP = "a fault of the training loop, not of the model (olmodebug run, olmodebug train)"
_RANKS = "needs several processes (olmodebug ranks)"
_MEMORY = "a matter of memory, not of values (olmodebug memory)"
_LOADER = "a fault of the script that loads a checkpoint, not of the model"
_DATA = "needs the data or the tokenizer"

LEFT_OUT: dict[str, str] = {
    "R03": _ANOTHER_MODEL,
    "R10": "which layers are scaled is a rule of the family, which no configuration states; " + _ANOTHER_MODEL,
    "R12": "the scale that YaRN asks of the softmax is not in every configuration; " + _ANOTHER_MODEL,
    "M11": "0 * NaN is NaN in every implementation that multiplies by its weights; no correct model would pass",
    "A04": _ANOTHER_MODEL,
    "A12": _ANOTHER_MODEL,
    "A13": _ANOTHER_MODEL,
    "A14": "a fault of a CUDA kernel: needs a GPU",
    "A15": "a fault of the compiler, not of a model",
    "N03": _ROUNDING,
    "P03": _ANOTHER_MODEL,
    "E04": _ROUNDING,
    "L04": _LOOP,
    "L05": _LOOP,
    "L06": _LOOP,
    "L07": _RANKS,
    "L08": "a term that no model here has: the z-loss is the training loop's",
    "L10": _DATA,
    "L14": "whether and how a balancing loss is added is a choice; its right size is a reference's to say",
    **{f"T{i:02}": _LOOP for i in (1, 2, 3, 4, 5, 7, 8, 12, 17, 18)},
    "T06": _RANKS,
    "T10": _DATA,
    "T11": _RANKS,
    **{f"T{i:02}": _MEMORY for i in (13, 14, 15, 16)},
    "K10": _DATA,
    "I05": _RANKS,
    **{f"S{i:02}": _LOADER for i in range(1, 6)},
    **{f"D{i:02}": _RANKS for i in (1, 2, 3, 5, 6, 7)},
}
