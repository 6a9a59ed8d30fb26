"""The flash store: packs, their writer and reader, and the streams of weights for operators."""
