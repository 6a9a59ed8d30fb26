def learn_token_2(memory: int, experts: int, chosen: int, top_k: float, seen: float, /) -> None:
    """See one_token.c; `memory` is the address of its `Memory`."""
