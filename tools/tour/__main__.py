# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.tour``; the processes that train import this file, too."""

import sys

if __name__ == "__main__":
    try:
        from tools.tour.run import main
    except ModuleNotFoundError as error:
        print(
            f"The tour needs {error.name!r}, which is not installed here. "
            "From the top of the repository, run: nox -s tour",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(main())
