"""The reference models under our own probes, as a user's suite has it: `pytest -k rope` asks what must hold of rotary positions."""

from collections.abc import Callable

import pytest

import olmodebug

MODELS = ["olmo1-tiny", "olmo2-tiny", "olmo3-tiny"]


@olmodebug.parametrize_with_probes(MODELS, select="rope")
def test_reference(subject: object, probe: Callable[[object], None]) -> None:
    probe(subject)


@pytest.mark.slow
@olmodebug.parametrize_with_probes(MODELS, select="not rope")
def test_reference_thoroughly(subject: object, probe: Callable[[object], None]) -> None:
    probe(subject)
