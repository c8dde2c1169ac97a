"""`python -m flipproof`, the same as `flipproof`."""

from flipproof.cli import main

if __name__ == "__main__":
    main()
