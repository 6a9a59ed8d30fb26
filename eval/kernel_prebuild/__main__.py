"""Entry point of `python -m eval.kernel_prebuild`."""

from eval.kernel_prebuild.question import main

if __name__ == "__main__":
    main()
