"""Entry point of `python -m eval.host_path`."""

from eval.host_path.question import main

if __name__ == "__main__":
    main()
