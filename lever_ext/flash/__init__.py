"""The flash store: packs, their writer and reader, and the streams that hand weights to
operators.
"""
