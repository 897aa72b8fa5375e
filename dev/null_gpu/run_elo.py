"""The `elo` command on a GPU that computes nothing: does everything around the arithmetic run there?

    LD_PRELOAD=$PWD/null/null_gpu.so LD_LIBRARY_PATH=$PWD/null python dev/null_gpu/run_elo.py quickstart -o OUT

Results mean nothing, and may stop what checks them.
"""

import sys

from answers import answer_for_it, on_a_null_gpu

from elo.cli import main

if __name__ == "__main__":
    if not on_a_null_gpu():
        raise SystemExit("no null GPU here: see --help of build.py")
    answer_for_it()
    main(sys.argv[1:])
