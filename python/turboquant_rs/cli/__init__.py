"""The command `turboquant-rs`: parse, call one verb of `commands`, turn errors into a line and an exit code.

Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 130 interrupted. Results go to stdout (`--json`:
one JSON document), everything else to stderr. TURBOQUANT_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from turboquant_rs.cli.parser import UsageError, build_parser
from turboquant_rs.table import printable

__all__ = ["main"]

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (default: those of the process) and returns its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("turboquant-rs: interrupted; nothing was left behind", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except BrokenPipeError:  # the reader of our output (head, less) has gone: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:  # the one place where an error becomes a line of text
        return _fail(error, EXIT_FAILURE)
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the process through its `finally` blocks, so that temporary files go with it."""
    sys.exit(EXIT_TERMINATED)


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("TURBOQUANT_DEBUG") == "1":
        raise error
    print(f"turboquant-rs: {printable(describe(error))}", file=sys.stderr)
    return code


def describe(error: Exception) -> str:
    """`error` as one line; errors nobody has foreseen say how to see where they come from."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.filename is None:  # raised by us, with a sentence
            return error.strerror or text
        return f"{os.fspath(error.filename)}: {error.strerror}{_ADVICE.get(error.errno or 0, '')}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory; free some, or give the machine more"
    if isinstance(error, ValueError | TypeError | RuntimeError | UsageError) and text:
        return text
    return f"internal error, {type(error).__name__}: {text}; TURBOQUANT_DEBUG=1 shows where"


_ADVICE = {
    2: "; check the path",
    13: "; choose a place you may write to, or change its permissions",
    17: "; choose another name or remove it first",
    28: "; free some space or write to another disk (nothing was left under the final name)",
    30: "; the file system is read-only, write to another one",
}
