"""The README says what is true today."""

import re
import shlex

from olmodebug.cli import _parser
from olmodebug.probe import declared_probes
from tests.readme import README, renewed


def test_the_generated_parts_are_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert renewed(text) == text, "run python -m tests.readme"


def test_every_command_in_it_can_be_parsed() -> None:
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.startswith("olmodebug ")]
    assert len(lines) >= 8
    for line in lines:
        arguments = _parser().parse_args(shlex.split(line)[1:])
        assert arguments.command


def test_it_names_every_probe() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"`{item.name}`" in text for item in declared_probes())


def test_every_probe_says_what_must_hold_why_and_what_it_catches() -> None:
    for item in declared_probes():
        assert re.search(r"^Why: ", item.doc, flags=re.MULTILINE), item.name
        assert re.search(r"^Catches: ", item.doc, flags=re.MULTILINE), item.name
