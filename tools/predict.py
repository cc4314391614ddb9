#!/usr/bin/env python
"""Predict on pictures, folders or videos: the command wsbcn-predict, from a checkout."""

import sys

from wsbcn_d2.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
