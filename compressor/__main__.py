"""`python -m compressor`: the same program as the `compress` command."""

from compressor.cli.app import main

if __name__ == "__main__":
    main()
