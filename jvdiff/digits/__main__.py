"""Moving digits as files:

jvdiff digits --output=out/digits --clips=2000    # out/digits/seven/0001.mp4 and so on
"""

import sys
from collections.abc import Sequence

from jvdiff import config as configs
from jvdiff.commands import arguments, options
from jvdiff.commands.arguments import Command, Section, Told
from jvdiff.errors import JvdiffError

COMMAND = Command(
    name="digits",
    about="moving digits as MP4 files",
    examples=("--output=out/digits --clips=2000",),
    sections=lambda config, flags: [Section(str(options.Digits.__doc__), configs.options(options.Digits))],
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above; returns its exit status."""
    try:
        values = arguments.values(COMMAND, sys.argv if argv is None else argv)
        from jvdiff.digits.clips import write_clips

        write_clips(values["output"], values["clips"], values["frames"], values["seed"])
    except Told as told:
        print(told)
        return 0
    except JvdiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(values["output"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
