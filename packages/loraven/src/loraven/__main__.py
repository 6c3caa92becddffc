# SPDX-License-Identifier: Apache-2.0
"""``python -m loraven``: the command ``loraven``."""

from loraven.cli import main

if __name__ == "__main__":
    main()
