"""Running a subject's own code: quietly, and with what it raises told from our own exceptions."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from .load import SubjectCodeError
from .records import Case
from .sources import Sources, is_ours, traceback_frames

if TYPE_CHECKING:
    from .subject import Subject


@contextmanager
def own_code(subject: "Subject", case: Case, *, stage: str = "run") -> Iterator[None]:
    """Whatever is raised inside comes from running the subject on this case: a SubjectCodeError, and so a finding. A fault
    of an instrument that watches stays what it is."""
    try:
        yield
    except Exception as error:
        if is_ours(error):
            raise
        raise SubjectCodeError(stage, subject=subject, case=case) from error


@contextmanager
def quiet() -> Iterator[None]:
    """The subject's warnings are its own business while a probe runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def own_refusal(error: BaseException) -> str | None:
    """The model's own words when it declines a call openly, by raising ValueError, AssertionError or NotImplementedError
    itself; None for what torch raised in its place."""
    original = error.__cause__
    if not isinstance(error, SubjectCodeError) or not isinstance(original, ValueError | AssertionError | NotImplementedError):
        return None
    frames = traceback_frames(original.__traceback__)
    if not frames or Sources(nn.Module()).is_torch(frames[-1][0].f_code.co_filename):
        return None
    return f"{type(original).__name__}: {str(original).strip().partition(chr(10))[0]}".removesuffix(": ")


def refused(error: BaseException) -> str | None:
    """The model's own words when it declines a case of a probe openly: a clear refusal is no wrong answer."""
    return own_refusal(error) if isinstance(error, SubjectCodeError) and error.stage == "run" else None
