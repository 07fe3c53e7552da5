"""`python -m turboquant_rs` is the command `turboquant-rs`."""

import sys

from turboquant_rs.cli import main

if __name__ == "__main__":
    sys.exit(main())
