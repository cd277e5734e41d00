"""Moving digits as files:

python -m jvdiff.digits --output=out/digits --clips=2000    # out/digits/seven/0001.mp4 and so on
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jvdiff.digits.clips import write_clips
from jvdiff.errors import JvdiffError


def main(words: Sequence[str] | None = None) -> int:
    """The command line above; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jvdiff.digits", description="Moving digits as MP4 files.")
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--frames", type=int, default=17, help="of each clip, at most 29")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    try:
        write_clips(args.output, args.clips, args.frames, args.seed)
    except JvdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
