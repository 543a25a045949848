"""`python -m trimtab`: the `trimtab` command, by the interpreter that is meant."""

from trimtab.cli import main

if __name__ == "__main__":
    main()
