"""Entry point of `python -m eval.serving`."""

from eval.serving.question import main

if __name__ == "__main__":
    main()
