"""Acceptance: the target's own tokens, matched against the tree from the root on (paper 2c).

    tree            the target chooses
    the             cat      a child of the root: accepted
    |- cat          on       no child of "cat": the bonus token, the cycle ends
    |  `- sat
    `- dog

Two tokens for one pass: "cat", which was drafted, and "on", which was not.
"""

from __future__ import annotations

import torch

from lever_ext.speculation.answer import Answer
from lever_ext.speculation.verify import Verified, Verifier
from lever_ext.tree.candidates import CandidateTree
from lever_ext.tree.token_tree import TokenTree

AT_ONCE = 3
"""Nodes of the likeliest path that are projected in one product: as many as cost no more than one.
"""


def accept(
    tree: TokenTree,
    verified: Verified,
    verifier: Verifier,
    candidates: CandidateTree,
    answer: Answer,
) -> tuple[list[int], bool]:
    """Choose tokens along the tree until one is no child of the last node.

    Args:
        tree: that was verified.
        verified: the pass.
        verifier: projects hidden states on demand.
        candidates: what the tree was selected from; its calibration learns.
        answer: gets the tokens.

    Returns:
        (nodes from the root to the last accepted one, whether generation has ended).

    Mutates: the answer with its KV cache, and the calibration.
    """
    node = 0
    path = [0]
    logits: dict[int, torch.Tensor] = {}
    while True:
        if node not in logits:
            likely = _likeliest_path(tree, verified, node)
            rows = [verified.row_of[below] for below in likely]
            projected = verifier.logits(verified.hidden[0, rows])
            logits.update(zip(likely, projected.split(1), strict=True))
        verifier.place(answer.cache, verified, node, depth=len(path) - 1)
        done = answer.append(logits[node])
        token = answer.last_token
        proposed = candidates.nodes[tree.keys[node]].candidates
        if proposed is not None:
            candidates.calibration.observe(proposed, token)
        child = tree.children[node].get(token)
        if done or child is None or child not in verified.row_of:
            return path, done
        node = child
        path.append(node)


def _likeliest_path(tree: TokenTree, verified: Verified, node: int) -> list[int]:
    """The node and those below it that the target most likely takes, if they were not pruned."""
    path = [node]
    while len(path) < AT_ONCE:
        children = tree.children[path[-1]].values()
        below = [child for child in children if child in verified.row_of]
        if not below:
            break
        likeliest = max(below, key=lambda child: tree.reach[child])
        path.append(likeliest)
    return path
