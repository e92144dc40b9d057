"""`python -m tools.study`. A module of its own: spawned processes cannot import what they run from a `__main__`."""

from tools.study.study import main

if __name__ == "__main__":
    main()
