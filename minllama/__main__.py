"""The command `minllama`, also as `python -m minllama`.

Ctrl-C at any moment ends the process silently with status 130, also while modules are imported and
during exit. `minllama.cli` handles everything in between.
"""

import os
import signal


def main() -> None:
    """Run the command line and exit; see `minllama.cli.main`."""
    # Ignored, as under nohup, or somebody else's: then it stays so.
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, _interrupted)
    from minllama.cli import main as run

    try:
        if is_usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # another one, while the first was ending the run
        os._exit(130)
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, _interrupted)


def _interrupted(number: int, frame: object) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
