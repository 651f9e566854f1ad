"""The commands, one a module: `declare(commands)` adds its arguments, and a function of the command's name runs it.

Importing a command loads nothing heavy: what it needs is imported when it runs.
"""

from . import check, env, explain, memory, parity, probes, replay, report, run, shapes, train

ALL = (check, run, train, explain, parity, shapes, memory, probes, env, report, replay)
