"""A run that died: the op that ran, the bad index and its bound, from the journal alone."""

from olmodebug.executions.death import arguments_text, bad_index, death_finding, replayed
from olmodebug.process import Death
from olmodebug.records import Where


def journal(overload: str, **arguments: dict[str, object]) -> list[dict[str, object]]:
    op = overload.split(".")[1]
    return [{"name": name, **known} for name, known in arguments.items()] + [{"name": "", "op": op, "overload": overload}]


EMBEDDING = journal(
    "aten.embedding.default",
    weight={"shape": [50304, 4096], "dtype": "float32"},
    indices={"shape": [1, 3], "dtype": "int64", "values": [5, 50304, 2]},
)


def test_an_id_beyond_the_table_is_named_with_its_bound_and_the_cpus_own_words() -> None:
    found = bad_index(EMBEDDING)
    assert found is not None
    assert found["cause"] == "indices holds 50304 (element 1 of 3; 1 out of range), and embedding takes 0 to 50303"
    assert found["raised"] == "IndexError: index out of range in self"


def test_negative_positions_wrap_and_are_no_bad_index() -> None:
    known = journal(
        "aten.index.Tensor",
        self={"shape": [16, 4], "dtype": "float32"},
        indices={"items": [{"shape": [2], "dtype": "int64", "values": [-1, 15]}]},
    )
    assert bad_index(known) is None
    assert replayed(known) is None


def test_a_label_beyond_the_vocabulary_is_named_and_the_ignored_one_is_not() -> None:
    known = journal(
        "aten.nll_loss_forward.default",
        self={"shape": [3, 7], "dtype": "float32"},
        target={"shape": [3], "dtype": "int64", "values": [-100, 6, 7]},
        weight={"value": None},
        reduction={"value": 1},
        ignore_index={"value": -100},
    )
    found = bad_index(known)
    assert found is not None
    assert (found["observed"], found["expected"]) == ("7", "0 to 6")
    assert found["raised"] == "IndexError: Target 7 is out of bounds."


def test_a_device_assert_becomes_a_finding_with_module_line_and_arguments() -> None:
    last = {"op": "embedding", "module": "model.embed_tokens", "function": "OlmoModel.forward", "file": "m.py", "line": 3}
    last |= {"phase": "forward", "case": "step", "arguments": EMBEDDING}
    finding = death_finding(
        last, how="was ended by the device: CUDA error", kind="device", words="cuda float16", death=None, printed=None, where=Where()
    )
    assert finding.where == Where(module="model.embed_tokens", function="OlmoModel.forward", file="m.py", line=3, op="embedding")
    assert finding.cause is not None
    assert "50304" in finding.cause
    assert finding.evidence["arguments"] == "weight float32[50304, 4096], indices int64[1, 3] (2..50304)"
    assert finding.evidence["on the CPU"] == "IndexError: index out of range in self"


def test_a_hang_says_where_it_stood_and_what_to_look_for() -> None:
    death = Death(text="gave no answer for 5 s", hung=True)
    where = Where(function="loop", file="m.py", line=9)
    finding = death_finding(None, how=death.text, kind="process", words="cpu float32", death=death, printed=None, where=where)
    assert finding.message == "the execution cpu float32 gave no answer for 5 s"
    assert finding.where == where
    assert finding.fix is not None
    assert "endless loop" in finding.fix
    assert arguments_text([{"name": "x", "value": 3}]) == "x 3"
