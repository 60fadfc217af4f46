"""`python -m varfast <command>`: the same as the script `varfast <command>` and as `python -m varfast.<command>`."""

from varfast.command import main

if __name__ == "__main__":
    main()
