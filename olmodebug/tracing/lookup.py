"""The table that token ids are looked up in: an embedding module's weight, or a parameter that a function indexes."""

from torch import nn

from ..convention import first_embedding
from .tracer import Recording

LOOKUPS = ("embedding", "index", "index_select", "gather")


def embedding_table(model: nn.Module, recording: Recording) -> nn.Parameter | None:
    """The embedding `[vocab, hidden]` of a model, as its modules or a run on token ids show it; None where neither does."""
    module = first_embedding(model)
    if module is not None:
        return module.weight  # type: ignore[return-value]
    named = dict(model.named_parameters())
    for event in recording.events:
        if event.op in LOOKUPS and event.parameters and (table := named.get(event.parameters[0])) is not None and table.ndim == 2:
            return table
    return None
