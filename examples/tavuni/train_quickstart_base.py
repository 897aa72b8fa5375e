"""Make the base model that the quickstart ships: write its corpus, then pretrain on it (train_base.py).

    OMP_NUM_THREADS=1 python examples/tavuni/train_quickstart_base.py --output src/elo/quickstart/base

One thread, because at this size two cost more in waiting than they give. README.md beside this file has the outcome.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from corpus import SOURCE, TARGET, write_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=4e6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        paths = write_corpus(
            Path(folder) / "corpus",
            args.seed,
            # 4.3 and 11 bytes a token, with room to spare
            pretrain_source_bytes=int(args.tokens * 4.6),
            pretrain_target_bytes=1_000_000,
        )
        options = {
            "--share": f"{TARGET}=0.015",
            "--output": args.output,
            "--tokens": args.tokens,
            "--learning-rate": args.learning_rate,
            "--seed": args.seed,
            "--vocab-size": 2048,
            "--hidden-size": 128,
            "--intermediate-size": 352,
            "--layers": 12,
            "--heads": 4,
            "--sequence-length": 256,
            # Many small steps: at 3 M parameters steps are what is short, not tokens.
            "--batch": 4,
        }
        script = Path(__file__).parent / "train_base.py"
        command = [sys.executable, str(script), "--no-compile"]
        command += ["--corpus", f"{SOURCE}={paths.pretrain_source}", "--corpus", f"{TARGET}={paths.pretrain_target}"]
        for name, value in options.items():
            command += [name, str(value)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
