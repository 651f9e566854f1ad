"""`python -m olmodebug`: the command line, from an installation or a bare checkout."""

from .cli import main

raise SystemExit(main())
