"""Entry point of `python -m eval.cuda`."""

from eval.cuda.question import main

if __name__ == "__main__":
    main()
