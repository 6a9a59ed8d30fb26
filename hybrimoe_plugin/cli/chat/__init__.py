"""The conversation of `hybrimoe local_chat`: flags, answers, and what is written down."""
