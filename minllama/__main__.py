"""The command `minllama`, also as `python -m minllama`.

Ctrl-C at any moment ends the process silently with status 130, also while modules are imported and
during exit. `minllama.cli` handles everything in between.
"""

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit; see `minllama.cli.main`."""
    # Ignored, as under nohup, or somebody else's: then it stays so.
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, _interrupted)
        sys.unraisablehook = _ignored
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


def _ignored(event: "sys.UnraisableHookArgs") -> None:
    """Report an exception that cannot be raised; an interrupt comes once more where it can."""
    if issubclass(event.exc_type, KeyboardInterrupt):
        import threading

        again = threading.Timer(0.01, signal.raise_signal, (signal.SIGINT,))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(event)


def _interrupted(number: int, frame: object) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
