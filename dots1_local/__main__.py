"""`python -m dots1_local`, which is `dots1`."""

from dots1_local.cli import main

if __name__ == "__main__":
    main()
