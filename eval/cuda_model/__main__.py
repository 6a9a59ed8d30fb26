"""Entry point of `python -m eval.cuda_model`."""

from eval.cuda_model.question import main

if __name__ == "__main__":
    main()
