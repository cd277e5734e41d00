"""Moving digits as files:

jvdiff digits --output=out/digits --clips=2000    # out/digits/seven/0001.mp4 and so on
"""

import sys
from collections.abc import Sequence

from jvdiff import config as configs
from jvdiff.commands import arguments, command_line, options
from jvdiff.commands.arguments import Command, Section

COMMAND = Command(
    name="digits",
    about="moving digits as MP4 files",
    examples=("--output=out/digits --clips=2000",),
    sections=lambda config, flags: [Section(str(options.Digits.__doc__), configs.options(options.Digits))],
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above; returns its exit status."""

    words = sys.argv if argv is None else argv

    def work() -> None:
        values = arguments.values(COMMAND, words)
        from jvdiff.digits.clips import write_clips

        write_clips(values["output"], values["clips"], values["frames"], values["seed"])
        print(values["output"])

    return command_line.ended(work, words)


if __name__ == "__main__":
    sys.exit(main())
