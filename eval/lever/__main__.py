"""Entry point of `python -m eval.lever`."""

from eval.lever.question import main

if __name__ == "__main__":
    main()
