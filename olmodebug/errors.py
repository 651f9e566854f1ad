"""Every exception that olmodebug raises on purpose.

OlmodebugError            the user's to mend: exit 2, one line, no traceback
├── UsageError            an option or argument that cannot be meant
├── SubjectError          the subject's spec does not resolve: no such file, attribute or class, or it needs arguments
└── ReportError           a stored report that cannot be read

A subject whose own code fails is no exception of ours: it is a finding.
"""


class OlmodebugError(Exception):
    """Something the user can mend; its text is one sentence that says what and how."""


class UsageError(OlmodebugError):
    """An option or an argument that cannot be meant."""


class SubjectError(OlmodebugError):
    """The subject's spec does not lead to a model."""


class ReportError(OlmodebugError):
    """A stored report that cannot be read."""


# The exit codes of every command: 0 no error finding, 1 at least one, 2 could not run, 3 a fault of our own, 5 nothing checked.
EXIT_PASS, EXIT_FINDINGS, EXIT_COULD_NOT_RUN, EXIT_INTERNAL, EXIT_NOTHING_CHECKED = 0, 1, 2, 3, 5
