"""What the parent makes of a run: which curves are worth a word, and which are not."""

from typing import Any

from olmodebug.training.trainer import Told, _learning, _skipped, _touched

DATA = {"vocab_size": 1000, "unigram_perplexity": 300.0}


def told(before: float, after: float) -> Told:
    import math

    run = Told(spec="olmo1-tiny", data=DATA)
    for when, perplexity in (("before", before), ("after", after)):
        run.evaluated[f"validation_{when}"] = {"loss": math.log(perplexity), "perplexity": perplexity}
    return run


def ended(untouched: list[str], *, steps: int, skipped: list[int]) -> dict[str, Any]:
    return {"untouched": untouched, "steps": [{}] * steps, "skipped": skipped}


def test_a_model_below_the_frequencies_is_worth_no_word() -> None:
    assert _learning(told(1000, 200)) == []


def test_a_model_that_knows_frequencies_alone_is_told_so_as_a_note() -> None:
    (finding,) = _learning(told(1000, 310))
    assert finding.severity == "note"
    assert "token frequencies at best: validation perplexity 310" in finding.message


def test_a_model_that_learned_nothing_is_a_warning_and_no_error() -> None:
    (finding,) = _learning(told(1000, 1100))
    assert finding.severity == "warning" and "nothing was learned" in finding.message


def test_parameters_without_gradient_count_only_after_a_few_used_steps() -> None:
    assert _touched(ended(["a.weight"], steps=2, skipped=[])) == []
    assert _touched(ended(["a.weight"], steps=8, skipped=[1, 2, 3, 4, 5, 6])) == []
    assert _touched(ended([], steps=8, skipped=[])) == []
    (finding,) = _touched(ended(["a.weight"], steps=8, skipped=[1]))
    assert finding.message == "1 parameter got no gradient in 7 steps: a.weight"


def test_steps_left_out_are_explained() -> None:
    (finding,) = _skipped(ended([], steps=8, skipped=[1, 2]))
    assert finding.severity == "note" and finding.message.startswith("2 steps left out because float16 gradients overflowed: 1, 2")
