#!/usr/bin/env python
"""Convert a published checkpoint: the command wsbcn-convert, from a checkout."""

import sys

from wsbcn_d2.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
