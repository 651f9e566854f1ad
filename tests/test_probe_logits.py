"""The logits that a model keeps when it is asked for those of the last positions."""

import pytest
import torch
from torch import Tensor, nn

from olmodebug.examine import run_probe
from olmodebug.first_run import from_model
from olmodebug.probe import shipped_probes

PROBES = {item.name: item for item in shipped_probes()}


class Keeping(nn.Module):
    """Each position is the mean of those before it, and as many of them as were asked for go through the head."""

    def __init__(self, cut: str = "last") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)
        self.cut = cut

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        hidden = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        if logits_to_keep and self.cut != "none":
            places = {
                "last": slice(-logits_to_keep, None),
                "first": slice(0, logits_to_keep),
                "one before": slice(-logits_to_keep - 1, -1),
                "fewer": slice(-1, None),
            }
            hidden = hidden[:, places[self.cut]]
        return {"logits": self.head(hidden)}


@pytest.mark.parametrize(
    ("cut", "message", "cause"),
    [
        ("first", "with logits_to_keep=1 the logits are not those of position 10, but of position 0", "they are cut from the front of the sequence, of 11 positions"),
        ("one before", "with logits_to_keep=1 the logits are not those of position 10, but of position 9", None),
        ("fewer", "with logits_to_keep=3 the logits are not those of positions 8 to 10, but of position 10", None),
    ],
)  # fmt: skip
def test_logits_of_other_positions_than_the_last_are_told(cut: str, message: str, cause: str | None) -> None:
    (finding,) = run_probe(PROBES["logits.kept-are-the-last"], from_model(Keeping(cut))).findings
    assert (finding.severity, finding.message, finding.cause) == ("error", message, cause)
    assert finding.where.function == "Keeping.forward"


def test_the_last_are_right_and_what_is_not_kept_apart_cannot_be_asked() -> None:
    assert run_probe(PROBES["logits.kept-are-the-last"], from_model(Keeping())).outcome.status == "passed"
    assert run_probe(PROBES["logits.kept-are-the-last"], from_model(Keeping("none"))).outcome.status == "not-applicable"


def test_a_scale_that_was_not_looked_at_is_no_pass() -> None:
    outcome = run_probe(PROBES["attention.scaled-by-head-size"], from_model(Keeping())).outcome
    assert (outcome.status, outcome.reason) == ("not-applicable", "no scores of queries and keys over one sequence were recognised")
