"""Entry point of `python -m eval.kernels`."""

from eval.kernels.question import main

if __name__ == "__main__":
    main()
