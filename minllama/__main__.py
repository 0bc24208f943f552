"""`python -m minllama` is the command `minllama`."""

from minllama.cli import main

if __name__ == "__main__":
    main()
