"""What the commands of this folder share: errors as one paragraph, and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from tc_lightning.errors import TokenCacheError

EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def run(main: Callable[[], None]) -> None:
    """Run a command: exit status 2 for an error that the user can mend, 3 for failed parity, each printed without a traceback."""
    try:
        main()
    except TokenCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "exit_status", EXIT_ERROR)) from error  # parity is not imported: it needs torch
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}. Free space or choose another folder.", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from error
    except KeyboardInterrupt as error:
        print("interrupted: nothing half-written was left under a final name", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from error
