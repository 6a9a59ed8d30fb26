"""Entry point of `python -m eval.kernels_cpu`."""

from eval.kernels_cpu.question import main

if __name__ == "__main__":
    main()
