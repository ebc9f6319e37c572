"""`python -m mergekit_imm merge|verify`: the commands without their scripts."""

from .cli import main

if __name__ == "__main__":
    main()
